"""Predicted memory of runs against the memory that they took, phase by phase.

    python benchmarks/planning_memory.py                      all; about 60 minutes on two cores
    python benchmarks/planning_memory.py --only lora-sprout   these configurations
    python benchmarks/planning_memory.py --keep               append to results/planning-memory.csv
    python benchmarks/planning_memory.py --again              new predictions for the runs that are kept

Each configuration is one `graft tune` of three steps in a process of its own, on rows of a shared data set.
The prediction is that of `graft plan`: from the config of the base, the lengths of the rows, and the bytes
that a process takes here before it has loaded anything. What was taken is the high-water mark of the
resident memory of the whole process in each phase (VmHWM), as the run's own log has it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from harness import results
from harness.shapes import SHAPES, shape_of
from harness.table import markdown
from harness.worker import environment
from harness.writer import SHARED

RESULTS = results.FOLDER / "planning-memory.csv"
MIB = 2**20
PHASES = ("load", "evaluate", "attach", "forward", "backward", "update", "save", "verify")
QUIET = ("output.report_to=none", "train.save_steps=100000", "train.max_steps=3")
KNOWN = "known.txt"
OTHERS: Mapping[str, Mapping[str, Any]] = {
    "gpt2-0.1b": {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 16_384},
    "qwen3-0.1b": {
        "model_type": "qwen3", "hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12,
        "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32_000,
        "tie_word_embeddings": True,
    },
    "llama-1.1b": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32_000,
    },
    "t5-0.06b": {
        "model_type": "t5", "d_model": 512, "d_ff": 2048, "d_kv": 64, "num_layers": 6,
        "num_decoder_layers": 6, "num_heads": 8, "vocab_size": 16_384, "decoder_start_token_id": 0,
    },
    "bert-0.08b": {
        "model_type": "bert", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 10,
        "num_attention_heads": 12, "vocab_size": 16_384,
    },
}  # fmt: skip
"""Random bases of other architectures than the harness has, by what their config says."""


@dataclass(frozen=True)
class Config:
    """One run."""

    name: str
    base: str
    """`sprout`, a shared model, a shape of the harness or one of `OTHERS`."""
    task: str
    data: str
    """Of the shared data sets."""
    settings: tuple[str, ...]


TEXT, PAIRS, CLASSES = (
    "gpteacher-roleplay/train.jsonl",
    "e2e-nlg/train.jsonl",
    "sentence-polarity/train.jsonl",
)


def _run(name: str, base: str, *settings: str, rows: int = 4, length: int = 512, recompute: str = "nothing",
         task: str = "sft", data: str = PAIRS, micro: int = 1) -> Config:  # fmt: skip
    fixed = (
        f"train.per_device_train_batch_size={rows}",
        f"train.gradient_accumulation_steps={micro}",
        f"data.max_length={length}",
        f"train.recompute={recompute}",
    )
    return Config(name, base, task, data, (*fixed, *settings))


def _method(name: str, *more: str) -> tuple[str, ...]:
    return (f"method.type={name}", *more)


NF4, INT8, FP8 = (f"model.quantization={kind}" for kind in ("nf4", "int8", "fp8"))
LARGE_RANK = ("method.r=64",)
CONFIGS = (
    _run("lora-sprout", "sprout"),
    _run("lora-sprout-micro", "sprout", micro=4),
    _run("dora-sprout", "sprout", *_method("dora")),
    _run("full-sprout", "sprout", *_method("full")),
    _run("prefix-sprout-1x256", "sprout", *_method("prefix"), rows=1, length=256),
    _run("qlora-sprout", "sprout", NF4),
    _run("unpacked-sprout", "sprout", "data.packing=false", rows=8),
    _run("lora-stories", "stories260K", length=256),
    _run("lora-gpt2-tiny", "gpt2-tiny-en", length=256, rows=8),
    _run("ia3-gpt2-tiny", "gpt2-tiny-en", *_method("ia3"), length=256),
    _run(
        "lora-bart",
        "g2p-bart-gb",
        "data.format=source_target(word, gb)",
        task="seq2seq",
        length=48,
        rows=16,
        data="g2p-english/train.jsonl",
    ),
    _run("lora-0.02b", "0.02b"),
    _run("lora-0.02b-text", "0.02b", data=TEXT, length=1024, rows=2),
    _run("lora-0.05b", "0.05b"),
    _run("lora-0.05b-1x512", "0.05b", rows=1, micro=2),
    _run("lora-0.05b-8x512", "0.05b", rows=8),
    _run("lora-0.05b-cheap", "0.05b", recompute="cheap"),
    _run("lora-0.05b-ff", "0.05b", recompute="feed_forward"),
    _run("lora-0.05b-everything", "0.05b", recompute="everything"),
    _run("lora-0.05b-r64", "0.05b", *LARGE_RANK),
    _run("dora-0.05b", "0.05b", *_method("dora")),
    _run("ia3-0.05b", "0.05b", *_method("ia3")),
    _run("bottleneck-0.05b", "0.05b", *_method("bottleneck")),
    _run("prefix-0.05b", "0.05b", *_method("prefix")),
    _run("prompt-0.05b", "0.05b", *_method("prompt")),
    _run("full-0.05b", "0.05b", *_method("full")),
    _run("biases-gpt2-0.1b", "gpt2-0.1b", *_method("biases")),
    _run("adamw8-0.05b", "0.05b", "train.optim=adamw_8bit", *LARGE_RANK),
    _run("nf4-0.05b", "0.05b", NF4),
    _run("int8-0.05b", "0.05b", INT8),
    _run("fp8-0.05b-everything", "0.05b", FP8, recompute="everything"),
    _run("lora-qwen3-0.1b", "qwen3-0.1b", rows=2),
    _run("nf4-qwen3-0.1b-ff", "qwen3-0.1b", NF4, recompute="feed_forward"),
    _run("lora-gpt2-0.1b", "gpt2-0.1b", rows=2),
    _run("lora-t5", "t5-0.06b", "train.max_steps=12", task="seq2seq", rows=8, length=128),
    _run(
        "lora-bert",
        "bert-0.08b",
        "train.max_steps=12",
        task="classification",
        rows=16,
        length=128,
        data=CLASSES,
    ),
    _run("lora-0.13b", "0.13b"),
    _run("lora-0.13b-everything", "0.13b", recompute="everything"),
    _run("nf4-0.13b", "0.13b", NF4, rows=2),
    _run("nf4-0.13b-everything", "0.13b", NF4, recompute="everything", length=1024),
    _run("dora-0.13b-cheap", "0.13b", *_method("dora"), recompute="cheap", rows=2),
    _run("lora-0.5b-1x512", "0.5b", rows=1),
    _run("nf4-0.5b-everything", "0.5b", NF4, recompute="everything", rows=1),
    _run("int8-0.5b-1x256", "0.5b", INT8, rows=1, length=256),
    _run("lora-1.1b-everything", "llama-1.1b", recompute="everything", rows=1),
    _run("nf4-1.1b-1x256", "llama-1.1b", NF4, recompute="feed_forward", rows=1, length=256),
)


def base_of(name: str, folder: Path) -> str:
    """The base's name for `graft`; one with random weights is written into `folder`."""
    if name == "sprout":
        return name
    if name not in SHAPES and name not in OTHERS:
        return str(SHARED / "models" / name)
    path = folder / name
    if not path.is_dir():
        subprocess.run([sys.executable, __file__, "--write", name, str(path)], check=True, env=environment())
    return str(path)


