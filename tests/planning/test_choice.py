"""Choices: what is first and why, what is turned down and what would help, what is kept as it was written."""

from __future__ import annotations

from typing import Any

import pytest
from closed_forms import ESTIMATORS, machine, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from graftlm.core.errors import ConfigError
from graftlm.planning.base_facts import base_facts
from graftlm.planning.choice import choose
from graftlm.planning.fitting import BATCH, USABLE
from graftlm.planning.option import Choice
from graftlm.planning.quality import GRADES, STANDINGS, STORAGE_CHARGE
from graftlm.planning.requirements import Requirements
from graftlm.planning.rows import RowLengths
from graftlm.planning.written import changed, written
from graftlm.training.recipe import Recipe, make_recipe

BASE = "meta-llama/Llama-3.2-1B"  # 1.24 B parameters, 2.3 GiB in 16 bits


def plan(
    gib: float,
    lengths: RowLengths | None = None,
    price: float | None = None,
    base: str = BASE,
    **sections: Any,
) -> Choice:
    wanted = sections.pop("wanted", Requirements())
    recipe = make_recipe({"model": base, "data": "rows.jsonl", **sections})
    place = machine(gib, price=price)
    return choose(recipe, wanted, base_facts(base), lengths or rows(), place, estimators=ESTIMATORS)


def names(choice: Choice) -> list[str]:
    return [f"{option.candidate.name} {option.candidate.storage}" for option in choice.options]


def test_where_everything_fits_the_first_option_is_what_a_recipe_means_that_says_nothing() -> None:
    best = plan(80).best
    assert best is not None and best.label == "lora r=16" and not best.candidate.changes
    assert written(best.recipe) == {"model": {"name": BASE}, "data": {"path": "rows.jsonl"}}
    assert best.fit.recompute == "nothing" and best.trainable == 11_272_192


def test_a_base_that_does_not_fit_is_quantised_and_the_reason_says_from_what_to_what() -> None:
    choice = plan(2.2)
    assert choice.best is not None and choice.best.candidate.storage == "nf4"
    assert any("as it is stored the run would need" in reason for reason in choice.best.reasons)
    turned_down = {item.label: item for item in choice.rejected}
    assert (
        "lora r=16" in next(iter(turned_down)) and "--set model.quantization=nf4" in choice.rejected[0].remedy
    )


def test_nothing_fits_and_the_nearest_comes_first_with_what_would_hold_it() -> None:
    choice = plan(0.2, base="meta-llama/Llama-3.1-8B")
    assert choice.best is None
    needs = [item.needed_bytes for item in choice.rejected]
    assert None not in needs and needs == sorted(needs, key=lambda need: need or 0)
    assert all(item.remedy for item in choice.rejected)


def test_a_base_that_fits_in_no_storage_is_streamed_where_that_fits() -> None:
    choice = plan(2.0, base="meta-llama/Llama-3.1-8B")
    assert choice.best is not None and choice.best.recipe.model.placement == "host"
    assert any("in every pass" in reason for reason in choice.best.reasons)


def test_what_was_written_is_kept() -> None:
    choice = plan(80, method={"type": "ia3"}, model={"name": BASE, "quantization": "int8"})
    assert {option.recipe.method.type for option in choice.options} == {"ia3"}
    assert {option.recipe.model.quantization for option in choice.options} == {"int8"}
    batch = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}
    for option in plan(80, train=batch).options:
        assert [getattr(option.fit.effective.train, name) for name in BATCH] == [3, 5]


def test_a_method_that_goes_only_with_a_dense_base_is_left_out_beside_a_written_storage() -> None:
    assert "full" not in " ".join(names(plan(80, model={"name": BASE, "quantization": "nf4"})))


@settings(max_examples=8, deadline=None)
@given(gib=st.floats(1.0, 40.0), tokens=st.integers(20, 900), count=st.integers(40, 900))
def test_every_option_keeps_its_limits_and_the_rows_of_a_step(gib: float, tokens: int, count: int) -> None:
    lengths = rows(count, tokens)
    choice = plan(gib, lengths)
    for option in choice.options:
        assert option.fit.memory.peak <= USABLE * gib * 2**30 + 1
        usual = lengths.effective(option.recipe, base_facts(BASE)).train
        assert (
            _rows(option.fit.effective)
            == usual.per_device_train_batch_size * usual.gradient_accumulation_steps
        )
        assert changed(option.recipe, {}) == option.recipe


def _rows(recipe: Recipe) -> int:
    return recipe.train.per_device_train_batch_size * recipe.train.gradient_accumulation_steps


