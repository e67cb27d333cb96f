"""The history of runs: what it corrects, how far, and that nothing in its file can break a plan."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from closed_forms import machine
from hypothesis import given
from hypothesis import strategies as st

from graftlm.core.cache import VARIABLE
from graftlm.planning.estimates import MemoryEstimate, Part, Phase, TimeEstimate
from graftlm.planning.history import (
    FILE,
    FURTHEST,
    MOST,
    Correction,
    Record,
    correction,
    machine_key,
    read_records,
    remember,
)

HERE = machine(24)
RUN = Record(machine_key(HERE), "sprout", "lora", "none", 100.0, 120.0, 1.0, 0.8, "2026-01-31")
KIND = {"base": "sprout", "method": "lora", "storage": "none"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path / FILE


def test_what_is_remembered_is_read_back() -> None:
    remember(RUN)
    remember(replace(RUN, base="other"))
    assert read_records() == [RUN, replace(RUN, base="other")]


def test_no_history_is_no_correction_and_says_nothing() -> None:
    found = correction([], HERE, **KIND)
    assert (found.memory, found.step, found.note) == (1.0, 1.0, "")


def test_runs_of_one_kind_draw_a_prediction_towards_what_they_took() -> None:
    once, often = correction([RUN], HERE, **KIND), correction([RUN] * 9, HERE, **KIND)
    assert once.memory == pytest.approx(math.sqrt(1.2))  # half way, on a logarithmic scale
    assert 1.0 < once.memory < often.memory < 1.2 and 0.8 < often.step < once.step < 1.0
    assert "9 earlier runs" in often.note and "memory x 1.18" in often.note


def test_other_runs_count_for_little_however_many_there_are() -> None:
    others = [replace(RUN, base=f"base {n}") for n in range(100)]
    found = correction(others, HERE, **KIND)
    assert found.memory == pytest.approx(math.sqrt(1.2)) and found.runs == 100
    exact = replace(RUN, actual_peak=100.0, actual_step=1.0)
    assert correction([*others, *[exact] * 8], HERE, **KIND).memory < 1.02


def test_runs_on_another_machine_do_not_count() -> None:
    assert correction([RUN], machine(25), **KIND).runs == 0


@given(st.lists(st.tuples(st.floats(1e-9, 1e9), st.floats(1e-9, 1e9)), max_size=20))
def test_a_correction_is_never_absurd(pairs: list[tuple[float, float]]) -> None:
    records = [replace(RUN, actual_peak=peak, actual_step=step) for peak, step in pairs]
    found = correction(records, HERE, **KIND)
    for factor in (found.memory, found.step):
        assert 1 / FURTHEST * 0.999 <= factor <= FURTHEST * 1.001


def test_a_correction_scales_every_part_of_memory_and_only_the_steps_of_time() -> None:
    memory = MemoryEstimate(
        (Phase("load", (Part("weights", 10.0),)), Phase("backward", (Part("weights", 30.0),)))
    )
    assert Correction(1.5, 2.0, 3).of_memory(memory).peak == 45
    time = TimeEstimate((Part("load", 5.0), Part("steps", 10.0)), 0.1, (Part("attention", 0.1),))
    scaled = Correction(1.5, 2.0, 3).of_time(time)
    assert (scaled.seconds, scaled.step_seconds, scaled.step_parts[0].amount) == (25.0, 0.2, 0.2)
    calibrated = replace(time, is_calibrated=True)
    assert Correction(1.5, 2.0, 3).of_time(calibrated) is calibrated


def test_damaged_lines_are_passed_over(cache: Path) -> None:
    remember(RUN)
    bad = ["", "{", "[1]", '{"machine": 3}', json.dumps({**asdict(RUN), "actual_peak": -1.0}), "null"]
    cache.write_text(
        "\n".join([*bad, cache.read_text().strip(), json.dumps({**asdict(RUN), "more": 1})]) + "\n"
    )
    assert read_records() == [RUN]
    cache.write_bytes(b"\xff\xfe\x00")
    assert read_records() == []
    remember(RUN)
    assert read_records() == [RUN]


def test_figures_that_are_none_are_not_kept() -> None:
    for wrong in (0.0, -1.0, math.nan, math.inf):
        remember(replace(RUN, actual_step=wrong))
    assert read_records() == []


def test_a_folder_that_cannot_be_written_is_no_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = cache.with_name("blocked")
    blocked.write_text("a file, where a folder should be")
    monkeypatch.setenv(VARIABLE, str(blocked))
    remember(RUN)
    assert read_records() == []


def test_the_oldest_runs_go(cache: Path) -> None:
    lines = [json.dumps(asdict(replace(RUN, day=str(n)))) for n in range(MOST)]
    cache.write_text("\n".join(lines) + "\n")
    remember(RUN)
    kept = read_records()
    assert len(kept) == MOST and kept[0].day == "1" and kept[-1] == RUN
