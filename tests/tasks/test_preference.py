"""Runs on pairs and marks: they learn, go on where they were stopped, and say what is wrong with data."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graftlm.core.errors import ConfigError, DataError
from graftlm.core.events import read_events
from graftlm.core.notices import collected
from graftlm.data.branches import Branched
from graftlm.data.row_batches import RowBatches
from graftlm.evaluation.divergence import first_answer_divergences
from graftlm.evaluation.mark_scores import good_above_bad, mark_margin
from graftlm.evaluation.runner import EvaluatedRow
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.models.load import load_model
from graftlm.objectives.log_probs import AnswerLogProbs
from graftlm.objectives.preference import pair_batch
from graftlm.tasks import reference
from graftlm.tasks.kto import KtoTask, with_partners
from graftlm.tasks.reference import FILE, answer_sums, reference_of, rows_to_come
from graftlm.tasks.table import task_of
from graftlm.training.recipe import make_recipe
from graftlm.training.train_section import TrainSection
from graftlm.verbs.evaluate import evaluate
from graftlm.verbs.tune import tune
from graftlm.verbs.tune_result import TuneResult

KNOWN = Path(__file__).parents[1] / "verbs" / "known.txt"
SETTINGS = (
    "model.dtype=float32", "data.max_length=64", "method.r=4", "train.max_steps=12", "train.eval_steps=6",
    "train.save_steps=4", "train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=1",
    "train.learning_rate=5e-4", "output.report_to=none", f"eval.known_path={KNOWN}",
)  # fmt: skip
Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def polite(count: int = 120) -> Rows:
    """The better answer is the polite one."""
    draw = random.Random(1)
    return [
        {
            "prompt": f"Where is room {draw.randrange(1000)}?",
            "chosen": f"Thank you for asking, on floor {draw.randrange(9)}.",
            "rejected": f"Go away, floor {draw.randrange(9)} or so.",
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "pairs.jsonl", polite())


@pytest.fixture(scope="module")
def tuned(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    out = tmp_path_factory.mktemp("runs") / "tuned"
    return tune(pairs, model="sprout", task="dpo", out=out, overrides=SETTINGS)


def measures(result: TuneResult) -> dict[str, tuple[float, float]]:
    """Before and after."""
    return {
        name: (found["before"][0], found["after"][0]) for name, found in result.figures["measures"].items()
    }


def test_dpo_learns(tuned: TuneResult) -> None:
    found = measures(tuned)
    assert tuned.passed
    assert found["reward_accuracy"][0] == 0.5 and found["reward_accuracy"][1] > 0.95
    assert found["reward_margin"][0] == 0 and found["reward_margin"][1] > 0.1
    assert found["kl"][0] == 0 < found["kl"][1] < 3
    assert found["loss"][0] == pytest.approx(0.6931, abs=1e-4)
    first = next(event for event in read_events(tuned.run / "events.jsonl") if event["kind"] == "step")
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4), "nothing has been learnt before the first step"
    assert first["metrics"]["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert json.loads((tuned.run / "plan.json").read_text())["task"] == "dpo"


def test_the_reference_is_in_the_run_folder(tuned: TuneResult) -> None:
    from safetensors.torch import load_file

    assert len(load_file(tuned.run / FILE)["sums"]) == 90 + 30, "an epoch has 12 steps, so it sees all"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ipo", "simpo", "orpo", "kto"])
def test_the_others_learn(task: str, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = tune(pairs, model="sprout", task=task, out=out, overrides=[*SETTINGS, "eval.before_after=true"])
    before, after = next(iter(measures(found).values()))
    assert found.passed and after > max(before, 0.9)
    assert (out / FILE).exists() == (task in ("ipo", "kto"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dora", "ia3", "bottleneck", "prefix", "prompt", "full"])
def test_every_method_has_its_base_as_reference(method: str, pairs: Path, tmp_path: Path) -> None:
    """Also copies of all weights, and virtual tokens: at first nothing has moved but what they add."""
    settings = [setting for setting in SETTINGS if not setting.startswith("method.r")]
    run = tmp_path / "run"
    found = tune(
        pairs, model="sprout", method=method, task="dpo", out=run,
        overrides=[*settings, "train.max_steps=4", "train.eval_steps=4"],
    )  # fmt: skip
    first = next(event for event in read_events(run / "events.jsonl") if event["kind"] == "step")
    if method not in ("prefix", "prompt"):
        assert first["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert measures(found)["kl"][1] > 0


@pytest.mark.slow
def test_a_base_in_four_bits(pairs: Path, tmp_path: Path) -> None:
    settings = [setting for setting in SETTINGS if not setting.startswith("model.dtype")]
    found = tune(
        pairs, model="sprout", method="qlora", task="dpo", out=tmp_path / "run",
        overrides=[*settings, "model.compute_dtype=float32"],
    )  # fmt: skip
    assert found.passed and measures(found)["reward_accuracy"][1] > 0.95


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_resumed_as_if_never_interrupted(tuned: TuneResult, tmp_path: Path) -> None:
    """From a checkpoint in the middle, with the reference of the first start."""
    run = tmp_path / "run"
    shutil.copytree(tuned.run, run)
    for path in (run / "adapter", run / "checkpoints" / "step-000012", run / "report.html"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    assert files_of(tune(run, resume=True).adapter) == files_of(tuned.adapter)


@pytest.mark.slow
def test_stopped_while_the_base_is_asked(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C half-way: what was found is kept, the rest is found by the resumed run, and nothing differs."""
    real, calls = AnswerLogProbs.__call__, 0

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*given, **named)

    run = tmp_path / "run"
    monkeypatch.setattr(reference, "TOKENS_PER_BATCH", 512)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="--resume"):
        patch.setattr(AnswerLogProbs, "__call__", counted)
        tune(pairs, model="sprout", task="dpo", out=run, overrides=SETTINGS)
    assert files_of(tune(run, resume=True).adapter) == files_of(
        tune(pairs, model="sprout", task="dpo", out=tmp_path / "whole", overrides=SETTINGS).adapter
    )
    assert (run / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


@pytest.fixture(scope="module")
def small() -> nn.Module:
    model: nn.Module = load_model("sprout", dtype="float32")[0]
    attach(model, LoraConfig(r=4, init_lora_weights=False), storage=FOLDER)
    return model


def some(count: int) -> list[Branched]:
    draw = random.Random(3)
    return [
        Branched(
            tuple(draw.choices(range(5, 500), k=draw.randrange(2, 9))),
            tuple(tuple(draw.choices(range(5, 500), k=draw.randrange(1, 7))) for _ in range(2)),
            row,
            False,
        )
        for row in range(count)
    ]


def never() -> bool:
    return False


def test_a_reference_is_kept_in_parts(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "TOKENS_PER_BATCH", 32)
    rows, log_probs = some(20), AnswerLogProbs(small)
    whole = reference_of(small, log_probs, rows, tmp_path / "whole", never).of(rows)
    polls = iter([False] * 4)

    def stop() -> bool:
        if next(polls, None) is None:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        reference_of(small, log_probs, rows, tmp_path, stop)
    again = reference_of(small, log_probs, rows, tmp_path, never).of(rows)
    assert torch.equal(whole, again)
    assert (tmp_path / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()
    other = reference_of(small, log_probs, rows[:5], tmp_path, never).of(rows[:5])
    assert torch.allclose(other, whole[:5], atol=1e-4), "a file of other rows is not used"


def test_only_rows_to_come_are_asked_for() -> None:
    rows = some(10)
    batches = RowBatches(
        rows, lambda few: pair_batch(few, 0), ids=lambda row: row.prompt, rows_per_batch=2, seed=3
    )
    seen = [row for index in range(4) for row in batches.rows(0, index)]
    found = rows_to_come(batches, TrainSection(max_steps=2, gradient_accumulation_steps=2))
    assert found == [row for row in rows if row in seen] and len(found) == 8
    assert rows_to_come(batches, TrainSection(max_steps=3, gradient_accumulation_steps=2)) == rows
    assert rows_to_come(batches, TrainSection()) == rows


def test_a_reference_is_the_model_without_its_adapter(small: nn.Module, tmp_path: Path) -> None:
    rows = some(4)
    found = reference_of(small, AnswerLogProbs(small), rows, tmp_path, never).of(rows)
    base, _ = load_model("sprout", dtype="float32")
    for row, values in zip(rows, found.tolist(), strict=True):
        for answer, value in zip(row.answers, values, strict=True):
            ids = torch.tensor([[*row.prompt, *answer]])
            known = base(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1)
            expected = float(known.gather(1, ids[0, len(row.prompt) :, None]).sum().detach())
            assert value == pytest.approx(expected, rel=1e-4)
    policy = answer_sums(small, AnswerLogProbs(small), rows, progress=lambda _a, _b: None, stop=never)
    assert not torch.allclose(policy, found)


@torch.no_grad()
def test_divergence_is_the_sum_over_the_vocabulary(small: nn.Module) -> None:
    rows = some(5)
    base, _ = load_model("sprout", dtype="float32")
    for row, value in zip(rows, first_answer_divergences(small, rows), strict=True):
        ids = torch.tensor([[*row.prompt, *row.answers[0]]])
        ours, theirs = (
            model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].double().log_softmax(-1)
            for model in (small, base)
        )
        expected = float((ours.exp() * (ours - theirs)).sum(-1).mean())
        assert value == pytest.approx(expected, rel=1e-3)
    assert first_answer_divergences(base, rows) == [0.0] * 5


def test_an_adapter_is_measured_against_its_base(tuned: TuneResult, pairs: Path) -> None:
    found = evaluate(tuned.adapter, data=pairs, limit=20).as_dict()["measures"]
    assert found["reward_accuracy"]["before"][0] == 0.5 < found["reward_accuracy"]["after"][0]
    assert found["kl"]["before"][0] == 0 < found["kl"]["after"][0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rejected": "Thank you for asking."}, "row 3: the chosen and the rejected answer are the same"),
        ({"chosen": ""}, "row 3: the answer ('chosen') is empty"),
        ({"prompt": " "}, "row 3: the prompt is empty"),
        ({"margin": -2}, "row 3: the rejected answer has the higher score"),
    ],
)
def test_broken_rows_stop_the_run_and_are_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    rows = [{**row, "margin": 1} for row in polite(40)]
    rows[2] = {**rows[2], "chosen": "Thank you for asking.", **change}
    data = write(tmp_path / "pairs.jsonl", rows)
    recipe = make_recipe({"model": "sprout", "data": str(data), "task": "dpo"})
    with pytest.raises(DataError, match=r"1 of 40 rows") as error:
        task_of(recipe).read()
    assert said in str(error.value)


