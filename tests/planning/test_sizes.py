"""Sizes of memory as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftlm.core.errors import ConfigError
from graftlm.planning.sizes import parse_bytes

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@given(st.integers(1, 10**6), st.sampled_from(list(UNITS)), st.sampled_from(["", " "]), st.booleans())
def test_every_unit(number: int, unit: str, space: str, lower: bool) -> None:
    text = f"{number}{space}{unit.lower() if lower else unit}"
    assert parse_bytes(text) == number * UNITS[unit]


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-1GB", "24 bananas", "1e9", "24GB 2", "nan", 0])
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(ConfigError, match="no size of memory"):
        parse_bytes(text)
