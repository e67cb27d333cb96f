"""Every method of Graft, on every kind of model, in every property: one test per cell of the matrix."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from graftlm.methods.table import METHODS
from graftlm.testing.properties import PROPERTIES, why_not
from graftlm.testing.rows import ROWS
from graftlm.testing.running import compiles_with_inductor
from graftlm.testing.suite import MATRIX, Cell

MERGEABLE = ("LORA", "TRAINABLE_TOKENS", "IA3", "FULL")
FOUR = ("llama", "gpt2", "bert", "t5")
"""Kinds of model that differ most. By default the first row of each type goes through these; every other row
through one of them, in turn. What is left runs with the slow tests."""
SECONDS = {"compiles": None, "switches_compiled": ("lora", "prefix")}
"""Properties that take seconds per cell: by default on Llama only, for the first rows (None) or for these."""


def cells() -> Iterator[object]:
    seen: set[str] = set()
    for number, (name, subject) in enumerate(ROWS.items()):
        type_name = subject.case("bert").config.peft_type
        is_first = type_name not in seen or name == "dora"
        seen.add(type_name)
        quick = FOUR if is_first else (FOUR[number % len(FOUR)],)
        for cell in subject.cells():
            kind, wanted = cell.case.kind, cell.property
            is_quick = kind in quick
            if wanted in SECONDS:
                is_quick = kind == "llama" and (
                    is_first if SECONDS[wanted] is None else name in SECONDS[wanted]
                )
            yield pytest.param(
                cell, id=f"{name}-{kind}-{wanted}", marks=[] if is_quick else [pytest.mark.slow]
            )


@pytest.mark.parametrize("cell", [*cells()])
def test_cell(cell: Cell) -> None:
    cell.check()


def test_every_method_of_the_table_has_a_row() -> None:
    configs = [subject.case(kind).config for subject in ROWS.values() for kind in MATRIX]
    tested = {config.peft_type for config in configs}
    assert set(METHODS) == tested, "add a row to graftlm.testing.rows"


@pytest.mark.parametrize(
    "name", [name for name, row in ROWS.items() if row.case("bart").config.peft_type in MERGEABLE]
)
def test_a_change_of_weights_is_merged_and_not_refused(name: str) -> None:
    assert why_not("merge", ROWS[name].case("bart")) == ""


def test_every_property_says_what_it_is() -> None:
    assert all(len(wanted.description) > 30 for wanted in PROPERTIES.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "dora", "prefix"])
def test_the_code_that_inductor_generates_gives_the_same(name: str) -> None:
    compiles_with_inductor(ROWS[name].case("llama"))
