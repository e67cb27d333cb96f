"""`graft search` against the same trials one after the other, each a `graft tune` of its own.

    python benchmarks/search.py [--trials 24] [--steps 160] [--jobs 2]

Sentiment of film reviews with roberta-tiny-en (`../shared`, or GRAFT_SHARED): rate, rank and targets of LoRA.
First the searches run (one for each `--together`), then every point of the first search as a solo run of the
very same recipe, in a process of its own, trained to its end. Both sides choose by accuracy on the same rows;
their winners are compared, paired, on final rows that neither chose by. Wall time of whole processes, each
with one core to itself, goes to results/search.csv. About 8 minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness import results

from graftlm.evaluation.compare import compare
from graftlm.evaluation.runner import Evaluation

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("GRAFT_SHARED", ROOT.parent / "shared"))
FILE = results.FOLDER / "search.csv"
SPACE = {
    "train.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "method.r": [2, 4, 8, 16, 32],
    "method.target_modules": ["attention", "all-linear"],
}


def graft(*words: str) -> float:
    """Seconds of one command.

    Raises:
        SystemExit: it failed.
    """
    started = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "graftlm", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    if done.returncode > 1:  # 1: no gain beyond noise, which is a result
        raise SystemExit(f"graft {' '.join(words)}\n{done.stderr[-3000:]}")
    return seconds


def search(out: Path, trials: int, steps: int, together: int) -> tuple[float, dict[str, Any]]:
    """One search; its seconds and what it found."""
    space = out.with_suffix(".yaml")
    space.write_text(json.dumps(SPACE), encoding="utf-8")
    settings = {
        "train.max_steps": steps, "train.per_device_train_batch_size": 32,
        "train.gradient_accumulation_steps": 1, "output.report_to": "none",
    }  # fmt: skip
    assigned = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    seconds = graft(
        "search", str(SHARED / "data/sentence-polarity/train.jsonl"), "--model",
        str(SHARED / "models/roberta-tiny-en"), "--task", "classification", "--space", str(space), "--budget",
        str(trials), "--together", str(together), "--out", str(out), *assigned,
    )  # fmt: skip
    return seconds, json.loads((out / "result.json").read_text(encoding="utf-8"))


def solo(trial: Path, out: Path) -> tuple[float, float]:
    """One trial as a run of its own; its seconds and its accuracy on the rows to select by."""
    seconds = graft("tune", str(trial / "recipe.yaml"), "--out", str(out))
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    accuracy = next(one for one in report["comparison"]["measures"] if one["name"] == "accuracy")
    return seconds, float(accuracy["after"]["value"])


def on_final(adapter: Path, final: Path) -> Evaluation:
    """An adapter on the final rows."""
    from graftlm.formats.layout import FOLDER
    from graftlm.methods.attach import attach_folder
    from graftlm.tasks.table import task_of
    from graftlm.verbs.base import load_base, stored_recipe

    recipe = stored_recipe(adapter.parent)
    data = recipe.data.replace(path=str(final), eval_path=None)
    task = task_of(recipe.model_copy(update={"data": data}))
    task.read_held_out()
    model, tokenizer = load_base(recipe.model, ending=task.ending)
    task.require_base(model)
    attach_folder(model, adapter, "default", storage=FOLDER)
    task.encode(tokenizer)
    return task.measure(
        model, tokenizer, name=adapter.parent.name, progress=lambda *_: None, stop=lambda: False
    )


def compared(folder: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """All searches, all solo runs, and who won."""
    first = folder / f"together-{given.together[0]}"

    def searched(count: int) -> tuple[float, dict[str, Any]]:
        return search(folder / f"together-{count}", given.trials, given.steps, count)

    def tuned(trial: Path) -> tuple[float, float]:
        seconds, accuracy = solo(trial, folder / "solo" / trial.name)
        print(f"solo {trial.name}: {seconds:.1f} s, accuracy {accuracy:.4f}", flush=True)
        return seconds, accuracy

    with ThreadPoolExecutor(given.jobs) as pool:
        searches = dict(zip(given.together, pool.map(searched, given.together), strict=True))
        trials = sorted((first / "trials").iterdir())
        alone = dict(zip((int(trial.name) for trial in trials), pool.map(tuned, trials), strict=True))
    best = max(alone, key=lambda number: alone[number][1])
    theirs = on_final(folder / "solo" / f"{best:03d}" / "adapter", first / "data/final.jsonl")
    in_all, rows = round(sum(seconds for seconds, _ in alone.values()), 1), []
    for count, (seconds, found) in searches.items():
        ours = on_final(folder / f"together-{count}" / "adapter", first / "data/final.jsonl")
        change = next(one for one in compare(theirs, ours).measures if one.name == "accuracy")
        rows.append({
            "trials": given.trials, "steps": given.steps, "together": count,
            "search_seconds": round(seconds, 1), "solo_seconds": in_all, "ratio": round(in_all / seconds, 2),
            "whole": sum(trial["state"] == "whole" for trial in found["trials"]),
            "search_winner": found["chosen"], "search_best": found["best"], "solo_winner": best,
            "search_final": round(change.after.value, 4), "solo_final": round(change.before.value, 4),
            "difference": round(change.difference.value, 4), "low": round(change.difference.low, 4),
            "high": round(change.difference.high, 4), "machine": results.machine(),
            "versions": results.versions("torch", "transformers", "optuna", "graftlm"),
            "date": results.today(),
        })  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, keep the rows, say them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps of a whole trial")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one core each")
    parser.add_argument(
        "--together", type=int, nargs="+", default=[1, 4], help="trials at a time, per search"
    )
    parser.add_argument("--keep", type=Path, default=None, help="keep searches and runs in this new folder")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        rows = compared(folder, given)
    if given.trials >= 24:
        results.append(FILE, rows)
    for row in rows:
        same = "the same within noise" if row["low"] <= 0 <= row["high"] else "NOT the same"
        print(
            f"{row['together']} together: {row['search_seconds']} s against {row['solo_seconds']} s, "
            f"{row['ratio']}x; winners {row['search_winner']} and {row['solo_winner']}: accuracy "
            f"{row['search_final']} and {row['solo_final']} on final rows "
            f"({row['low']:+} to {row['high']:+}), {same}"
        )


if __name__ == "__main__":
    main()
