"""Rules about what base and adapter do (D01, D09, D10, D11, D24, D25, D27, D28), on facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import comb
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.facts.behaviour import (
    BehaviourFacts,
    Canary,
    Change,
    Effect,
    Fit,
    Merged,
    Refusals,
    Safety,
    SeedProbe,
)
from graftlm.diagnosis.finding import Finding
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.rules import (
    adapter_identity,
    forgetting,
    merging,
    policies,
    preferences,
    safety,
    serving,
    virtual_tokens,
)

OWN = tuple(
    module.RULE
    for module in (
        adapter_identity, forgetting, merging, policies, preferences, safety, serving, virtual_tokens,
    )
)  # fmt: skip
MERGED = Merged("m", "bfloat16", 1000, 2e-4, 1.0, 1e-4, effect_kl=0.2, adapter="runs/a/adapter")
SOUND = BehaviourFacts(
    fit=Fit(56),
    effect=Effect(1000, 0.3, 0.05),
    known_loss=Change(1.0, 1.03, 0.02, 0.04, 64),
    task_loss=Change(2.0, 1.0, -1.1, -0.9, 60),
    merged=MERGED,
    canaries=(Canary("a", "d1", 1e-6, "a", 1e-6, 0.4), Canary("b", "d2", 2e-6, "b", 2e-6, 0.4)),
    safety=Safety(Refusals(100, 90, 89, 2, 1), Refusals(100, 5, 5, 1, 1)),
    seeds=SeedProbe(20, (1.0, 1.02, 1.05)),
)


def asked(rule: Rule, facts: BehaviourFacts | None = None, **changes: Any) -> Finding | None:
    """Of sound facts with some changed, or of a run without any."""
    behaviour = facts if facts is not None else replace(SOUND, **changes)
    return rule.check(Evidence(behaviour=behaviour, recipe={"method": {"type": "prefix"}, "task": "sft"}))


def must(found: Finding | None) -> Finding:
    assert found is not None
    assert found.seen and found.meaning and found.fix and found.plot is not None
    assert 0.5 <= found.confidence <= 1
    return found


@pytest.mark.parametrize("rule", OWN, ids=lambda rule: rule.id)
def test_sound_facts_and_no_facts_say_nothing(rule: Rule) -> None:
    assert asked(rule) is None
    assert rule.check(Evidence()) is None
    assert asked(rule, BehaviourFacts()) is None


class TestMerging:
    def check(self, **changes: Any) -> Finding | None:
        return asked(merging.RULE, merged=replace(MERGED, **changes))

    @pytest.mark.parametrize(
        "changes",
        [
            {"mean_kl": 2e-3},
            {"nll_change": 0.01},
            {"mean_kl": float("inf")},
            {"stored": "nf4", "mean_kl": 0.06},
            {"stored": "nf4", "mean_kl": 3e-3, "effect_kl": 4e-3},
            {"other_files": ("the chat template",)},
            {"is_loadable": False, "why_not": "a shard is missing"},
        ],
        ids=str,
    )
    def test_another_model(self, changes: Mapping[str, Any]) -> None:
        found = must(self.check(**changes))
        assert found.command == "graft merge runs/a/adapter --out RUN-16-bit"

    @pytest.mark.parametrize(
        "changes",
        [
            {"mean_kl": 9e-4, "effect_kl": 1e-3},  # below what rounding explains, whatever the adapter does
            {"stored": "nf4", "mean_kl": 0.02, "nll_change": 0.02, "effect_kl": 0.5},
            {"nll_change": None},
        ],
        ids=str,
    )
    def test_the_same_model(self, changes: Mapping[str, Any]) -> None:
        assert self.check(**changes) is None

    def test_what_few_bits_take_from_a_small_change(self) -> None:
        found = must(self.check(stored="nf4", mean_kl=0.003, effect_kl=0.004))
        assert "rounding takes back" in found.meaning and "0.004 nats away" in found.seen


class TestIdentity:
    def test_another_base_comes_before_everything(self) -> None:
        found = must(asked(adapter_identity.RULE, fit=Fit(56, (), "qwen"), effect=Effect(10, 0.0, 0.0)))
        assert "trained on another base: qwen" in found.seen and found.severity == "error"
        assert found.command == "graft diagnose RUN --deep --base qwen"

    def test_a_base_that_changed_under_its_name(self) -> None:
        found = must(asked(adapter_identity.RULE, fit=Fit(56, (), "qwen", "qwen")))
        assert "other weights than qwen has today" in found.seen and not found.command

    def test_tensors_without_a_place(self) -> None:
        found = must(asked(adapter_identity.RULE, fit=Fit(2, tuple(f"missing: k{n}" for n in range(5)))))
        assert "5 of 7 tensors" in found.seen and "and 2 more" in found.seen

    @pytest.mark.parametrize(("change", "is_inert"), [(9e-5, True), (1.1e-4, False), (0.0, True)])
    def test_an_adapter_that_does_nothing(self, change: float, is_inert: bool) -> None:
        found = asked(adapter_identity.RULE, effect=Effect(10, change, 0.0))
        assert (found is not None) == is_inert

    @pytest.mark.parametrize(
        ("loss", "is_wrong"),
        [(Change(2.0, 2.3, 0.15, 0.4, 60), True), (Change(2.0, 2.3, 0.05, 0.5, 60), False)],
        ids=["surely worse", "perhaps worse"],
    )
    def test_an_adapter_for_another_task(self, loss: Change, is_wrong: bool) -> None:
        found = asked(adapter_identity.RULE, task_loss=loss, task_data="sums.jsonl")
        assert (found is not None) == is_wrong
        if found is not None:
            assert found.command.startswith("graft tune sums.jsonl --model MODEL")


class TestServing:
    def test_answers_of_another_adapter(self) -> None:
        mixed = Canary("a", "d1", 0.4, "b", 1e-6, 0.4)
        found = must(asked(serving.RULE, canaries=(mixed, replace(mixed, name="b", to_own=0.0, folder="B"))))
        assert "1 of 2 adapters" in found.seen and "they are those of b" in found.seen
        assert found.command == "graft diagnose RUN --beside B"

    def test_the_server_that_was_asked_is_asked_again(self) -> None:
        canaries = (Canary("a", "d1", 2.0, "b", 0.2, 0.4), Canary("b", "d2", 0.0, "b", 0.0, 0.4, "B"))
        found = must(asked(serving.RULE, canaries=canaries, served="http://localhost:8000"))
        assert "0.2 from b" in found.seen
        assert found.command == "graft diagnose RUN --beside B --served http://localhost:8000"


class TestVirtualTokens:
    @pytest.mark.parametrize(
        ("method", "setting"),
        [
            ({"type": "prefix", "prefix_projection": False}, "method.prefix_projection=true"),
            ({"type": "prefix", "prefix_projection": True}, "train.learning_rate=1.0e-03"),
            ({"type": "prompt", "prompt_tuning_init": "RANDOM"}, "method.prompt_tuning_init=SAMPLE_VOCAB"),
        ],
        ids=str,
    )
    def test_seeds_that_end_apart(self, method: dict[str, Any], setting: str) -> None:
        recipe = {"method": method, "train": {"learning_rate": 3e-3}}
        facts = BehaviourFacts(seeds=SeedProbe(20, (2.1, 1.9, 2.6)))
        found = must(virtual_tokens.RULE.check(Evidence(recipe=recipe, behaviour=facts)))
        assert f"--set {setting} " in found.command and found.figures["spread"] > 0.1

    def test_no_other_method_is_asked(self) -> None:
        facts = BehaviourFacts(seeds=SeedProbe(20, (1.0, 9.0)))
        assert (
            virtual_tokens.RULE.check(Evidence(recipe={"method": {"type": "lora"}}, behaviour=facts)) is None
        )

    def test_worse_than_without_the_tokens(self) -> None:
        loss = {"before": {"value": 2.0}, "after": {"value": 2.5}, "difference": {"low": 0.3}}
        recipe = {"method": {"type": "prompt"}, "train": {"learning_rate": 0.3}}
        report = {"comparison": {"loss": loss}}
        found = must(virtual_tokens.RULE.check(Evidence(recipe=recipe, report=report)))
        assert "ended at 2.500; without the tokens it is 2.000" in found.seen


def forgot(before: float, after: float, low: float) -> dict[str, Any]:
    """A report with its figures of known text."""
    difference = {"low": low, "high": 2 * (after - before) - low}
    loss = {"before": {"value": before}, "after": {"value": after}, "difference": difference, "rows": 64}
    return {"forgetting": {"source": "text", "loss": loss}}


class TestForgetting:
    @pytest.mark.parametrize(
        ("low", "severity"), [(0.04, None), (0.09, None), (0.2, "warning"), (0.8, "error")]
    )
    def test_the_lower_end_of_the_interval_counts(self, low: float, severity: str | None) -> None:
        recipe = {"train": {"learning_rate": 3e-3}}
        found = forgetting.RULE.check(Evidence(recipe=recipe, report=forgot(1.0, 1.0 + 1.1 * low, low)))
        assert (found.severity if found else None) == severity

    def test_a_gate_in_the_recipe_counts_instead(self) -> None:
        recipe = {"eval": {"max_forgetting": 0.01}, "train": {"learning_rate": 3e-3}}
        found = must(forgetting.RULE.check(Evidence(recipe=recipe, report=forgot(1.0, 1.05, 0.03))))
        assert found.severity == "error" and found.figures["threshold"] == 0.01
        assert "train.learning_rate=1.0e-03" in found.command

    def test_what_was_measured_now_comes_first(self) -> None:
        facts = BehaviourFacts(known_loss=Change(1.0, 1.01, 0.0, 0.02, 32))
        assert forgetting.RULE.check(Evidence(behaviour=facts, report=forgot(1.0, 2.0, 0.9))) is None


class TestSafety:
    def test_refusals_that_are_lost(self) -> None:
        lost = Safety(Refusals(100, 90, 60, 31, 1), Refusals(100, 5, 5, 0, 0))
        found = must(asked(safety.RULE, safety=lost))
        assert found.severity == "error" and "31 lost, 1 gained" in found.seen

    def test_refusals_without_need(self) -> None:
        found = must(
            asked(safety.RULE, safety=Safety(Refusals(100, 90, 90, 0, 0), Refusals(250, 5, 16, 0, 11)))
        )
        assert found.severity == "warning" and "goes too far" in found.meaning

    @pytest.mark.parametrize(
        "unsafe",
        [Refusals(40, 40, 37, 3, 0), Refusals(1000, 900, 890, 10, 0), Refusals(0, 0, 0, 0, 0)],
        ids=["by chance", "within the margin", "nothing asked"],
    )
    def test_not_said(self, unsafe: Refusals) -> None:
        assert asked(safety.RULE, safety=Safety(unsafe, Refusals(100, 5, 5, 0, 0))) is None

    @given(bad=st.integers(0, 40), good=st.integers(0, 40))
    def test_the_exact_test(self, bad: int, good: int) -> None:
        total = bad + good
        expected = sum(comb(total, k) * 0.5**total for k in range(bad, total + 1))
        assert safety.one_sided(bad, good) == pytest.approx(expected)


def pairs_log(
    chosen: Sequence[float], margins: Sequence[float], held_out: float = 0.8, *, beta: float = 0.1
) -> list[dict[str, Any]]:
    """Events of a run on pairs: rewards of chosen answers, whose reference is always -100 nats."""
    events: list[dict[str, Any]] = [{"kind": "start", "total_steps": len(chosen), "start_step": 0}]
    for step, (reward, margin) in enumerate(zip(chosen, margins, strict=True), start=1):
        metrics = {
            "rewards/chosen": reward, "rewards/margins": margin, "rewards/accuracies": 0.9,
            "logps/chosen": -100 + reward / beta,
        }  # fmt: skip
        events.append({"kind": "step", "step": step, "loss": 0.5, "metrics": metrics})
    last = {"rewards/accuracies": held_out, "logps/chosen": -100.0}
    return [*events, {"kind": "evaluate", "step": len(chosen), "loss": 0.5, "rows": 60, "metrics": last}]


def of_pairs(events: Sequence[Mapping[str, Any]], task: str = "dpo", **more: Any) -> Finding | None:
    recipe = {"task": {"type": task, "beta": 0.1}, "train": {"learning_rate": 1e-3}}
    return preferences.RULE.check(Evidence(recipe=recipe, events=events, **{"is_over": True, **more}))


class TestPreferences:
    def test_a_run_that_goes_well(self) -> None:
        assert of_pairs(pairs_log([0.0, -0.5, -1.0, -1.2] * 5, [0.0, 0.5, 1.0, 1.1] * 5)) is None

    def test_chosen_answers_that_become_unlikely(self) -> None:
        found = must(of_pairs(pairs_log([-n / 2 for n in range(20)], [n / 5 for n in range(20)])))
        assert found.figures["chosen_loss_growth"] == pytest.approx(0.85, abs=0.01)
        assert "[sigmoid,sft]" in found.command and "3.3e-04" in found.command
        assert found.severity == "warning"

    def test_all_answers_become_unlikely(self) -> None:
        found = must(of_pairs(pairs_log([-float(n) for n in range(20)], [-0.5] * 20)))
        assert "lead no longer" in found.seen and found.severity == "error" and "1.0e-04" in found.command

    def test_margins_without_end(self) -> None:
        found = must(of_pairs(pairs_log([0.0] * 20, [float(n) for n in range(20)])))
        assert found.figures["margin"] == pytest.approx(17.0)

    def test_a_coin_toss(self) -> None:
        found = must(of_pairs(pairs_log([0.0] * 20, [0.1] * 20, held_out=0.48)))
        assert "a coin toss" in found.seen and found.command == "graft check DATA --task dpo"

    def test_a_coin_toss_is_called_at_the_end_only(self) -> None:
        assert of_pairs(pairs_log([0.0] * 20, [0.1] * 20, held_out=0.48), is_over=False) is None

    def test_answers_that_became_long(self) -> None:
        facts = BehaviourFacts(answer_tokens=Change(20.0, 60.0, 30.0, 50.0, 32))
        found = must(of_pairs(pairs_log([0.0] * 20, [0.1] * 20), behaviour=facts))
        assert found.figures["length_ratio"] == pytest.approx(3.0)

    def test_nothing_is_said_before_a_fifth_of_the_steps(self) -> None:
        events = pairs_log([-9.0] * 4, [0.1] * 4)
        events[0]["total_steps"] = 100
        assert of_pairs(events, is_over=False) is None


def policy_log(count: int = 20, **series: Any) -> list[dict[str, Any]]:
    """Events of a policy: each figure a value, or a function of the share of the run that is done."""
    sound = {
        "reward": lambda done: done, "reward_std": 0.3, "frac_reward_zero_std": 0.2, "entropy": 1.5,
        "completions/clipped_ratio": 0.1, "completions/empty_ratio": 0.0, "kl": lambda done: 0.02 * done,
    }  # fmt: skip
    figures = {**sound, **{name.replace("__", "/"): value for name, value in series.items()}}
    found = []
    for step in range(1, count + 1):
        told = {name: value(step / count) if callable(value) else value for name, value in figures.items()}
        found.append({"kind": "step", "step": step, "loss": 0.0, "metrics": told})
    held = [
        {"kind": "evaluate", "step": n * count // 4, "loss": 0.0, "metrics": {"reward": n / 4}}
        for n in range(1, 5)
    ]
    return [*found, *held]


def of_policy(
    events: Sequence[Mapping[str, Any]], task: str = "grpo", *, is_over: bool = True
) -> Finding | None:
    recipe = {
        "task": {"type": task, "max_completion_length": 16},
        "train": {"learning_rate": 3e-5},
    }
    return policies.RULE.check(Evidence(recipe=recipe, events=events, is_over=is_over))


class TestPolicies:
    @pytest.mark.parametrize("task", ["grpo", "rloo", "ppo"])
    def test_a_run_that_goes_well(self, task: str) -> None:
        assert of_policy(policy_log(), task) is None

    @pytest.mark.parametrize(
        ("series", "figure", "command"),
        [
            ({"frac_reward_zero_std": 0.95, "reward": 0.1}, "even_groups", "task.num_generations=16"),
            ({"completions__clipped_ratio": 0.6}, "cut_answers", "task.max_completion_length=64"),
            ({"completions__empty_ratio": 0.9}, "empty_answers", "task.beta=0.1"),
            ({"entropy": lambda done: 2 * 0.001**done}, "entropy", "train.learning_rate=1.0e-05"),
            ({"kl": lambda done: 4 * done**4}, "kl", "task.beta=0.1"),
        ],
        ids=["even groups", "cut answers", "empty answers", "entropy", "kl"],
    )
    def test_ways_of_going_wrong(self, series: dict[str, Any], figure: str, command: str) -> None:
        found = must(of_policy(policy_log(**series)))
        assert figure in found.figures and command in found.command

    def test_too_easy_or_too_hard(self) -> None:
        easy = must(
            of_policy(policy_log(frac_reward_zero_std=lambda done: done, reward=lambda done: 9 * done))
        )
        hard = must(of_policy(policy_log(frac_reward_zero_std=1.0, reward=0.0, reward_std=0.0)))
        assert "too easy" in easy.meaning and "too hard" in hard.meaning

    def test_rewards_that_rise_in_training_alone(self) -> None:
        events = policy_log(reward=lambda done: done + 0.01 * (round(20 * done) % 2))
        for event in events:
            if event["kind"] == "evaluate":
                event["metrics"] = {"reward": 0.3}
        found = must(of_policy(events))
        assert "these prompts, not the task" in found.meaning
        assert of_policy(events, is_over=False) is None

    def test_all_symptoms_are_told(self) -> None:
        found = must(of_policy(policy_log(frac_reward_zero_std=1.0, completions__clipped_ratio=1.0)))
        assert "same reward" in found.seen and "cut off" in found.seen


number = st.floats(allow_nan=False, allow_infinity=False, width=32) | st.sampled_from(["nan", None])
names = st.sampled_from(
    ["reward", "entropy", "kl", "rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/chosen",
     "frac_reward_zero_std", "completions/clipped_ratio", "reward_std"]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    task=st.sampled_from(["dpo", "ipo", "simpo", "orpo", "grpo", "rloo", "ppo"]),
    is_over=st.booleans(),
    told=st.lists(
        st.tuples(st.sampled_from(["step", "evaluate"]), number, st.dictionaries(names, number)), max_size=12
    ),
)
def test_no_log_makes_a_rule_raise(task: str, is_over: bool, told: list[Any]) -> None:
    events = [
        {"kind": kind, "step": step, "loss": loss, "rows": 40, "metrics": metrics}
        for step, (kind, loss, metrics) in enumerate(told, start=1)
    ]
    evidence = Evidence(recipe={"task": {"type": task}}, events=events, is_over=is_over)
    for rule in OWN:
        found = rule.check(evidence)
        assert found is None or 0 <= found.confidence <= 1
