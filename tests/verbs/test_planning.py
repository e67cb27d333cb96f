"""`graft plan` and what `graft tune` takes from it: on the embedded base, with real predictions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import write_rows

from graftlm.cli.main import run
from graftlm.core.errors import ConfigError, MissingDependency, UsageError
from graftlm.core.notices import forget_notices
from graftlm.planning.base_facts import base_facts
from graftlm.planning.estimates import MemoryEstimate, Part, Phase
from graftlm.planning.fitting import Estimators
from graftlm.planning.hardware import described
from graftlm.tasks.table import task_of
from graftlm.training.recipe import Recipe, make_recipe
from graftlm.verbs.choosing import is_roomy, settled_by_plan
from graftlm.verbs.planning import plan
from graftlm.verbs.row_lengths import row_lengths

LIMITED = ("--method", "lora", "--set", "model.quantization=none")
"""One candidate: a second of rehearsal."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"{n} and {n} make", "completion": f"{2 * n}, as was asked"} for n in range(80)]
    return write_rows(tmp_path / "rows.jsonl", rows)


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, dict[str, Any]]:
    code = run(["plan", *words, "--json"])
    said = capsys.readouterr()
    return code, said.err, json.loads(said.out.strip().splitlines()[-1])


def test_a_plan_from_the_command_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"--recipe": tmp_path / "best.yaml", "--picture": tmp_path / "memory.svg"}
    options = [word for name, path in files.items() for word in (name, str(path))]
    code, _, found = asked(
        capsys,
        str(data),
        "--model",
        "sprout",
        "--gpu",
        "rtx4090",
        "--price-per-hour",
        "2",
        *LIMITED,
        *options,
    )
    assert code == 0 and found["ok"] and found["task"] == "sft"
    best = found["options"][0]
    assert best["label"] == "lora r=16" and best["trainable"] == 295_936
    assert best["memory"]["peak"] < 2**31 and best["time"]["seconds"] > 0
    assert best["cost"] == pytest.approx(2 * best["time"]["seconds"] / 3600)
    recipe = yaml.safe_load(files["--recipe"].read_text())
    assert recipe["method"] == {"type": "lora"} and "train" not in recipe
    drawn = files["--picture"].read_text()
    assert drawn.startswith("<svg") and "lora r=16" in drawn and "<script" not in drawn


def test_the_table_for_people(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(data), "--model", "sprout", "--gpu-memory", "8GB", *LIMITED]) == 0
    shown = capsys.readouterr().out
    assert "lora r=16" in shown and "Why lora r=16" in shown and "graft tune" in shown


def test_nothing_fits(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, found = asked(capsys, str(data), "--model", "sprout", "--gpu-memory", "100MB")
    assert code == 1 and not found["ok"] and not found["options"]
    assert all("Possible" not in item["why"] and item["remedy"] for item in found["rejected"])
    assert run(["plan", str(data), "--model", "sprout", "--gpu-memory", "100MB"]) == 1
    assert "Nothing fits." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        (["--budget", "5"], "no price"),
        (["--deadline", "soon"], "no span of time"),
        (["--deadline", "0s"], "no span of time"),
        (["--gpu", "rtx4091"], "did you mean 'rtx4090'"),
        (["--gpu-memory", "lots"], "no size of memory"),
        (["--gpu-memory", "8GB", "--machine", "m.yaml"], "described twice"),
        (["--picture", "x.gif"], "no picture"),
        (["--budget", "-1", "--price-per-hour", "1"], "requirements"),
    ],
)
def test_wrong_input_is_said_before_any_work(
    options: list[str], seen: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, found = asked(capsys, str(data), "--model", "sprout", *options)
    assert code == 2 and seen in said and found["fix"]


def test_an_output_is_never_overwritten(data: Path, tmp_path: Path) -> None:
    taken = tmp_path / "best.yaml"
    taken.write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        plan(data, model="sprout", gpu_memory="8GB", recipe_file=taken)
    assert taken.read_text() == "mine"


def test_a_picture_without_pillow_is_refused_before_any_work(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependency):
        plan(data, model="sprout", gpu_memory="8GB", picture_file=tmp_path / "x.png")


def test_without_a_tokenizer_tokens_are_told_from_characters(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forget_notices()
    code, said, found = asked(
        capsys, str(data), "--model", "Qwen/Qwen3-0.6B", "--gpu-memory", "100MB", *LIMITED
    )
    assert code == 1 and not found["data"]["is_counted"] and "estimated from characters" in said


def recipe_of(data: Path, **sections: Any) -> Recipe:
    return make_recipe({"model": "sprout", "data": str(data), "task": "sft", **sections})


def by_weights(limit: int) -> Estimators:
    """A base that is too large as it is stored, and fits in 4 bits."""

    def memory(recipe: Recipe, *_: object, **__: object) -> MemoryEstimate:
        size = limit // 2 if recipe.model.quantization == "nf4" else 2 * limit
        return MemoryEstimate((Phase("backward", (Part("weights", size),)),))

    return Estimators(memory=memory)


def test_tune_leaves_a_recipe_that_fits_as_it_is(data: Path) -> None:
    recipe = recipe_of(data)
    task = task_of(recipe)
    task.read()
    assert settled_by_plan(task, recipe, machine=described(gpu="rtx4090", memory=None)) is recipe


def test_tune_takes_what_fits_where_nobody_wrote_otherwise(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = described(gpu=None, memory="1GB")
    for sections, wanted in (({}, "nf4"), ({"train": {"learning_rate": 0.01}}, "nf4")):
        recipe = recipe_of(data, **sections)
        task = task_of(recipe)
        task.read()
        taken = settled_by_plan(task, recipe, machine=card, estimators=by_weights(card.memory_bytes))
        assert taken.model.quantization == wanted
        assert taken.train.learning_rate == recipe.train.learning_rate
    assert "as it is stored the run would need" in capsys.readouterr().err


def test_tune_refuses_early_what_cannot_fit_and_says_what_would(data: Path) -> None:
    recipe = recipe_of(data, model={"name": "sprout", "quantization": "none"}, method={"type": "lora"})
    task = task_of(recipe)
    task.read()
    card = described(gpu=None, memory="0.2GB")
    with pytest.raises(ConfigError, match="Nothing that this recipe allows fits") as caught:
        settled_by_plan(task, recipe, machine=card)
    assert caught.value.problems and "GPU with" in caught.value.fix


def test_a_bound_that_is_generous_saves_the_prediction(data: Path) -> None:
    facts, card = base_facts("sprout"), described(gpu="rtx4090", memory=None)
    assert is_roomy(recipe_of(data), facts, card)
    assert not is_roomy(recipe_of(data), base_facts("meta-llama/Llama-3.1-8B"), card)


def test_lengths_are_those_of_the_task(data: Path) -> None:
    recipe = recipe_of(data)
    task = task_of(recipe)
    task.read()
    rows, settled = row_lengths(task, recipe, base_facts("sprout"))
    assert settled == recipe and rows.is_counted
    assert rows.train == tuple(row.tokens for row in task.dataset.train)
    assert rows.targets == tuple(row.target_tokens for row in task.dataset.train)
