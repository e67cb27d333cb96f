"""What plans promise of GPUs is of the size that others have published."""

from __future__ import annotations

import statistics

from planning_published import ROWS, promised


def test_plans_promise_what_was_published() -> None:
    ratios = [promised(row) / row.rate for row in ROWS]
    assert len(ratios) >= 15
    assert min(ratios) > 0.5
    assert max(ratios) < 2.0
    assert 0.8 < statistics.median(ratios) < 1.25
