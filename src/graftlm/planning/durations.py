"""Spans of time as people write them."""

from __future__ import annotations

import re

from graftlm.core.errors import ConfigError

_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(min|[smhd])")


def parse_seconds(text: str | float) -> float:
    """Seconds of a span of time.

    >>> parse_seconds("1h30m"), parse_seconds("90 min"), parse_seconds("2d"), parse_seconds(45)
    (5400.0, 5400.0, 172800.0, 45.0)

    Raises:
        ConfigError: it is no span above 0.
    """
    if isinstance(text, int | float):
        seconds = float(text)
    else:
        plain = text.strip().lower()
        rest = _PART.sub("", plain).strip()
        seconds = (
            sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(plain)) if not rest else 0.0
        )
    if not seconds > 0:
        raise ConfigError(
            f"{text!r} is no span of time.",
            meaning="A span is a number above 0 with a unit: s, m (or min), h, d; or several of them.",
            fix="Write 90m, 2h or 1h30m, for instance.",
        )
    return seconds
