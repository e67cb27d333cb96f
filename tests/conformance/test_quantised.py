"""Every method of Graft on a quantised base, in every property that could feel what weights are stored in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from graftlm.methods.table import METHODS
from graftlm.testing.models import QUANTISED
from graftlm.testing.properties import PROPERTIES, why_not
from graftlm.testing.rows import ROWS
from graftlm.testing.suite import ON_QUANTISED, Cell

LEFT_OUT = {
    "joined": "virtual tokens stand beside the layers",
    "refuses_damage": "about files, which hold nothing of the base",
    "contexts": "about the adapters' state, which holds nothing of the base",
    "generates": "calls layers as a forward pass does, which is what other properties compare",
    "generates_routed": "the same",
    "checkpointing_reentrant": "recomputes as `checkpointing` does",
    "switches_compiled": "seconds per cell, and switching does not touch the base",
}
"""Properties that run here on dense bases only, and why. `python -m graftlm.testing` runs all of them."""
COMPILED = ("lora", "dora", "ia3")
"""Rows that are compiled, at seconds per cell: those that call a quantised layer in different ways."""
QUICK = ("acts", "merge", "detach")
"""What runs by default, for the first row of each type. The rest runs with the slow tests."""

OTHER_KINDS = tuple(kind for kind in QUANTISED if kind not in ON_QUANTISED)
OTHER_ROWS = ("lora", "dora", "ia3", "lora, token rows", "bottleneck, houlsby")
OTHER_PROPERTIES = ("merge", "unmerge_exact", "detach", "saved", "routed_training")
"""On further schemes and architectures: what reads weights, replaces them, and keeps them for gradients."""


def cells() -> Iterator[object]:
    seen: set[str] = set()
    for name, subject in ROWS.items():
        type_name = subject.case("bert").config.peft_type
        is_first = type_name not in seen or name == "dora"
        seen.add(type_name)
        wanted = [
            key for key in PROPERTIES if key not in LEFT_OUT and (key != "compiles" or name in COMPILED)
        ]
        for cell in subject.cells(ON_QUANTISED, wanted):
            is_quick = is_first and cell.property in (*QUICK, "refusal")
            yield _parameter(name, cell, is_quick=is_quick)
        if name in OTHER_ROWS:
            for cell in subject.cells(OTHER_KINDS, OTHER_PROPERTIES):
                yield _parameter(name, cell, is_quick=False)


def _parameter(name: str, cell: Cell, *, is_quick: bool) -> object:
    marks = [] if is_quick else [pytest.mark.slow]
    return pytest.param(cell, id=f"{name}-{cell.case.kind}-{cell.property}", marks=marks)


@pytest.mark.parametrize("cell", [*cells()])
def test_cell(cell: Cell) -> None:
    cell.check()


def test_what_is_left_out_exists() -> None:
    assert set(LEFT_OUT) < set(PROPERTIES)


def test_every_method_goes_on_a_quantised_base() -> None:
    """But for tuning of the quantised weights themselves."""
    taken = {row.case("llama").config.peft_type for row in ROWS.values() if not row.refusal("llama-nf4")}
    assert taken == set(METHODS)


@pytest.mark.parametrize("name", ["lora", "dora", "pissa", "ia3", "lora, token rows"])
def test_a_quantised_base_is_merged_and_not_refused(name: str) -> None:
    assert why_not("merge", ROWS[name].case("llama-nf4")) == ""
