"""Whether compiling pays: predicted from numbers that a run knows before it starts."""

from __future__ import annotations

from typing import Any

import pytest

from graftlm.training.compile_choice import MARGIN, SECONDS_TO_COMPILE, choose_compile, measured_gain
from graftlm.training.train_section import TrainSection

RUN: dict[str, Any] = {"gain": 0.04, "tokens_per_step": 2048, "parameters": 10**8}


def test_long_runs_compile_and_short_ones_do_not() -> None:
    short, long = (choose_compile("auto", steps=steps, **RUN) for steps in (10, 100_000))
    assert not short.compiles and long.compiles
    assert long.saved_seconds >= MARGIN * SECONDS_TO_COMPILE > short.saved_seconds
    assert "10 steps" in short.why and "compiled (predicted" in long.text


@pytest.mark.parametrize(("gain", "why"), [(None, "not measured"), (-0.08, "8% slower")])
def test_no_gain_is_left_alone(gain: float | None, why: str) -> None:
    found = choose_compile("auto", steps=10**6, **{**RUN, "gain": gain})
    assert not found.compiles and why in found.why and found.saved_seconds <= 0


@pytest.mark.parametrize("place", [("cuda", "bfloat16"), ("cpu", "float32")])
def test_what_was_not_measured(place: tuple[str, str]) -> None:
    assert measured_gain(*place) is None


def test_the_recipe_decides() -> None:
    assert choose_compile("on", steps=1, **RUN).compiles
    assert not choose_compile("off", steps=10**6, **RUN).compiles
    found = choose_compile("auto", steps=10**6, obstacle="its layers are streamed", **RUN)
    assert not found.compiles and found.why == "its layers are streamed"


def test_yaml_reads_on_and_off_as_booleans() -> None:
    asked = [TrainSection.model_validate({"compile": value}).compile for value in (True, False, "auto")]
    assert asked == ["on", "off", "auto"]
