"""Policies from data to adapter: what is written and kept, and that a run goes on exactly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.core.errors import CheckpointError, ConfigError, DataError
from graftlm.core.events import read_events
from graftlm.core.notices import collected, forget_notices
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.models.ending import Ending
from graftlm.models.heads import with_head
from graftlm.models.load import load_model
from graftlm.tasks.policy.rollouts import RolloutFiles
from graftlm.verbs.evaluate import evaluate
from graftlm.verbs.tune import tune
from graftlm.verbs.tune_result import TuneResult

KNOWN = Path(__file__).parents[1] / "verbs" / "known.txt"
SETTINGS = (
    "model.dtype=float32", "data.max_length=64", "method.r=4", "train.max_steps=4", "train.save_steps=2",
    "train.eval_steps=4", "train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2",
    "train.learning_rate=1e-3", "output.report_to=none", "task.num_generations=3",
    "task.max_completion_length=6", "data.eval_fraction=0.5",
    f"eval.known_path={KNOWN}",
)  # fmt: skip
REWARDS = """
import os, random

def near(completions, answer, **_):
    return [-abs(len(c) - len(a)) + 0.1 * (c[:1] == a[:1]) for c, a in zip(completions, answer)]

def drawn(completions, **_):
    return [random.SystemRandom().random() for _ in completions]

def noisy(completions, **_):
    import torch
    return torch.rand(len(completions)).tolist()

def brittle(completions, level, **_):
    return [1.0 if n % 2 else {}["no such key"] for n in level]

def never(completions, **_):
    raise RuntimeError("out of order")

def stopping(completions, **_):
    import signal
    if len(completions) == 12 and not os.path.exists(os.environ["STOPPED"]):
        open(os.environ["STOPPED"], "w").close()
        os.kill(os.getpid(), signal.SIGINT)
    return [float(len(c)) for c in completions]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy")
    rows = [{"question": f"What is {n} + {n % 7}?", "answer": str(n + n % 7), "level": n} for n in range(24)]
    (path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "rewards.py").write_text(REWARDS)
    return path


def run(folder: Path, out: Path, reward: str, *more: str, task: str = "grpo") -> TuneResult:
    settings = (*SETTINGS, f"task.rewards={folder / 'rewards.py'}:{reward}", *more)
    chosen = {each.partition("=")[0]: each for each in settings}  # a later one replaces an earlier one
    return tune(folder / "sums.jsonl", model="sprout", task=task, out=out, overrides=[*chosen.values()])


def steps(out: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(out / "events.jsonl") if event["kind"] == "step"]


