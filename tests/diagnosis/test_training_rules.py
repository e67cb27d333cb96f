from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from logs import decay, layers, measured, run, steps, updates

from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.facts.adapter import AdapterFacts
from graftlm.diagnosis.finding import Finding
from graftlm.diagnosis.rules import finite, gradients, learning_rate, memory, overfitting, rank, update_size
from graftlm.diagnosis.table import RULES, diagnose

FAILED = {"kind": "end", "step": 7, "why": "failed", "phase": "backward"}
OUT = {"error": "TrainingError", "seen": "Out of memory on cuda: tried to allocate 2 GiB"}
REFUSED = {"kind": "skipped", "step": 3, "why": "not finite: loss nan, gradient norm nan", "rows": [4, 9]}
OWN = ("D02", "D04", "D05", "D06", "D07", "D08", "D12", "D13", "D14")


def must(found: Finding | None) -> Finding:
    assert found is not None
    return found


@pytest.mark.parametrize("events", [steps(), [*steps(), *measured([1.9, 1.4, 1.2, 1.1])], []], ids=len)
@pytest.mark.parametrize("is_over", [False, True])
def test_nothing_is_said_of_a_run_that_goes_well(events: list[Any], is_over: bool) -> None:
    sizes = [0.02 * n / (n + 10) for n in range(1, 101)]
    healthy = run([*events, *updates(sizes)], is_over=is_over, adapter=layers([3, 2, 1.5, 1], [2, 2, 1, 1]))
    assert diagnose(healthy, [RULES[name] for name in OWN]) == []


def test_no_rule_needs_facts_that_nobody_gathered() -> None:
    assert diagnose(Evidence()) == []


class TestOverfitting:
    def test_a_rising_held_out_loss(self) -> None:
        found = must(overfitting.RULE.check(run([*steps(), *measured([1.2, 1.0, 1.1, 1.25])])))
        assert found.figures["best_step"] == 20 and found.figures["rise"] == pytest.approx(1.25)
        assert "200 training rows are few" in found.meaning
        assert found.command.startswith("graft tune RUN/recipe.yaml --set train.early_stopping_patience=2")
        assert found.plot is not None and found.plot.lines["held out"][1] == (20.0, 1.0)

    @pytest.mark.parametrize(
        "losses",
        [[1.2, 1.0, 1.02, 1.03], [1.2, 1.0, 1.25], [1.0, 1.2, 0.9, 0.95, 0.91]],
        ids=["within noise", "only once", "recovers"],
    )
    def test_not_said(self, losses: list[float]) -> None:
        assert overfitting.RULE.check(run([*steps(), *measured(losses)])) is None

    def test_a_run_with_patience_keeps_its_best_step(self) -> None:
        log = [*steps(), *measured([1.2, 1.0, 1.1, 1.25])]
        assert overfitting.RULE.check(run(log, train={"early_stopping_patience": 2})) is None

    def test_one_measurement_far_above_the_training_loss(self) -> None:
        log = [*steps(lambda n: 0.05 + 0.9**n), *measured([1.4], every=100)]
        assert must(overfitting.RULE.check(run(log))).figures["gap"] == pytest.approx(1.35, abs=0.01)
        assert overfitting.RULE.check(run(log, is_over=False)) is None


