"""Budgets as people type them."""

from __future__ import annotations

import pytest

from graftlm.core.errors import UsageError
from graftlm.search.budget import Budget, Spent


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("24", Budget(trials=24)),
        ("24 trials", Budget(trials=24)),
        ("30m", Budget(seconds=1800)),
        ("1.5h", Budget(seconds=5400)),
        ("90 s", Budget(seconds=90)),
        ("500k tokens", Budget(tokens=500_000)),
        ("2M tokens, 10", Budget(trials=10, tokens=2_000_000)),
    ],
)
def test_what_people_type(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", ["", "soon", "2.5", "-3", "3 weeks", "4, 5", "10 M"])
def test_what_cannot_be_read(text: str) -> None:
    with pytest.raises(UsageError, match="Cannot read"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["0", "0s", "0 tokens"])
def test_nothing_is_too_little(text: str) -> None:
    with pytest.raises(UsageError, match="allows nothing"):
        Budget.parse(text)


def test_every_limit_holds() -> None:
    budget = Budget(trials=3, seconds=10)
    assert budget.allows(Spent(2, 5.0), Spent(1, 5.0))
    assert not budget.allows(Spent(3, 0.0), Spent(1, 0.0))
    assert not budget.allows(Spent(1, 9.0), Spent(1, 2.0))
