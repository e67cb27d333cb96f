"""Several tasks in one run: each adapter as if trained alone, none moved by another task, resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from interrupting import interrupted
from safetensors.torch import load_file

from graftlm.core.errors import ConfigError, GraftError, UsageError
from graftlm.objectives.multi import MultiSettings
from graftlm.training.recipe import load_recipe
from graftlm.verbs.evaluate import evaluate
from graftlm.verbs.tune import tune
from graftlm.verbs.tune_result import TuneResult

TRAIN = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.1,
}
SHARED = {
    "model": {"name": "sprout", "dtype": "float32"},
    "method": {"type": "lora", "r": 4},
    "train": TRAIN,
    "output": {"report_to": "none"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three files: text to write, few labels, more labels."""
    folder = tmp_path_factory.mktemp("data")
    colours, size = ("red", "green", "blue"), ("small", "large")
    rows = {
        "sums": [{"prompt": f"Twice {n}?", "completion": f"It is {2 * n}."} for n in range(78)],
        "colour": [{"text": f"thing {n} is {colours[n % 3]}", "label": colours[n % 3]} for n in range(94)],
        "size": [{"text": f"a {size[n % 2]} thing {n}", "label": size[n % 2]} for n in range(62)],
    }
    for name, each in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    return {name: folder / f"{name}.jsonl" for name in rows}


TASKS = {"sums": "sft", "colour": "classification", "size": "classification"}


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(content, default=str))))
    return path


def together(data: dict[str, Path], names: list[str], **settings: Any) -> dict[str, Any]:
    parts = {name: {"task": TASKS[name], "data": {"path": data[name]}} for name in names}
    return {**SHARED, "data": {"max_length": 48}, "task": {"type": "multi", "tasks": parts, **settings}}


@pytest.fixture(scope="module")
def joint(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    folder = tmp_path_factory.mktemp("joint")
    recipe = write(folder / "recipe.yaml", together(data, ["sums", "colour", "size"]))
    return tune(recipe, out=folder / "run")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".lock"}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("sums", "size")]


@pytest.mark.parametrize("name", ["colour", *SLOW])
def test_an_adapter_is_as_if_trained_alone(
    name: str, joint: TuneResult, data: dict[str, Path], tmp_path: Path
) -> None:
    """To the byte: heads of other sizes, text, weight decay and the moments of the optimizer included."""
    content = {**SHARED, "data": {"max_length": 48, "path": data[name]}, "task": TASKS[name]}
    alone = tune(write(tmp_path / "recipe.yaml", content), out=tmp_path / "run")
    assert alone.passed
    assert files(joint.adapter / name) == files(alone.adapter)


def test_what_the_run_says(joint: TuneResult, data: dict[str, Path]) -> None:
    """A plan of each task, figures of each task, a verdict on all."""
    plan = json.loads((joint.run / "plan.json").read_text())
    assert plan["task"] == "multi" and set(plan["parts"]) == set(TASKS)
    assert plan["trainable"] == sum(part["trainable"] for part in plan["parts"].values())
    measures = set(joint.figures["measures"])
    assert {"sums/loss", "colour/accuracy", "colour/loss", "size/accuracy", "size/loss"} <= measures
    events = [json.loads(line) for line in (joint.run / "events.jsonl").read_text().splitlines()]
    named = {name.partition("/")[0] for event in events for name in event.get("metrics", {})}
    assert named == set(TASKS)
    assert "colour" in (joint.run / "report.html").read_text()
    stored = load_recipe(joint.run / "recipe.yaml")
    settings = stored.task.settings
    assert isinstance(settings, MultiSettings)
    assert settings.tasks["colour"].task["labels"] == ["blue", "green", "red"], (
        "what the data told is written"
    )


