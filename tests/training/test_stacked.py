"""Runs side by side: each is what it would be alone, whatever the others are, do, and suffer."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import Settings
from stack_rig import Trial, alone, base, furthest, stacked

from graftlm.core.errors import AdapterError, CheckpointError, TrainingError
from graftlm.core.events import read_events
from graftlm.methods.bottleneck import BottleneckConfig
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lora import LoraConfig
from graftlm.methods.prompt import PromptTuningConfig
from graftlm.training.checkpoint import published
from graftlm.training.signals import StopRequests

NEAR = 1e-5
LOW_RANK = (
    Trial(
        "wide",
        LoraConfig(r=8, lora_alpha=8, lora_dropout=0.2),
        Settings(max_steps=14, learning_rate=1e-2),
    ),
    Trial(
        "few.layers",
        LoraConfig(r=2, use_rslora=True, target_modules=("q_proj", "down_proj")),
        Settings(max_steps=9, gradient_accumulation_steps=3, lr_scheduler_type="linear", seed=2),
        rows_per_batch=1,
    ),
    Trial(
        "watched",
        LoraConfig(r=4, lora_dropout=0.1, target_modules=("v_proj", "down_proj", "gate_proj")),
        Settings(max_steps=20, gradient_accumulation_steps=1, eval_steps=7, save_steps=5, seed=3),
        evaluates=True,
    ),
)  # fmt: skip
OTHERS = (
    Trial("lora", LoraConfig(r=3, lora_dropout=0.3), Settings(max_steps=6)),
    Trial(
        "dora", LoraConfig(r=3, use_dora=True, lora_dropout=0.1), Settings(max_steps=8, max_grad_norm=0.05)
    ),
    Trial("biased", LoraConfig(r=2, lora_bias=True), Settings(max_steps=5, seed=1)),
    Trial("ia3", IA3Config(), Settings(max_steps=7, learning_rate=5e-2)),
    Trial("houlsby", BottleneckConfig(placement="houlsby"), Settings(max_steps=6)),
    Trial("tokens", LoraConfig(target_modules=("embed_tokens", "v_proj")), Settings(max_steps=5)),
    Trial("few.tokens", LoraConfig(r=2, trainable_token_indices=(3, 5)), Settings(max_steps=5)),
    Trial("padded", LoraConfig(r=4), Settings(max_steps=6, seed=4), packing=False),
)


@pytest.mark.parametrize("trials", [LOW_RANK, OTHERS], ids=["low-rank", "others"])
def test_each_equals_its_run_alone(trials: tuple[Trial, ...], tmp_path: Path) -> None:
    weights, results = stacked(trials, tmp_path / "together")
    for trial in trials:
        expected, result = alone(trial, tmp_path / "alone" / trial.name)
        found = results[trial.name]
        assert furthest(weights[trial.name], expected) < NEAR
        assert (found.why, found.step, found.total_steps) == (result.why, result.step, result.total_steps)
        assert found.train_loss == pytest.approx(result.train_loss, abs=1e-5)
        logs = [read_events(tmp_path / side / trial.name / "events.jsonl") for side in ("together", "alone")]
        assert [event["kind"] for event in logs[0]] == [event["kind"] for event in logs[1]]
        for mine, theirs in zip(*logs, strict=True):
            for key in ("loss", "grad_norm", "learning_rate", "target_tokens", "tokens"):
                assert mine.get(key, 0) == pytest.approx(theirs.get(key, 0), rel=1e-4)
        kept = [sorted(published(tmp_path / side / trial.name)) for side in ("together", "alone")]
        assert kept[0] == kept[1]


@pytest.mark.slow
def test_a_run_in_16_bits_is_near_its_run_alone(tmp_path: Path) -> None:
    trials = [replace(trial, evaluates=False) for trial in LOW_RANK]
    weights, _ = stacked(trials, tmp_path / "together", base(torch.bfloat16))
    for trial in trials:
        expected, _ = alone(trial, tmp_path / "alone" / trial.name, base(torch.bfloat16))
        moved = max(float(value.abs().max()) for name, value in expected.items() if "lora_B" in name)
        assert furthest(weights[trial.name], expected) < moved


def test_what_was_begun_side_by_side_is_finished_alone(tmp_path: Path) -> None:
    stop, steps = StopRequests(), []

    def listen(event: Any) -> None:
        steps.append(event.kind)
        if steps.count("step") == 9:
            stop.ask(signal.SIGTERM)

    trials = [replace(trial, more={"callbacks": [listen]}) for trial in LOW_RANK]
    _, results = stacked(trials, tmp_path / "cut", stop=stop)
    assert {result.why for result in results.values()} == {"interrupted"}
    assert all(0 < result.step < result.total_steps for result in results.values())
    assert all(result.exit_code == 143 for result in results.values())
    for trial in LOW_RANK:
        whole, _ = alone(trial, tmp_path / "whole" / trial.name)
        found, result = alone(trial, tmp_path / "cut" / trial.name)
        assert result.why == "finished" and furthest(found, whole) < NEAR


@pytest.mark.slow
def test_what_was_begun_alone_is_finished_side_by_side(tmp_path: Path) -> None:
    first = LOW_RANK[0]
    stop = StopRequests()
    cut = replace(first, more={"stop": stop, "callbacks": [lambda e: e.kind == "step" and stop.ask()]})
    _, result = alone(cut, tmp_path / "cut" / first.name)
    assert (result.why, result.step) == ("interrupted", 1)
    weights, _ = stacked(LOW_RANK, tmp_path / "cut")
    whole, _ = alone(first, tmp_path / "whole")
    assert furthest(weights[first.name], whole) < NEAR


def test_one_may_leave_and_one_may_fail(tmp_path: Path) -> None:
    asked: list[int] = []
    leaving = replace(
        LOW_RANK[0], name="leaving",
        more={"stop": lambda: len(asked) >= 3, "callbacks": [lambda e: e.kind == "step" and asked.append(1)]},
    )  # fmt: skip
    failing = Trial("failing", settings=Settings(max_steps=20, learning_rate=1e30))
    taken = replace(LOW_RANK[1], name="taken", more={"resume": "never"})
    alone(taken, tmp_path / "together" / "taken")
    weights, results = stacked([leaving, failing, LOW_RANK[2]], tmp_path / "together")
    assert (results["leaving"].why, results["leaving"].step) == ("interrupted", 3)
    assert isinstance(results["failing"], TrainingError)
    last = read_events(tmp_path / "together" / "failing" / "events.jsonl")[-1]
    assert (last["kind"], last["why"]) == ("end", "failed")
    expected, _ = alone(LOW_RANK[2], tmp_path / "alone")
    assert results["watched"].why == "finished" and furthest(weights["watched"], expected) < NEAR


def test_a_folder_with_another_run_fails_its_member_only(tmp_path: Path) -> None:
    alone(replace(LOW_RANK[0], settings=Settings(seed=9)), tmp_path / LOW_RANK[0].name)
    _, results = stacked(LOW_RANK[:2], tmp_path)
    assert isinstance(results["wide"], CheckpointError) and results["few.layers"].why == "finished"


def test_early_stopping_keeps_the_best_of_each(tmp_path: Path) -> None:
    settings = Settings(max_steps=40, eval_steps=2, early_stopping_patience=1, learning_rate=3e-2)
    trial = Trial("soon", settings=settings, evaluates=True)
    weights, results = stacked([trial, LOW_RANK[0]], tmp_path / "together")
    expected, result = alone(trial, tmp_path / "alone")
    found = results["soon"]
    assert found.why == result.why == "early_stopping" and found.best_step == result.best_step
    assert found.weights == result.weights < found.step and furthest(weights["soon"], expected) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["cheap", "feed_forward", "everything"])
def test_recomputation_changes_nothing(policy: Any, tmp_path: Path) -> None:
    trials = LOW_RANK[:2]
    plain, _ = stacked(trials, tmp_path / "plain")
    found, _ = stacked(trials, tmp_path / policy, policy=policy)
    assert max(furthest(found[trial.name], plain[trial.name]) for trial in trials) < NEAR


def test_what_acts_on_more_than_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="cannot share a batch"):
        stacked([Trial("a"), Trial("other", PromptTuningConfig(num_virtual_tokens=2))], tmp_path)
