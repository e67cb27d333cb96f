"""The loop: lengths, events, early stopping, rotation, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import RowBatches, Settings, make_evaluate, make_model, make_rows, objective, trainable
from safetensors.torch import load_file

from graftlm.core.errors import CheckpointError, DataError, TrainingError
from graftlm.core.events import read_events
from graftlm.training.callbacks import Event
from graftlm.training.checkpoint import checkpoint_path, published
from graftlm.training.interfaces import HeldOut
from graftlm.training.loop import TrainResult, train
from graftlm.training.timeline import Timeline


def run_it(run: Path, model: Any = None, **options: Any) -> TrainResult:
    model = make_model() if model is None else model
    settings = Settings(**{k: v for k, v in options.items() if k in Settings.__dataclass_fields__})
    rest = {k: v for k, v in options.items() if k not in Settings.__dataclass_fields__}
    return train(model, objective, RowBatches(make_rows(7)), trainable(model), settings, run=run, **rest)


def losses(*values: float) -> Callable[[Any], HeldOut]:
    """An evaluation with a known course."""
    left = list(values)
    return lambda stop_asked: HeldOut(left.pop(0), 10, 2)


@pytest.mark.parametrize(
    ("epochs", "max_steps", "total"), [(1, None, 2), (3, None, 6), (0.5, None, 1), (1.5, None, 3), (1, 5, 5)]
)
def test_length(epochs: float, max_steps: int | None, total: int) -> None:
    timeline = Timeline(RowBatches(make_rows(7)), 2)
    assert timeline.total_steps(replace(Settings(), num_train_epochs=epochs, max_steps=max_steps)) == total


def test_windows_cover_every_micro_batch_of_every_epoch_once() -> None:
    class Packed(RowBatches):
        def count(self, epoch: int) -> int:
            return [5, 4, 7][epoch]

    timeline = Timeline(Packed(make_rows(7)), 3)
    windows = [
        timeline.at(step) for step in range(timeline.total_steps(replace(Settings(), num_train_epochs=3)))
    ]
    served = [(window.epoch, index) for window in windows for index in window.indices]
    assert served == [(epoch, index) for epoch, count in enumerate([5, 4, 7]) for index in range(count)]
    assert windows[-1].epochs_done == 3.0


def test_no_batch_is_an_error(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(DataError, match="no training batch"):
        train(model, objective, RowBatches([]), trainable(model), Settings(), run=tmp_path)


def test_events_tell_the_whole_run(tmp_path: Path) -> None:
    heard: list[Event] = []
    model = make_model()
    result = run_it(tmp_path, model, eval_steps=2, evaluate=make_evaluate(model), callbacks=[heard.append])
    log = read_events(tmp_path / "events.jsonl")
    assert [event["kind"] for event in log] == [event.kind for event in heard]
    assert [event["kind"] for event in log] == [
        *("start", "step", "step", "evaluate", "checkpoint"),
        *("step", "step", "evaluate", "checkpoint", "end"),
    ]
    assert log[0]["total_steps"] == 4 and log[0]["start_step"] == 0 and log[0]["run"] == tmp_path.name
    fields = {
        *("t", "kind", "step", "epoch", "loss", "learning_rate", "grad_norm", "target_tokens", "real_tokens"),
        *("tokens_per_second", "seconds", "memory_bytes"),
    }
    assert log[1].keys() == fields and log[1]["epoch"] == 0.5 and log[1]["memory_bytes"] > 2**20
    assert log[4]["path"] == "checkpoints/step-000002"
    assert log[-1] == {
        "t": log[-1]["t"],
        "kind": "end",
        "step": 4,
        "seconds": result.seconds,
        "why": "finished",
    }
    assert result.train_loss == log[6]["loss"] and not model.training


def test_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    model = make_model()
    result = run_it(
        tmp_path,
        model,
        max_steps=8,
        eval_steps=1,
        save_steps=None,
        save_total_limit=1,
        early_stopping_patience=2,
        evaluate=losses(3.0, 2.0, math.nan, 2.5, 0.0),
    )
    assert (result.why, result.step, result.best_step, result.best_loss, result.weights) == (
        *("early_stopping", 4, 2),
        *(2.0, 2),
    )
    assert list(published(tmp_path)) == [2, 4]
    best = load_file(checkpoint_path(tmp_path, 2) / "trainable.safetensors")
    assert all(torch.equal(item, best[name]) for name, item in trainable(model).items())
    # A run that stopped early has ended: resuming it does nothing.
    again = run_it(
        tmp_path, max_steps=8, eval_steps=1, early_stopping_patience=2, evaluate=losses(), resume="if_present"
    )
    assert (again.why, again.step, again.weights) == ("early_stopping", 4, 2)


def test_a_lost_best_checkpoint_does_not_fail_the_run(tmp_path: Path) -> None:
    def lose(event: Event) -> None:
        if event.kind == "checkpoint" and event.fields["step"] == 2:
            (checkpoint_path(tmp_path, 1) / "trainable.safetensors").write_bytes(b"")

    options: Any = {"max_steps": 2, "eval_steps": 1, "early_stopping_patience": 5}
    result = run_it(tmp_path, **options, evaluate=losses(1.0, 2.0), callbacks=[lose])
    assert (result.best_step, result.weights) == (1, 2)


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    run_it(tmp_path, max_steps=6, save_steps=1, eval_steps=1, evaluate=losses(2.0, 1.0, 3.0, 3.0, 3.0, 3.0))
    assert list(published(tmp_path)) == [2, 5, 6]


def test_modes_are_put_back_and_evaluation_runs_in_eval_mode(tmp_path: Path) -> None:
    model = make_model()
    model.model.layers[0].train()
    modes = [module.training for module in model.modules()]
    seen = []

    def evaluate(stop_asked: Any) -> HeldOut:
        seen.append((model.training, torch.is_grad_enabled()))
        return HeldOut(1.0, 1, 1)

    run_it(tmp_path, model, max_steps=2, eval_steps=1, evaluate=evaluate)
    assert seen == [(False, False)] * 2
    assert [module.training for module in model.modules()] == modes


def test_parameters_the_optimizer_does_not_hold_are_refused(tmp_path: Path) -> None:
    model = make_model()
    some = dict(list(trainable(model).items())[1:])
    with pytest.raises(TrainingError, match="do not hold the same") as caught:
        train(model, objective, RowBatches(make_rows(7)), some, Settings(), run=tmp_path)
    assert "not given to the optimizer" in caught.value.problems[0]
    foreign = {**trainable(model), "foreign": torch.nn.Parameter(torch.zeros(1))}
    with pytest.raises(TrainingError):
        train(model, objective, RowBatches(make_rows(7)), foreign, Settings(), run=tmp_path)


def test_another_adapter_shape_is_refused_by_name(tmp_path: Path) -> None:
    run_it(tmp_path, max_steps=2)
    model = make_model()
    model.model.layers[0].self_attn.q_proj.lora_A = torch.nn.Parameter(torch.zeros(3, 16))
    before = {name: item.detach().clone() for name, item in trainable(model).items()}
    with pytest.raises(CheckpointError) as caught:
        run_it(tmp_path, model, max_steps=2, resume="if_present")
    (problem,) = caught.value.problems
    assert problem.startswith(
        "model.layers.0.self_attn.q_proj.lora_A: is F32 [2, 16], the model has F32 [3, 16]"
    )
    assert all(torch.equal(item, before[name]) for name, item in trainable(model).items())


def test_training_learns(tmp_path: Path) -> None:
    run_it(tmp_path, max_steps=60, learning_rate=5e-2, save_steps=None, gradient_accumulation_steps=4)
    course = [event["loss"] for event in read_events(tmp_path / "events.jsonl") if event["kind"] == "step"]
    assert max(course[-5:]) < min(course[:5]) - 0.1  # four small matrices on a random base: not much more
