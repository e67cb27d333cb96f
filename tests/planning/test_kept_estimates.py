"""Estimates made before: found again, and made anew where something else is asked or a file is damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from closed_forms import machine, rows

from graftlm.core.cache import VARIABLE
from graftlm.planning import kept_estimates
from graftlm.planning.base_facts import base_facts
from graftlm.planning.estimates import MemoryEstimate, Part, Phase
from graftlm.planning.kept_estimates import FOLDER, estimate_of, kept_memory
from graftlm.training.recipe import make_recipe

FACTS, CARD = base_facts("sprout"), machine(8)
RECIPE = make_recipe({"model": "sprout", "data": "rows.jsonl"})
WORKLOAD = rows(50, 40).workload(RECIPE)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The policies that were estimated and not read."""
    found: list[str] = []

    def estimate(*_: object, recompute: str) -> MemoryEstimate:
        found.append(recompute)
        return MemoryEstimate((Phase("load", (Part("weights", 7.0),)),), ("a note",))

    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr(kept_estimates, "estimate_memory", estimate)
    return found


def test_the_same_question_is_answered_from_the_file(asked: list[str]) -> None:
    first = kept_memory(RECIPE, FACTS, WORKLOAD, CARD, recompute="nothing")
    more_steps = replace(WORKLOAD, steps=WORKLOAD.steps + 1)
    assert kept_memory(RECIPE, FACTS, more_steps, CARD, recompute="nothing") == first
    assert asked == ["nothing"]


def test_another_question_is_estimated(asked: list[str]) -> None:
    kept_memory(RECIPE, FACTS, WORKLOAD, CARD, recompute="nothing")
    kept_memory(RECIPE, FACTS, WORKLOAD, CARD, recompute="cheap")
    kept_memory(RECIPE, FACTS, WORKLOAD, machine(9), recompute="cheap")
    kept_memory(RECIPE, FACTS, replace(WORKLOAD, batch_tokens=3), CARD, recompute="cheap")
    other = make_recipe({"model": "sprout", "data": "rows.jsonl", "method": {"type": "lora", "r": 2}})
    kept_memory(other, FACTS, WORKLOAD, CARD, recompute="cheap")
    assert len(asked) == 5


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"phases": 3}', '{"phases": [{}], "notes": []}'])
def test_a_damaged_file_is_estimated_anew(damage: str, asked: list[str], tmp_path: Path) -> None:
    kept_memory(RECIPE, FACTS, WORKLOAD, CARD, recompute="nothing")
    (file,) = (tmp_path / FOLDER).iterdir()
    file.write_text(damage)
    assert kept_memory(RECIPE, FACTS, WORKLOAD, CARD, recompute="nothing").peak == 7
    assert len(asked) == 2 and file.read_text() != damage


def test_a_folder_that_cannot_be_written_is_no_error(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    assert kept_memory(RECIPE, FACTS, WORKLOAD, CARD, recompute="nothing").peak == 7


def test_the_oldest_go(asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_estimates, "MOST", 2)
    for tokens in (10, 20, 30, 40):
        kept_memory(RECIPE, FACTS, replace(WORKLOAD, batch_tokens=tokens), CARD, recompute="nothing")
    assert len(list((tmp_path / FOLDER).iterdir())) == 2


def test_an_estimate_is_read_as_it_was() -> None:
    whole = MemoryEstimate((Phase("load", (Part("weights", 7.5), Part("rest", 0.0))),), ("one", "two"))
    assert estimate_of(whole.as_dict()) == whole