def lines(out: Path, step: int) -> list[dict[str, Any]]:
    text = (out / "rollouts" / f"step-{step:06d}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def tensors(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """A run whose rewards are never the same twice, with a KL term and two steps on the same answers."""
    out = folder / "finished"
    each = ("train.save_steps=1", "train.save_total_limit=9")
    run(folder, out, "drawn", "task.beta=0.1", "task.num_iterations=2", *each)
    return out


def test_what_was_written_can_be_read(finished: Path) -> None:
    names = sorted(path.name for path in (finished / "rollouts").glob("step-*.jsonl"))
    assert names == ["step-000001.jsonl", "step-000003.jsonl"], "two steps learn from the same answers"
    rows = lines(finished, 1)
    assert len(rows) == 2 * 2 * 3
    first = rows[0]
    assert first["prompt"].startswith("What is") and len(first["rewards"]) == 1
    assert first["reward"] == pytest.approx(next(iter(first["rewards"].values())))
    for group in (rows[start : start + 3] for start in range(0, 12, 3)):
        assert len({row["row"] for row in group}) == 1
        assert sum(row["advantage"] for row in group) == pytest.approx(0.0, abs=1e-4)


def test_figures_of_each_step(finished: Path) -> None:
    metrics = steps(finished)[0]["metrics"]
    rewards = [row["reward"] for row in lines(finished, 1)]
    assert metrics["reward"] == pytest.approx(sum(rewards) / len(rewards), rel=1e-6)
    assert {"kl", "entropy", "clip_ratio/region_mean", "frac_reward_zero_std"} <= metrics.keys()
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-4), "the adapter begins as the base"
    assert steps(finished)[-1]["metrics"]["kl"] > 0


def test_before_and_after(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert "Rewards" in json.dumps(report)
    held_out = json.loads((finished / "evaluation" / "base-held-out.json").read_text())
    assert held_out["measures"] == ["reward", "kl", "answer_tokens"]
    assert all(row["figures"]["kl"] == 0.0 for row in held_out["rows"])


@pytest.mark.parametrize("last", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_run_goes_on_by_what_it_wrote(finished: Path, tmp_path: Path, last: int) -> None:
    """With rewards that are drawn anew each time, only the kept answers lead to the same adapter: from before
    the second answers, and from between the two steps that learn from them."""
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    for step in range(last + 1, 5):
        shutil.rmtree(moved / "checkpoints" / f"step-{step:06d}")
    shutil.rmtree(moved / "adapter")
    result = tune(moved, resume=True)
    assert tensors(result.run) == tensors(finished)
    assert lines(moved, 3) == lines(finished, 3)


def test_answers_of_other_prompts_are_refused(finished: Path, tmp_path: Path) -> None:
    files = RolloutFiles(finished)
    found = files.load(1, [row["row"] for row in lines(finished, 1)][::3])
    assert found is not None and found.group == 3
    with pytest.raises(CheckpointError, match="other prompts"):
        files.load(1, [1, 2, 3, 4])
    shutil.copytree(finished / "rollouts", tmp_path / "rollouts")
    (tmp_path / "rollouts" / "step-000001.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="cannot be used"):
        RolloutFiles(tmp_path).load(1, found.rows)
    assert RolloutFiles(tmp_path).load(2, found.rows) is None


@pytest.mark.slow
def test_rewards_that_draw_numbers_do_not_move_dropout(folder: Path, tmp_path: Path) -> None:
    """A resumed run reads its answers and calls no reward, and ends with the same bytes all the same."""
    settings = ("method.lora_dropout=0.3", "eval.before_after=false")
    whole = run(folder, tmp_path / "a", "noisy", *settings)
    first, second = lines(whole.run, 1), lines(whole.run, 2)
    assert [row["reward"] for row in first] != [row["reward"] for row in second]
    moved = tmp_path / "b"
    shutil.copytree(whole.run, moved)
    shutil.rmtree(moved / "checkpoints" / "step-000004")
    shutil.rmtree(moved / "adapter")
    assert tensors(tune(moved, resume=True).run) == tensors(whole.run)


@pytest.mark.slow
@pytest.mark.parametrize("task, more", [
    ("grpo", ()), ("rloo", ()), ("ppo", ("task.num_generations=1", "task.num_ppo_epochs=2")),
])  # fmt: skip
def test_the_same_run_twice(folder: Path, tmp_path: Path, task: str, more: Sequence[str]) -> None:
    settings = ("train.max_steps=2", "eval.before_after=false", *more)
    first = run(folder, tmp_path / "a", "near", *settings, task=task)
    again = run(folder, tmp_path / "b", "near", *settings, task=task)
    assert first.passed and tensors(first.run) == tensors(again.run)
    assert lines(first.run, 1) == lines(again.run, 1)


@pytest.mark.slow
def test_stopped_while_it_writes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop in the middle of a step's answers: the step is not taken, the checkpoint is good."""
    monkeypatch.setenv("STOPPED", str(tmp_path / "stopped"))
    settings = ("task.beta=0.1", "eval.before_after=false")  # with a pass of the base after the answers
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "a", "stopping", *settings)
    assert not steps(tmp_path / "a")
    result = tune(tmp_path / "a", resume=True)
    whole = run(folder, tmp_path / "b", "stopping", *settings)
    assert tensors(result.run) == tensors(whole.run)