def test_lengths_that_give_it_away_are_said(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "rejected": "No."} for row in polite(80)]
    data = write(tmp_path / "pairs.jsonl", rows)
    task_of(make_recipe({"model": "sprout", "data": str(data), "task": "dpo"})).read()
    assert "length gives the better answer away" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_what_a_recipe_asks_for_in_vain_is_said(task: str, pairs: Path) -> None:
    asked = ["data.packing=true", "data.train_on=all", "eval.metrics=[exact_match]"]
    recipe = make_recipe({"model": "sprout", "data": str(pairs), "task": task}, asked)
    settled = task_of(recipe).settled()
    said = "\n".join(collected())
    assert "not packed" in said and "data.train_on: all" in said and "eval.metrics" in said
    assert not settled.data.packing and "max_length" not in settled.data.model_fields_set


def test_what_belongs_to_another_task(tmp_path: Path) -> None:
    marked = [{"prompt": f"{n}?", "completion": "Yes.", "label": n % 2 == 0} for n in range(60)]
    data = write(tmp_path / "marked.jsonl", marked)
    with pytest.raises(DataError, match="--task kto"):
        task_of(make_recipe({"model": "sprout", "data": str(data), "task": "dpo"})).read()
    with pytest.raises(ConfigError, match="beta"):
        make_recipe({"model": "sprout", "data": str(data), "task": {"type": "kto", "bta": 1}})
    task = task_of(make_recipe({"model": "sprout", "data": str(data), "task": "kto"}))
    task.read()
    assert isinstance(task, KtoTask)


