"""Rewards for the recipe beside this file: a function of what was written, called as TRL calls its own."""

from __future__ import annotations

from typing import Any


def close(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 for the right number, less the further away a number is, 0 for no number at all.

    `answer` is a column of the data; every other one would come by its name too.
    """
    return [nearness(text, right) for text, right in zip(completions, answer, strict=True)]


def nearness(text: str, right: str) -> float:
    """How near a number in digits is to another one, from 0 to 1."""
    written = text.strip()
    if not written.isdecimal():
        return 0.0
    return 1 / (1 + abs(int(written) - int(right)))