@settings(max_examples=6, deadline=None)
@given(gib=st.floats(1.0, 20.0))
def test_more_memory_never_takes_an_option_away(gib: float) -> None:
    small, large = plan(gib), plan(2 * gib)
    first = {option.candidate.name for option in small.options}
    if all(option.recipe.model.placement == "resident" for option in small.options):
        assert first <= {option.candidate.name for option in large.options}


def test_options_are_in_order_of_grade_and_then_of_charged_time() -> None:
    keys = [
        (
            GRADES.index(option.candidate.standing.quality.grade),
            option.fit.time.seconds
            * option.candidate.standing.charge
            * STORAGE_CHARGE[option.candidate.storage],
        )
        for option in plan(80).options
    ]
    assert keys == sorted(keys)


def test_the_quickest_way_that_fits_is_taken() -> None:
    """With the closed forms: half the batch costs less than computing norms again."""
    roomy, tight = plan(80).best, plan(3.0).best
    assert roomy is not None and tight is not None and tight.candidate.name == "lora"
    assert tight.fit.time.seconds >= roomy.fit.time.seconds
    assert tight.fit.recompute != "nothing" or _size(tight.fit.effective) < _size(roomy.fit.effective)


def _size(recipe: Recipe) -> int:
    return recipe.train.per_device_train_batch_size


def test_latency_leaves_what_can_be_merged() -> None:
    choice = plan(80, wanted=Requirements(is_latency_critical=True))
    assert choice.options and all(option.candidate.standing.merges for option in choice.options)
    assert [item.label for item in choice.rejected] == ["bottleneck, prefix 20, prompt 20"]
    assert choice.rejected[0].remedy == "--method lora"


def test_several_tasks_share_a_base_only_with_adapters() -> None:
    choice = plan(80, wanted=Requirements(tasks=10))
    assert "full none" not in names(choice)
    assert any("10 whole models" in item.why and item.remedy == "--method lora" for item in choice.rejected)
    assert choice.best is not None and any("10 adapters" in reason for reason in choice.best.reasons)


def test_few_examples_are_held_back() -> None:
    best = plan(80, rows(80)).best
    assert best is not None and best.candidate.name == "lora, held back"
    config = best.recipe.method.as_dict()
    assert (config["r"], config["lora_dropout"], best.recipe.train.early_stopping_patience) == (8, 0.05, 3)
    named = plan(80, rows(80), method={"type": "lora", "r": 32}).best
    assert named is not None and named.recipe.method.as_dict()["r"] == 32


def test_quality_first_takes_the_highest_band() -> None:
    choice = plan(80, wanted=Requirements(is_quality_first=True))
    middles = [option.candidate.standing.quality.middle for option in choice.options]
    assert names(choice)[0] == "full none" and middles == sorted(middles, reverse=True)
    assert "lora, eva none" in names(choice)


def test_a_deadline_turns_down_what_takes_longer_and_says_how_many_steps_are_possible() -> None:
    whole = plan(80).best
    assert whole is not None
    limit = 0.6 * whole.fit.time.seconds
    choice = plan(80, wanted=Requirements(deadline_seconds=limit))
    assert not choice.options
    remedy = next(item.remedy for item in choice.rejected if "lora r=16" in item.label)
    steps = int(remedy.split("max_steps=")[1].split()[0])
    shorter = plan(80, train={"max_steps": steps}).best
    assert shorter is not None and 0.95 * limit < shorter.fit.time.seconds <= limit


def test_a_budget_is_time_at_a_price() -> None:
    whole = plan(80, price=3600.0).best
    assert whole is not None and whole.cost == pytest.approx(whole.fit.time.seconds)
    choice = plan(80, price=3600.0, wanted=Requirements(budget=1.01 * whole.fit.time.seconds))
    assert choice.best is not None and choice.best.label == whole.label
    assert any("more than the budget" in item.why for item in choice.rejected)


def test_a_length_beyond_the_context_is_said_of_the_recipe_itself() -> None:
    with pytest.raises(ConfigError, match="context of this base"):
        plan(80, data={"path": "rows.jsonl", "max_length": 200_000})


def test_an_adapter_too_small_for_the_data_is_said() -> None:
    many = RowLengths((1000,) * 40_000, (900,) * 40_000, (1000,) * 50)
    best = plan(80, many).best
    assert best is not None and any("a higher rank may gain" in reason for reason in best.reasons)


def test_the_same_question_has_the_same_answer() -> None:
    assert plan(6.0).as_dict() == plan(6.0).as_dict()


def test_every_method_of_a_plan_has_a_standing_with_a_source() -> None:
    assert all(standing.quality.source for standing in STANDINGS.values())
    assert {option.candidate.name for option in plan(80).options} <= STANDINGS.keys()