def test_a_reward_that_fails_costs_its_answers(folder: Path, tmp_path: Path) -> None:
    forget_notices()
    result = run(folder, tmp_path / "a", "brittle")
    said = [text for text in collected() if "brittle raised KeyError" in text]
    assert len(said) == 1
    written = [lines(result.run, step) for step in range(1, 5)]
    failed = [[row for row in rows if row["reward"] is None] for rows in written]
    causes = [next(iter(row["failed"].values())) for rows in failed for row in rows]
    assert causes and all("raised KeyError" in cause for cause in causes)
    assert len(causes) < sum(map(len, written))
    counted = [step["metrics"]["reward_failures"] for step in steps(result.run)]
    assert counted == [len(rows) for rows in failed]
    assert "Answers that no reward could judge" in (result.run / "report.html").read_text()


def test_a_reward_that_always_fails(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No answer of base could be judged"):
        run(folder, tmp_path / "a", "never")


def test_wrong_settings(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_completion_length is 64"):
        run(folder, tmp_path / "a", "near", "task.max_completion_length=64")
    with pytest.raises(ConfigError, match="num_generations: Input should be greater"):
        run(folder, tmp_path / "a", "near", "task.num_generations=1")
    with pytest.raises(ConfigError, match="reward_weights has 2 numbers for 1 rewards"):
        run(folder, tmp_path / "a", "near", "task.reward_weights=[1, 2]")
    with pytest.raises(DataError, match="has anything to train on"):
        run(folder, tmp_path / "a", "near", "data.max_length=8")


def test_evaluated_apart(folder: Path, finished: Path) -> None:
    found = evaluate(finished, data=folder / "sums.jsonl", limit=8)
    names = [measure.name for measure in found.comparison.measures]
    assert names == ["reward", "kl", "answer_tokens"]
    kl = next(each for each in found.comparison.measures if each.name == "kl")
    assert kl.before.value == 0.0 and kl.after.value > 0.0


@pytest.mark.slow
def test_a_quantised_base(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path / "a", "near", "method.type=qlora", "model.dtype=bfloat16",
                 "train.max_steps=2", "eval.before_after=false")  # fmt: skip
    assert result.passed


@pytest.mark.slow
def test_the_values_learn_and_stay_out_of_the_adapter(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path / "a", "near", "train.max_steps=3", "task.num_generations=1",
                 "task.num_ppo_epochs=3", task="ppo")  # fmt: skip
    from safetensors.torch import load

    checkpoint = next((result.run / "checkpoints").glob("step-000003/*.safetensors"))
    assert any("graft_value_head" in name for path in checkpoint.parent.glob("*.safetensors")
               for name in load(path.read_bytes()))  # fmt: skip
    assert not any("value_head" in name for name in load(tensors(result.run)))
    values = [step["metrics"]["value"] for step in steps(result.run)]
    assert values[0] == 0.0 and values[-1] != 0.0
    assert torch.isfinite(torch.tensor(values)).all()


@pytest.mark.slow
def test_a_reward_adapter_on_the_same_base(folder: Path, tmp_path: Path) -> None:
    """It scores base and policy alike, leaves nothing behind, and a run without adapters is refused."""
    model, _ = load_model("sprout", dtype="float32", ending=Ending("rows", ("reward",), "number", seed=3))
    config = LoraConfig(r=1, init_lora_weights=False)
    attach(model, with_head(config, model), storage=FOLDER).save(tmp_path / "reward")
    rewards = f"task.rewards=adapter:{tmp_path / 'reward'}"
    result = run(folder, tmp_path / "a", "near", rewards)
    assert result.passed
    again = run(folder, tmp_path / "b", "near", rewards)
    assert tensors(result.run) == tensors(again.run)
    (line, *_) = lines(result.run, 1)
    assert line["reward"] == pytest.approx(next(iter(line["rewards"].values())))
    with pytest.raises(ConfigError, match="holds no adapter"):
        run(folder, tmp_path / "c", "near", f"task.rewards=adapter:{folder}")
