"""A reward model from data to a saved adapter: it learns, resumes, and says what is wrong with pairs."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.core.errors import DataError, GraftError
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach_folder
from graftlm.models.ending import Ending
from graftlm.models.load import load_model
from graftlm.tasks.reward import RewardTask
from graftlm.tasks.table import task_of
from graftlm.training.recipe import Recipe, make_recipe
from graftlm.verbs.evaluate import evaluate
from graftlm.verbs.tune import tune
from graftlm.verbs.tune_result import TuneResult

SETTINGS = (
    "model.dtype=float32", "data.max_length=64", "method.r=4", "train.max_steps=16", "train.eval_steps=8",
    "train.save_steps=8", "train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=1",
    "train.learning_rate=2e-3", "output.report_to=none",
)  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The better answer is the polite one."""
    draw = random.Random(1)
    rows = [
        {
            "prompt": f"Where is room {draw.randrange(1000)}?",
            "chosen": f"Thank you for asking, on floor {draw.randrange(9)}.",
            "rejected": f"Go away, floor {draw.randrange(9)} or so.",
        }
        for _ in range(160)
    ]
    return write(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def tuned(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    out = tmp_path_factory.mktemp("runs") / "tuned"
    return tune(pairs, model="sprout", task="reward", out=out, overrides=SETTINGS)


def test_learns(tuned: TuneResult) -> None:
    accuracy, margin = (tuned.figures["measures"][f"reward_{name}"] for name in ("accuracy", "margin"))
    assert tuned.passed
    assert accuracy["after"][0] == 1.0 and margin["after"][0] > 1
    config = json.loads((tuned.adapter / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["score"] and config["task_type"] == "SEQ_CLS"


def test_a_fresh_model_says_the_same(tuned: TuneResult, pairs: Path) -> None:
    """The adapter, loaded on the base with a head of another seed, ranks the answers: its head came along."""
    found = evaluate(tuned.adapter, data=pairs)
    assert found.as_dict()["measures"]["reward_accuracy"]["after"][0] > 0.97
    model, tokenizer = load_model("sprout", dtype="float32", ending=Ending("rows", ("reward",), "number", 9))
    attach_folder(model, tuned.adapter, storage=FOLDER)
    polite, rude = (
        float(model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits.detach())
        for text in ("Where is room 7? Thank you for asking, floor 1.", "Where is room 7? Go away.")
    )
    assert polite > rude


def test_resumed_as_if_never_interrupted(tuned: TuneResult, pairs: Path, tmp_path: Path) -> None:
    """A run of half the steps is no half of this one; so the later checkpoint is taken away."""
    run = tmp_path / "run"
    shutil.copytree(tuned.run, run)
    shutil.rmtree(run / "checkpoints" / "step-000016")
    shutil.rmtree(run / "adapter")
    again = tune(run, resume=True)
    for file in ("adapter_model.safetensors", "adapter_config.json", "graft.json"):
        assert (again.adapter / file).read_bytes() == (tuned.adapter / file).read_bytes()


def task(path: Path, *overrides: str) -> RewardTask:
    recipe: Recipe = make_recipe(
        {"model": {"name": "sprout"}, "data": {"path": str(path)}, "task": {"type": "reward"}}, overrides
    )
    found = task_of(recipe)
    assert isinstance(found, RewardTask)
    return found


def encoded(found: RewardTask) -> RewardTask:
    found.read()
    found.recipe = found.settled()
    found.encode(load_model("sprout")[1])
    return found


def test_margins_of_the_data_reach_the_batch(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Q{n}?", "chosen": f"good {n}", "rejected": f"bad {n}", "margin": n / 10}
        for n in range(90)
    ]
    found = encoded(task(write(tmp_path / "pairs.jsonl", rows), "train.per_device_train_batch_size=4"))
    batches = found.batches(None)
    batch = batches.batch(0, 0)
    assert batch.margins.tolist() == pytest.approx([(row - 1) / 10 for row in batch.rows])
    assert dict(found.facts)["pairs with a margin"].endswith(f"of {len(found.dataset.train)}")
    other = encoded(task(write(tmp_path / "other.jsonl", [{**row, "margin": 0.5} for row in rows])))
    assert other.batches(None).fingerprint != batches.fingerprint, "margins decide the numbers of a run"


WRONG = {
    "equal": {"prompt": "Hi", "chosen": "Same.", "rejected": "Same."},
    "empty answer": {"prompt": "Hi", "chosen": "", "rejected": "No."},
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rows_are_named(case: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"Q{n}?", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(80)
    ]
    rows[6] = WRONG[case]
    with pytest.raises(DataError) as refused:
        task(write(tmp_path / "pairs.jsonl", rows)).read()
    assert [problem for problem in refused.value.problems if problem.startswith("row 7:")]


def test_text_is_no_pair(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}?", "completion": f"yes {n}"} for n in range(80)]
    with pytest.raises(DataError):
        task(write(tmp_path / "rows.jsonl", rows)).read()


def test_an_encoder_decoder_is_refused(shared: Path, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(GraftError):
        tune(
            pairs, model=str(shared / "models" / "g2p-bart-us"), task="reward", out=tmp_path / "run",
            overrides=["output.report_to=none"],
        )  # fmt: skip
