"""Facts of several tasks as those of one: counts add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from graftlm.diagnosis.facts.data import GROUPS, DataFacts, Facts

LARGEST = frozenset({"limit", "percentile_95", "wanted", "context"})
"""Lengths: the largest of all tasks."""


def combined(found: Sequence[DataFacts]) -> DataFacts:
    """One for all.

    >>> from graftlm.diagnosis.facts.data import Overlap
    >>> both = [DataFacts(overlap=Overlap(90, 10, 0, 1, 2)), DataFacts(overlap=Overlap(50, 5, 1, 0, 0))]
    >>> combined(both).overlap
    Overlap(train=140, held_out=15, repeated=1, leaked=1, touched=2, pairs=())
    """
    groups = {name: [getattr(one, name) for one in found] for name in GROUPS}
    return DataFacts(
        **{name: _group([one for one in group if one is not None]) for name, group in groups.items()}
    )


def _group(found: Sequence[Facts]) -> Any:
    if len(found) < 2:
        return next(iter(found), None)
    values = {field.name: [getattr(one, field.name) for one in found] for field in fields(found[0])}
    return type(found[0])(**{name: _value(name, given) for name, given in values.items()})


def _value(name: str, given: Sequence[Any]) -> Any:
    first = given[0]
    if isinstance(first, bool):
        return any(given)
    if isinstance(first, int):
        return max(given) if name in LARGEST else sum(given)
    return next((value for value in given if value), first)
