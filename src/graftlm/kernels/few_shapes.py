"""Rows that fill a matrix up, where products of ever new shapes would each have to be prepared.

The library behind torch on a CPU plans a product once for each shape and remembers the plan. Planning takes
about as long as the product itself: for 2,000 rows, 1,024 and 2,816 columns, 8 ms on one core beside 9.
"""

from __future__ import annotations

import torch

STEP = 64
"""Rows that a filled matrix has a multiple of."""
FROM = 256
"""Rows from which on matrices are filled up: below, it would be a large part of them."""


def missing_rows(rows: int, device: torch.device) -> int:
    """How many rows of no meaning should be added to `rows`; none where there are few, or no plans.

    >>> missing_rows(1000, torch.device("cpu")), missing_rows(100, torch.device("cpu"))
    (24, 0)
    """
    return -rows % STEP if device.type == "cpu" and rows >= FROM else 0