class TestLearningRate:
    def test_too_low(self) -> None:
        log = steps(lambda n: 2.0 - 0.001 * n)
        found = must(learning_rate.RULE.check(run(log, train={"learning_rate": 2e-6})))
        assert found.title.endswith("too low") and "--set train.learning_rate=0.0002" in found.command

    def test_a_low_rate_that_learns_is_nobodys_business(self) -> None:
        assert learning_rate.RULE.check(run(steps(), train={"learning_rate": 2e-6})) is None

    def test_the_loss_of_learning_from_rewards_says_nothing(self) -> None:
        policy = run(steps(lambda n: 0.01 * (-1) ** n), train={"learning_rate": 2e-6})
        assert learning_rate.RULE.check(policy) is not None
        assert learning_rate.RULE.check(replace(policy, recipe={**policy.recipe, "task": "grpo"})) is None

    def test_a_usual_rate_is_not_blamed_for_a_flat_loss(self) -> None:
        assert learning_rate.RULE.check(run(steps(lambda n: 2.0))) is None

    def test_early_on_nothing_is_said(self) -> None:
        early = run(steps(lambda n: 2.0, 30), is_over=False, train={"learning_rate": 2e-6})
        assert learning_rate.RULE.check(early) is None
        assert learning_rate.RULE.check(replace(early, is_over=True)) is not None

    @pytest.mark.parametrize(
        ("end", "severity"), [(2.2, "error"), (1.0, "warning")], ids=["stays", "comes back"]
    )
    def test_too_high(self, end: float, severity: str) -> None:
        log = steps([2.0, 2.0, *[4.0] * 10, *[end] * 20], 32)
        found = must(learning_rate.RULE.check(run(log, train={"learning_rate": 2e-2})))
        assert found.title.endswith("too high") and found.severity == severity

    def test_one_bad_batch_is_no_high_rate(self) -> None:
        losses = [decay(n) for n in range(40)]
        losses[10] = 9.0
        assert learning_rate.RULE.check(run(steps(losses, 40), train={"learning_rate": 2e-3})) is None


class TestUpdateSize:
    def test_larger_than_the_weight(self) -> None:
        log = [*steps(), *updates([0.1, 0.4, 0.9, 2.0, 3.0])]
        found = must(update_size.RULE.check(run(log, method={"lora_alpha": 1024})))
        assert found.figures["from_step"] == 4 and "layers.0.q_proj" in found.seen
        assert "--set method.lora_alpha=32" in found.command

    def test_the_first_steps_from_zero_do_not_count(self) -> None:
        assert update_size.RULE.check(run(updates([5.0, 4.0]))) is None

    def test_a_spike_together_with_growth(self) -> None:
        losses = [decay(n) + 0.02 * (n % 3) for n in range(60)]
        losses[40] = 6.0
        sizes = [0.01] * 35 + [0.01, 0.012, 0.015, 0.03, 0.06, 0.08] + [0.08] * 19
        found = must(update_size.RULE.check(run([*steps(losses, 60), *updates(sizes)])))
        assert found.severity == "warning" and "step 41" in found.seen
        assert update_size.RULE.check(run([*steps(losses, 60), *updates([0.05] * 60)])) is None
        assert update_size.RULE.check(run([*steps(decay, 60), *updates(sizes)])) is None


class TestMemory:
    @pytest.mark.parametrize(
        ("changes", "command"),
        [
            ({}, "--set train.per_device_train_batch_size=2 --set train.gradient_accumulation_steps=8"),
            ({"train": {"per_device_train_batch_size": 1}}, "--set train.recompute=everything"),
        ],
        ids=["halved", "recomputed"],
    )
    def test_caught(self, changes: dict[str, Any], command: str) -> None:
        found = must(memory.RULE.check(run([*steps(count=7), {**FAILED, "error": OUT}], **changes)))
        assert found.title.endswith("in backward") and command in found.command and "2 GiB" in found.seen

    @pytest.mark.parametrize(
        ("phase", "command"),
        [("update", "train.optim=adamw_8bit"), ("load", "model.quantization=nf4")],
    )
    def test_the_phase_decides_the_remedy(self, phase: str, command: str) -> None:
        end = {**FAILED, "error": OUT, "phase": phase}
        assert command in must(memory.RULE.check(run([end]))).command

    def test_when_nothing_is_left(self) -> None:
        smallest = {"per_device_train_batch_size": 1}
        log = [{**FAILED, "error": OUT}]
        plan = {"recompute": "everything"}
        found = must(
            memory.RULE.check(
                run(log, plan=plan, train=smallest, model={"quantization": "nf4"}, data={"max_length": 8})
            )
        )
        assert found.command == "" and "graft plan" in found.fix

    def test_another_error_is_another_matter(self) -> None:
        assert memory.RULE.check(run([{**FAILED, "error": {"seen": "No space"}}])) is None

    def test_before_it_happens(self) -> None:
        tight = run([], is_over=False, plan={"free_bytes": 1.05 * 10**9})
        assert must(memory.RULE.check(tight)).severity == "warning"
        assert memory.RULE.check(replace(tight, is_over=True)) is None