def write_base(name: str, path: Path) -> None:
    """A base with random weights in bfloat16, and the tokenizer of sprout."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    from graftlm.models.load import load_tokenizer

    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if name in SHAPES:
        config = shape_of(name).config(2048)
    else:
        fields = dict(OTHERS[name])
        config = AutoConfig.for_model(fields.pop("model_type"), **fields, **ends)
    family: Any = {"t5": AutoModelForSeq2SeqLM, "bert": AutoModelForMaskedLM}.get(
        config.model_type, AutoModelForCausalLM
    )
    family.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    load_tokenizer("sprout").save_pretrained(path)


def rows_of(config: Config, folder: Path, count: int = 120) -> Path:
    """The first rows of the data set, as a file of their own."""
    path = folder / config.data.replace("/", "-")
    with (SHARED / "data" / config.data).open(encoding="utf-8") as lines:
        path.write_text("".join(islice(lines, count)), encoding="utf-8")
    text = (SHARED / "data" / "novel" / "secret_garden_1911.txt").read_text(encoding="utf-8")
    (folder / KNOWN).write_text(text[:2000], encoding="utf-8")
    return path


def predicted(config: Config, base: str, data: Path, settings: Sequence[str]) -> tuple[Any, int]:
    """The estimate, and how many parameters the base has."""
    from graftlm.planning.base_facts import base_facts
    from graftlm.planning.hardware import this_machine
    from graftlm.planning.memory import estimate_memory
    from graftlm.tasks.table import task_of
    from graftlm.training.recipe import make_recipe
    from graftlm.verbs.row_lengths import row_lengths

    sections = {"model": {"name": base}, "data": {"path": str(data)}, "task": config.task}
    recipe = make_recipe(sections, settings)
    task = task_of(recipe)
    task.read()
    recipe = task.settled()
    facts = base_facts(base, task.ending)
    rows, recipe = row_lengths(task, recipe, facts)
    effective = rows.effective(recipe, facts)
    found = estimate_memory(
        effective, facts, rows.workload(effective), this_machine(), recompute=recipe.train.recompute
    )
    return found, facts.total


def run(config: Config, base: str, data: Path, settings: Sequence[str], out: Path) -> dict[str, int]:
    """The highest resident memory of each phase of `graft tune`.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, "-m", "graftlm", "tune", str(data), "--model", base, "--task", config.task]
    command += ["--out", str(out), "--json"]
    command += [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if not (out / "report.json").is_file():
        raise SystemExit(f"{config.name}: {' '.join(command)}\n{done.stderr[-2000:]}")
    peaks = json.loads((out / "report.json").read_text(encoding="utf-8"))["memory"]["peaks"]
    return {peak["phase"]: peak["resident"] for peak in peaks}


def measured(config: Config, folder: Path, kept: Mapping[str, int] | None = None) -> dict[str, Any]:
    """One row of the results. `kept`: resident memory of each phase, where the run was made before."""
    base, data = base_of(config.base, folder), rows_of(config, folder)
    settings = (*QUIET, *config.settings)
    if config.task == "sft":
        settings = (*settings, f"eval.known_path={folder / KNOWN}")
    with tempfile.TemporaryDirectory() as scratch:
        actual = dict(kept) if kept else run(config, base, data, settings, Path(scratch) / "run")
    estimate, parameters = predicted(config, base, data, settings)
    found = {phase.name: phase.bytes for phase in estimate.phases}
    actual.pop("start", None)
    return {
        "name": config.name, "base": config.base, "parameters": parameters, "task": config.task,
        "settings": " ".join(config.settings), "predicted": found[estimate.worst.name],
        "worst": estimate.worst.name, "actual": max(actual.values()),
        **{f"{name}_predicted": found[name] for name in PHASES},
        **{f"{name}_actual": actual.get(name, "") for name in PHASES},
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
    }  # fmt: skip


def kept_runs() -> dict[str, dict[str, int]]:
    """The runs in the results, by configuration: bytes of each phase."""
    with RESULTS.open(encoding="utf-8", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    return {
        name: {phase: int(row[f"{phase}_actual"]) for phase in PHASES if row[f"{phase}_actual"]}
        for name, row in rows.items()
    }


def error(row: Mapping[str, Any], phase: str = "") -> float | None:
    """Relative, of the peak or of one phase."""
    prefix = f"{phase}_" if phase else ""
    actual = row[f"{prefix}actual"]
    return float(row[f"{prefix}predicted"]) / float(actual) - 1 if actual not in ("", None) else None


def show(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one line for each run, and the medians."""
    shown = ("", "load", "evaluate", "backward", "save", "verify")

    def cell(row: Mapping[str, Any], phase: str) -> str:
        found = error(row, phase)
        return "" if found is None else f"{100 * found:+.1f} %"

    lines: list[tuple[object, ...]] = [
        (
            row["name"], f"{int(row['parameters']) / 1e6:,.1f}M", f"{float(row['actual']) / MIB:,.0f}",
            f"{float(row['predicted']) / MIB:,.0f}", *(cell(row, phase) for phase in shown),
        )
        for row in rows
    ]  # fmt: skip
    errors = [[abs(found) for row in rows if (found := error(row, phase)) is not None] for phase in shown]
    lines.append(("**median**", "", "", "", *(f"{100 * statistics.median(each):.1f} %" for each in errors)))
    lines.append(("**worst**", "", "", "", *(f"{100 * max(each):.1f} %" for each in errors)))
    titles = ("configuration", "parameters", "MiB", "predicted", "peak", *shown[1:])
    return markdown(titles, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[config.name for config in CONFIGS], metavar="NAME")
    parser.add_argument("--keep", action="store_true", help=f"append to results/{RESULTS.name}")
    parser.add_argument("--again", action="store_true", help="runs as they are kept, new predictions")
    parser.add_argument("--bases", type=Path, help="a folder for bases with random weights, kept")
    parser.add_argument("--write", nargs=2, metavar=("NAME", "PATH"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if given.write:
        write_base(given.write[0], Path(given.write[1]))
        return
    found, kept = [], kept_runs() if given.again else {}
    where = results.where(__file__, "torch", "transformers", "graftlm")
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.bases or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for config in CONFIGS:
            wanted = given.only is None or config.name in given.only
            if wanted and (config.name in kept or not given.again):
                row = measured(config, folder, kept.get(config.name))
                found.append(row)
                print(show([row]).splitlines()[2], flush=True)
                if given.keep:
                    results.append(RESULTS, [{**row, **where}])
    print(f"\n{show(found)}")


if __name__ == "__main__":
    main()