def test_partners_are_a_cycle_and_fit() -> None:
    from graftlm.data.preferences.encode import MarkedRow

    rows = [
        MarkedRow(Branched((1,) * n, (tuple(range(10 * n, 10 * n + 6)),), n, False), True)
        for n in range(1, 8)
    ]
    found = with_partners(rows, 8, seed=1)
    assert found == with_partners(rows, 8, seed=1) != with_partners(rows, 8, seed=2)
    others = [row.branched.answers[1] for row in found]
    assert sorted(answer[0] // 10 for answer in others) == list(range(1, 8))
    for row, other in zip(found, others, strict=True):
        assert other[0] // 10 != row.row and len(row.branched.prompt) + len(other) <= 8
    assert with_partners(rows[:1], 8, seed=1) == tuple(rows[:1])


def test_rewards_against_marks() -> None:
    def rows(*values: tuple[float, int]) -> list[EvaluatedRow]:
        return [
            EvaluatedRow(n, "", 0.0, 1, figures={"reward": r, "is_good": g})
            for n, (r, g) in enumerate(values)
        ]

    cases: list[tuple[list[EvaluatedRow], float]] = [
        (rows((0, 0), (0, 1)), 0.5),
        (rows((0, 1), (1, 0)), 0.0),
        (rows((0, 0), (1, 1), (2, 0), (3, 1)), 0.75),
    ]
    for found, expected in cases:
        assert good_above_bad(found) == expected
    assert mark_margin(cases[2][0]) == 1.0
    check: Callable[[float], bool] = lambda value: value != value  # noqa: E731
    assert check(good_above_bad(rows((0, 1), (1, 1)))) and check(mark_margin(rows((0, 1))))
