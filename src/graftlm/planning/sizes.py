"""Sizes of memory as people write them."""

from __future__ import annotations

import re

from graftlm.core.errors import ConfigError

_UNITS = {"": 1, "b": 1, **{
    f"{letter}{kind}": (1024 if kind.startswith("i") else 1000) ** power
    for power, letter in enumerate("kmgt", start=1) for kind in ("", "b", "ib")
}}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """Bytes of a size: GB is 10^9 as the unit says, GiB is 2^30.

    >>> parse_bytes("24GB"), parse_bytes("1.5 GiB"), parse_bytes(4096)
    (24000000000, 1610612736, 4096)

    Raises:
        ConfigError: it is no size above 0.
    """
    found = _SIZE.fullmatch(str(text))
    unit = _UNITS.get(found[2].lower()) if found else None
    size = round(float(found[1]) * unit) if found and unit else 0
    if size <= 0:
        raise ConfigError(
            f"{text!r} is no size of memory.",
            meaning="A size is a number above 0 and a unit: GB is 1,000,000,000 bytes, GiB is 1,073,741,824.",
            fix="Write 24GB, 24GiB or 512MB, for instance.",
        )
    return size
