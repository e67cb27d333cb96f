"""`graft tune` from data to a proved adapter: in this process, in its own, and on real models."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from runs import SETTINGS, Outcome, assignments, files_of, write_rows
from transformers import AutoModelForCausalLM

from graftlm.core.config import read_yaml
from graftlm.core.events import read_events
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach_folder
from graftlm.models.load import load_model
from graftlm.models.sprout import sprout_folder
from graftlm.training.recipe import Recipe, load_recipe
from graftlm.verbs.tune import tune
from graftlm.verbs.tune_result import TuneResult

pytestmark = pytest.mark.filterwarnings(  # peft asks transformers 5 for names that it gave up
    "ignore:.* is deprecated and will be removed in v6:FutureWarning"
)

CONTRACT = {
    "recipe.yaml", "plan.json", "events.jsonl", "report.html", "report.json", "environment.json",
    "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/graft.json",
    "checkpoints/step-000006/MANIFEST.json",
}  # fmt: skip


def complete(run: Path) -> None:
    """The folder is what the contract says, without temporary files, and can be moved."""
    files = files_of(run)
    assert {name.replace("step-000003", "step-000006") for name in files} >= CONTRACT
    assert not [name for name in files if ".tmp-" in name]
    for name, content in files.items():
        if name.endswith(".json"):
            json.loads(content)
        if name not in ("recipe.yaml", "report.json", "report.html", "plan.json"):
            assert str(run.resolve()).encode() not in content, name
    kinds = [event["kind"] for event in read_events(run / "events.jsonl")]
    assert kinds[0] == "start" and kinds[-1] == "end"
    assert {"step", "evaluate", "checkpoint"} <= set(kinds)
    Recipe.model_validate(read_yaml(run / "recipe.yaml"))


def equal_in_peft(base: Path, run: Path) -> None:
    """The adapter says the same in PEFT, to 1e-5 in float32."""
    ids = torch.arange(3, 43).remainder(400).unsqueeze(0)
    ours, _ = load_model(str(base), dtype="float32")
    attach_folder(ours, run / "adapter", storage=FOLDER)
    with torch.no_grad():
        mine = ours(input_ids=ids).logits
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        untouched = plain(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(plain, run / "adapter").eval()(input_ids=ids).logits
    assert float((mine - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))
    assert float((mine - untouched).abs().max()) > 1e-3, "the adapter does something"


def test_the_run_folder_is_complete(tuned: TuneResult) -> None:
    complete(tuned.run)
    report = json.loads((tuned.run / "report.json").read_text(encoding="utf-8"))
    assert report["verdict"]["text"] == tuned.verdict
    assert report["comparison"]["loss"]["rows"] == 30
    page = (tuned.run / "report.html").read_text(encoding="utf-8")
    assert 'src="http' not in page and "<link" not in page, "opens offline"
    environment = json.loads((tuned.run / "environment.json").read_text(encoding="utf-8"))
    assert environment["packages"]["torch"] == torch.__version__


def test_what_it_says(tuned: TuneResult) -> None:
    assert tuned.passed
    stages = [line.partition(":")[0] for line in tuned.lines]
    assert stages == ["Data", "Plan", "Train", "Evaluate", "Verify", "Diagnose"]
    figures = tuned.as_dict()
    assert figures["after"]["held_out_loss"] < figures["before"]["held_out_loss"]
    assert figures["merge"]["is_same_model"]
    assert json.dumps(figures)


def test_the_adapter_says_the_same_in_peft(tuned: TuneResult) -> None:
    equal_in_peft(sprout_folder(), tuned.run)


def test_its_recipe_repeats_the_run(tuned: TuneResult, tmp_path: Path) -> None:
    """To the byte, whatever random numbers this process drew before."""
    torch.manual_seed(1234)
    torch.rand(7)
    again = tune(tuned.run / "recipe.yaml", out=tmp_path / "again")
    assert files_of(again.adapter) == files_of(tuned.adapter)
    assert (again.run / "recipe.yaml").read_text() == (tuned.run / "recipe.yaml").read_text()


def test_another_seed_is_another_run(tuned: TuneResult, tmp_path: Path) -> None:
    settings = ["train.seed=7", "train.max_steps=1", "eval.before_after=false"]
    other = tune(tuned.run / "recipe.yaml", out=tmp_path / "other", overrides=settings)
    assert other.passed
    assert "the base was not measured" in other.verdict
    assert other.as_dict()["before"] is None
    complete_recipe = yaml.safe_load((other.run / "recipe.yaml").read_text())
    assert complete_recipe["train"]["seed"] == 7
    tensor = "adapter_model.safetensors"
    assert (other.adapter / tensor).read_bytes() != (tuned.adapter / tensor).read_bytes()


def test_held_out_rows_from_a_file_and_rows_left_out(sums: Path, tmp_path: Path) -> None:
    """`eval_path`, `bad_rows: skip`, unpacked rows, one metric."""
    rows = [json.loads(line) for line in sums.read_text().splitlines()]
    train = write_rows(tmp_path / "train.jsonl", [*rows[:40], {"prompt": "x", "completion": ""}])
    held_out = write_rows(tmp_path / "held-out.jsonl", rows[40:52])
    result = tune(
        train, model="sprout", out=tmp_path / "run",
        overrides=[*SETTINGS, f"data.eval_path={held_out}", "data.bad_rows=skip", "data.packing=false",
                   "eval.metrics=[loss]"],
    )  # fmt: skip
    plan = json.loads((result.run / "plan.json").read_text())
    assert (plan["train_rows"], plan["held_out_rows"]) == (40, 12)
    assert result.figures["after"]["exact_match"] is None
    report = (result.run / "report.json").read_text()
    assert "Left out 1 row of" in report


def test_the_gate_on_forgetting(sums: Path, tmp_path: Path) -> None:
    settings = ["eval.known_path=null", "eval.metrics=[loss]", "eval.max_forgetting=0.01"]
    result = tune(
        sums, model="sprout", out=tmp_path / "run",
        overrides=[*SETTINGS, *settings, "train.learning_rate=0.03"],
    )  # fmt: skip
    assert not result.passed
    assert "too much forgotten (margin 1 %)" in result.verdict


def test_a_command_of_its_own(command: Callable[..., Outcome], sums: Path, tmp_path: Path) -> None:
    """Exit code, one JSON line on standard output, everything else on standard error; folders with spaces."""
    done = command(
        "tune", sums, "--model", "sprout", "--out", "my run", "--json", *assignments(SETTINGS),
        "--set", "eval.known_path=null", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.out.count("\n") == 1
    assert done.json["passed"] and done.json["run"] == "my run"
    assert "Traceback" not in done.err and "Warning" not in done.err
    complete(tmp_path / "my run")


REAL = [("stories260K", "e2e-nlg"), ("gpt2-tiny-en", "wikisql")]


@pytest.mark.slow
@pytest.mark.parametrize(("base", "data"), REAL, ids=[" on ".join(pair) for pair in REAL])
def test_real_models_on_real_data(
    base: str, data: str, shared: Path, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    """The whole life: tune, repeat, eval, chat, merge, plain transformers."""
    model = shared / "models" / base
    for part in ("train", "eval"):
        with (shared / "data" / data / f"{part}.jsonl").open(encoding="utf-8") as lines:
            (tmp_path / f"{part}.jsonl").write_text("".join(islice(lines, 240)), encoding="utf-8")
    settings = [*SETTINGS, "data.max_length=128", "data.bad_rows=skip", "eval.known_path=null"]
    done = command(
        "tune", "train.jsonl", "--model", model, "--out", "run", *assignments(settings), cwd=tmp_path
    )
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1].startswith("✓ Held-out loss"), done.out
    run = tmp_path / "run"
    complete(run)
    report: dict[str, Any] = json.loads((run / "report.json").read_text())
    assert report["comparison"]["loss"]["difference"]["high"] < 0, "the gain excludes zero"
    equal_in_peft(model, run)

    assert command("tune", "run/recipe.yaml", "--out", "again", "--json", cwd=tmp_path).code == 0
    assert files_of(tmp_path / "again" / "adapter") == files_of(run / "adapter")

    measured = command("eval", "run", "--data", "eval.jsonl", "--limit", "40", "--json", cwd=tmp_path)
    assert measured.code == 0, measured.err
    assert measured.json["loss"]["after"] < measured.json["loss"]["before"]

    answer = command("chat", "run", "--prompt", "Hello", "--max-new-tokens", "8", "--json", cwd=tmp_path)
    assert answer.code == 0, answer.err

    merged = command("merge", "run", "--out", "merged", "--json", cwd=tmp_path)
    assert merged.code == 0, merged.err
    assert merged.json["reloaded"]["is_same_model"]
    ids = torch.arange(3, 43).unsqueeze(0)
    adapted, _ = load_model(str(model), dtype="float32")
    attach_folder(adapted, run / "adapter", storage=FOLDER)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            plain(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )
    load_recipe(run / "recipe.yaml")
