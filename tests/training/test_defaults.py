"""Values nobody wrote fit base and data; values somebody wrote stay."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftlm.core.errors import ConfigError
from graftlm.methods.lora import LoraConfig
from graftlm.methods.prompt import PromptTuningConfig
from graftlm.training.defaults import (
    ROWS_PER_STEP,
    TOKENS_PER_PASS,
    fitted,
    fitted_length,
    rate_for,
    rate_for_width,
    room_beside,
)
from graftlm.training.recipe import Recipe, make_recipe

LEAST = {"model": "sprout", "data": "rows.jsonl"}


def recipe(**train: Any) -> Recipe:
    return make_recipe({**LEAST, "train": train})


@given(
    written=st.fixed_dictionaries(
        {},
        optional={
            "learning_rate": st.floats(1e-6, 1e-2),
            "per_device_train_batch_size": st.integers(1, 64),
            "gradient_accumulation_steps": st.integers(1, 64),
            "num_train_epochs": st.floats(0.5, 9),
            "seed": st.integers(0, 99),
        },
    ),
    lengths=st.lists(st.integers(2, 1024), min_size=1, max_size=50),
    width=st.integers(16, 16384),
    packing=st.booleans(),
)
def test_what_was_written_is_never_changed(
    written: dict[str, Any], lengths: list[int], width: int, packing: bool
) -> None:
    asked = make_recipe({**LEAST, "train": written}, [f"data.packing={str(packing).lower()}"])
    found, notes = fitted(asked, lengths, width)
    values = found.train.model_dump()
    assert {key: values[key] for key in written} == written
    if "learning_rate" not in written:
        assert found.train.learning_rate == rate_for_width(width)
    assert (found.model, found.data, found.method) == (asked.model, asked.data, asked.method)
    unchanged = asked.train.model_dump() == values
    assert bool(notes) or unchanged, "every change is said"


@given(length=st.integers(2, 1024), count=st.integers(1, 500), window=st.integers(64, 4096))
def test_a_step_holds_about_sixteen_rows(length: int, count: int, window: int) -> None:
    """As far as whole windows allow: one window may hold more, and never is a step empty."""
    length = min(length, window)
    asked = make_recipe(LEAST, [f"data.max_length={window}"])
    train = fitted(asked, [length] * count, 1024)[0].train
    windows = train.per_device_train_batch_size * train.gradient_accumulation_steps
    rows = windows * max(1.0, window / length)
    assert 1 <= train.per_device_train_batch_size <= max(1, TOKENS_PER_PASS // window)
    assert windows <= ROWS_PER_STEP + 3
    assert rows >= ROWS_PER_STEP * 0.6
    if windows > 4:
        assert rows <= ROWS_PER_STEP * 1.5


def test_a_task_has_a_rate_of_its_own() -> None:
    plain, _ = fitted(recipe(), [10], 256)
    scaled, notes = fitted(recipe(), [10], 256, 0.3)
    assert scaled.train.learning_rate == pytest.approx(0.3 * plain.train.learning_rate)
    assert any("5.4e-04" in note for note in notes)


def test_rates_fall_with_width_and_stay_in_bounds() -> None:
    rates = [rate_for_width(2**power) for power in range(4, 16)]
    assert rates == sorted(rates, reverse=True)
    assert rate_for_width(4096) == 2e-4
    assert max(rates) == 5e-3
    assert rate_for_width(8192) < 2e-4


@given(lengths=st.lists(st.integers(2, 9000), min_size=1, max_size=20))
def test_rows_that_are_not_packed_fill_a_pass_too(lengths: list[int]) -> None:
    asked = make_recipe(LEAST, ["data.packing=false", "data.max_length=9000"])
    found, notes = fitted(asked, lengths, 1024)
    size, passes = found.train.per_device_train_batch_size, found.train.gradient_accumulation_steps
    assert size == 1 or size * max(lengths) <= TOKENS_PER_PASS
    assert ROWS_PER_STEP - 3 <= size * passes <= ROWS_PER_STEP + 3
    assert notes[-1] == f"{size * passes} rows per step, {size} at a time"


def test_a_fitted_recipe_is_fitted_no_further() -> None:
    """The run's recipe.yaml holds every value: repeating it on other data changes none of them."""
    once, _ = fitted(recipe(), [20] * 90, 256)
    twice, notes = fitted(make_recipe(once.model_dump(mode="json")), [500] * 9, 4096)
    assert twice.train == once.train
    assert notes == []


def test_the_window_of_a_short_context() -> None:
    asked = recipe()
    assert fitted_length(asked, 512).data.max_length == 512
    assert fitted_length(asked, 4096) is asked
    assert fitted_length(asked, None) is asked
    short = make_recipe(LEAST, ["data.max_length=256"])
    assert fitted_length(short, 512) is short
    with pytest.raises(ConfigError, match=r"data\.max_length is 513, but the context of this base is 512"):
        fitted_length(make_recipe(LEAST, ["data.max_length=513"]), 512)


def test_what_is_said_of_a_step_is_what_is_set() -> None:
    for length in range(2, 64):
        train, notes = fitted(make_recipe(LEAST, ["data.max_length=64"]), [length] * 40, 1024)
        windows = train.train.per_device_train_batch_size * train.train.gradient_accumulation_steps
        name = "window" if windows == 1 else "windows"
        assert notes[-1].startswith(f"{windows} {name} of 64 tokens (about {windows * 64 / length:.0f} rows)")


def test_virtual_tokens_take_their_room_from_the_text() -> None:
    assert room_beside(PromptTuningConfig(num_virtual_tokens=20), 512) == 492
    assert room_beside(LoraConfig(), 512) == 512
    assert room_beside(PromptTuningConfig(), None) is None
    with pytest.raises(ConfigError, match="leave 0 of 16 positions"):
        room_beside(PromptTuningConfig(num_virtual_tokens=20), 16)


def test_a_method_has_a_rate_of_its_own() -> None:
    for method in (LoraConfig(), PromptTuningConfig()):
        assert rate_for(method, 1024) == pytest.approx(rate_for_width(1024) * method.rate_scale, rel=0.05)