class TestRank:
    def test_too_low(self) -> None:
        full = layers([1.0], [2.0])
        log = steps(lambda n: 1.5 + 0.5 * 0.9**n)
        found = must(rank.TOO_LOW.check(run(log, plan={"trainable": 4000}, adapter=full)))
        assert found.figures["tokens_per_parameter"] == pytest.approx(25000 / 4000)
        assert "--set method.r=4" in found.command

    @pytest.mark.parametrize(
        "change",
        [{"plan": {"trainable": 40_000}}, {"adapter": layers([2.0, 1e-4], [1.0, 1e-4])}],
        ids=["room", "directions to spare"],
    )
    def test_high_enough(self, change: dict[str, Any]) -> None:
        log = steps(lambda n: 1.5 + 0.5 * 0.9**n)
        given: dict[str, Any] = {"plan": {"trainable": 4000}, "adapter": layers([1.0], [2.0]), **change}
        assert rank.TOO_LOW.check(run(log, **given)) is None

    def test_still_falling_wants_steps_and_no_rank(self) -> None:
        log = steps(lambda n: 2.0 - 0.015 * n)
        assert rank.TOO_LOW.check(run(log, plan={"trainable": 4000}, adapter=layers([1.0], [2.0]))) is None

    def test_too_high(self) -> None:
        few = [5.0, 4.0, 1.0] + [1e-3] * 29
        found = must(rank.TOO_HIGH.check(run(steps(), adapter=layers(few, few))))
        assert found.severity == "note" and "--rank 4" in found.command
        assert rank.TOO_HIGH.check(run(steps(), adapter=layers(few, [1.0] * 32))) is None
        assert rank.TOO_HIGH.check(run(steps(), adapter=layers([5.0] + [1e-3] * 7))) is None


class TestGradients:
    def test_while_it_runs(self) -> None:
        log = updates([0.1] * 4, moved=0.75, still=["layers.3.lora_B"])
        assert "layers.3.lora_B" in must(gradients.RULE.check(run(log))).seen
        assert gradients.RULE.check(run(log[:2])) is None

    def test_layers_that_did_not_run_are_said_elsewhere(self) -> None:
        said = {"kind": "notice", "text": "2 of 8 parameters got no gradient, as their layers did not run"}
        assert gradients.RULE.check(run([said, *updates([0.1] * 4, moved=0.75, still=["x"])])) is None

    def test_afterwards(self) -> None:
        found = must(gradients.RULE.check(Evidence(adapter=layers([1.0, 0.5], [0.0, 0.0]))))
        assert found.figures["still"] == 0.5 and "layers.1.q_proj" in found.seen
        assert gradients.RULE.check(Evidence(adapter=layers([0.0], [0.0]))) is None, "another failure"


class TestFinite:
    def test_float16(self) -> None:
        log = run([REFUSED], plan={"dtype": "float16"})
        assert "4, 9" in must(finite.OVERFLOW.check(log)).seen
        assert finite.RULE.check(log) is None, "one of the two"

    def test_float16_that_holds(self) -> None:
        assert finite.OVERFLOW.check(run(steps(), plan={"dtype": "float16"})) is None

    def test_a_base_in_few_bits_computes_in_another_type(self) -> None:
        packed = run([REFUSED], model={"quantization": "nf4", "compute_dtype": "float16"})
        assert "model.compute_dtype=bfloat16" in must(finite.OVERFLOW.check(packed)).command

    def test_in_another_type(self) -> None:
        assert "graft check rows.jsonl" in must(finite.RULE.check(run([REFUSED]))).command
        fast = run([REFUSED], train={"learning_rate": 1.0})
        assert "train.learning_rate=0.0002" in must(finite.RULE.check(fast)).command

    def test_an_adapter_with_nans(self) -> None:
        broken = AdapterFacts(not_finite=("q_proj.lora_A.weight",))
        found = must(finite.RULE.check(Evidence(adapter=broken)))
        assert "q_proj.lora_A.weight" in found.seen and found.confidence == 0.99

    def test_a_window_without_targets_is_something_else(self) -> None:
        empty = {**REFUSED, "why": "no target token in the whole window"}
        assert finite.RULE.check(run([empty])) is None