def test_each_adapter_is_evaluated_by_its_own_task(joint: TuneResult, data: dict[str, Path]) -> None:
    found = evaluate(joint.adapter / "size", data=data["size"])
    assert "accuracy" in found.as_dict()["measures"]
    with pytest.raises(UsageError, match="3 adapters") as refused:
        evaluate(joint.run, data=data["size"])
    assert str(joint.adapter / "size") in refused.value.fix


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["while training", "while the adapter is measured"])
def test_interrupted(stage: str, joint: TuneResult, data: dict[str, Path], tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe.yaml", together(data, ["sums", "colour", "size"]))
    interrupted(stage, tmp_path / "run", lambda: tune(recipe, out=tmp_path / "run"))
    result = tune(tmp_path / "run", resume=True)
    for name in TASKS:
        assert files(result.adapter / name) == files(joint.adapter / name)
    assert result.figures["measures"] == joint.figures["measures"]


@pytest.mark.slow
def test_one_adapter_for_all(data: dict[str, Path], tmp_path: Path) -> None:
    """What is shared is equal in every folder, heads are each task's own, and every task has moved it."""
    content = together(data, ["sums", "colour", "size"], adapters="shared")
    result = tune(write(tmp_path / "recipe.yaml", content), out=tmp_path / "run")
    tensors = {name: load_file(result.adapter / name / "adapter_model.safetensors") for name in TASKS}
    shared = set(tensors["sums"])
    assert shared and all("lora" in key for key in shared)
    for name in ("colour", "size"):
        assert shared < set(tensors[name])
        assert all(torch.equal(tensors[name][key], tensors["sums"][key]) for key in shared)
    heads = {name: tensors[name][key] for name in ("colour", "size") for key in set(tensors[name]) - shared}
    assert heads["colour"].shape[0] == 3 and heads["size"].shape[0] == 2
    plan = json.loads((result.run / "plan.json").read_text())
    own = sum(tensor.numel() for tensor in (*tensors["sums"].values(), *heads.values()))
    assert plan["trainable"] == own, "what is shared is counted, and trained, once"


@pytest.mark.slow
def test_a_rate_and_a_batch_of_its_own(data: dict[str, Path], tmp_path: Path) -> None:
    """As alone with them, also where LoRA+ has its own factor."""
    own = {"colour": {"learning_rate": 3e-3, "per_device_train_batch_size": 2}, "size": {}}
    content = together(data, list(own))
    content["train"] = {**TRAIN, "loraplus_lr_ratio": 4.0}
    for name, settings in own.items():
        content["task"]["tasks"][name] |= settings
    both = tune(write(tmp_path / "recipe.yaml", content), out=tmp_path / "both")
    for name, settings in own.items():
        alone = {**SHARED, "data": {"max_length": 48, "path": data[name]}, "task": TASKS[name]}
        alone["train"] = {**content["train"], **settings}
        found = tune(write(tmp_path / f"{name}.yaml", alone), out=tmp_path / name)
        assert files(both.adapter / name) == files(found.adapter), name


@pytest.mark.slow
def test_methods_and_sampling_of_their_own(data: dict[str, Path], tmp_path: Path) -> None:
    content = together(data, ["colour", "size"], sampling="equal")
    content["task"]["tasks"]["size"] |= {"method": {"type": "ia3"}, "weight": 0.5}
    content["train"] = {"max_steps": 4, "learning_rate": 1e-3}
    result = tune(write(tmp_path / "recipe.yaml", content), out=tmp_path / "run")
    kinds = {
        name: json.loads((result.adapter / name / "adapter_config.json").read_text())["peft_type"]
        for name in ("colour", "size")
    }
    assert kinds == {"colour": "LORA", "size": "IA3"}


WRONG = {
    "one task": ({"tasks": {"a": {"task": "sft", "data": "a"}}}, "two at least"),
    "nested": (
        {"tasks": {n: {"task": {"type": "multi", "tasks": {}}, "data": "a"} for n in "ab"}},
        "task.tasks.a",
    ),
    "name": ({"tasks": {"a/b": {"task": "sft"}, "c": {"task": "sft"}}}, "letters, digits"),
    "typo": (
        {"tasks": {"a": {"task": "sft", "data": {"path": "a", "max_lenght": 3}}, "b": {"task": "sft"}}},
        "task.tasks.a.data.max_lenght: unknown key; did you mean 'max_length'?",
    ),
    "task": ({"tasks": {"a": {"task": "stf"}, "b": {"task": "sft"}}}, "did you mean 'sft'?"),
    "temperature": (
        {"sampling": "temperature", "tasks": {"a": {"task": "sft"}, "b": {"task": "sft"}}},
        "belong together",
    ),
    "own method": (
        {"adapters": "shared", "tasks": {"a": {"task": "sft", "method": "ia3"}, "b": {"task": "sft"}}},
        "one method for all; a names its own",
    ),
    "weight": ({"tasks": {"a": {"task": "sft", "weight": 0}, "b": {"task": "sft"}}}, "greater than 0"),
    "policy": ({"tasks": {"a": {"task": "grpo"}, "b": {"task": "sft"}}}, "writes its own rows"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_recipes(case: str, tmp_path: Path) -> None:
    settings, words = WRONG[case]
    recipe = {"model": "sprout", "data": {"path": "x.jsonl"}, "task": {"type": "multi", **settings}}
    with pytest.raises(ConfigError) as refused:
        load_recipe(write(tmp_path / "recipe.yaml", recipe))
    assert words in str(refused.value)


def test_a_missing_file_is_named_before_a_model_is_loaded(data: dict[str, Path], tmp_path: Path) -> None:
    content = together({**data, "size": tmp_path / "nowhere.jsonl"}, ["sums", "size"])
    with pytest.raises(GraftError, match=r"nowhere\.jsonl"):
        tune(write(tmp_path / "recipe.yaml", content), out=tmp_path / "run")
