"""A comparison's figures for machines: of every measure the values with their 95 % intervals."""

from __future__ import annotations

from typing import Any

from graftlm.evaluation.compare import Comparison
from graftlm.evaluation.metrics import Interval


def ends(interval: Interval) -> list[float]:
    """[value, low, high]."""
    return [interval.value, interval.low, interval.high]


def compared(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """By name: what the task is judged by first, then exact match where there were answers, then the loss.

    Each has `before`, `after` and `difference` as [value, low, high]; exact match has McNemar's `p_value` in
    place of the interval of a difference.
    """
    loss, match = comparison.loss, comparison.exact_match
    found: dict[str, dict[str, Any]] = {
        item.name: {
            "before": ends(item.before),
            "after": ends(item.after),
            "difference": ends(item.difference),
        }
        for item in comparison.measures
    }
    if match is not None:
        found["exact_match"] = {
            "before": ends(match.before.interval),
            "after": ends(match.after.interval),
            "p_value": match.p_value,
        }
    found["loss"] = {
        "before": ends(loss.before),
        "after": ends(loss.after),
        "difference": ends(loss.difference),
    }
    return found
