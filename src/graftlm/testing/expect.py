"""Assertions that say in words what was expected; `AssertionError` is all they raise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graftlm.core.errors import GraftError


def expect(condition: bool, words: str) -> None:
    """
    >>> expect(1 + 1 == 3, "two ones are not three")
    Traceback (most recent call last):
    AssertionError: two ones are not three
    """
    if not condition:
        raise AssertionError(words)


def expect_close(found: Tensor, wanted: Tensor, what: str, *, rtol: float = 1e-4, atol: float = 2e-5) -> None:
    """Equal up to rounding in float32; `atol` counts from the largest value, as terms that cancel do."""
    expect(found.shape == wanted.shape, f"{what}: shape {list(found.shape)}, expected {list(wanted.shape)}")
    expect(bool(torch.isfinite(found).all()), f"{what}: not finite")
    gap = (found - wanted).abs()
    if gap.numel():
        scale = max(1.0, float(wanted.abs().max()))
        excess = float((gap - rtol * wanted.abs()).max())
        expect(excess <= atol * scale, f"{what}: off by up to {float(gap.max()):.2e} of {scale:.2e}")


def expect_equal(found: Tensor, wanted: Tensor, what: str) -> None:
    """Equal to the bit."""
    expect(found.dtype == wanted.dtype, f"{what}: {found.dtype}, expected {wanted.dtype}")
    expect(found.shape == wanted.shape, f"{what}: shape {list(found.shape)}, expected {list(wanted.shape)}")
    if not torch.equal(found, wanted):
        raise AssertionError(
            f"{what}: not equal to the bit, off by {float((found - wanted).abs().max()):.2e}"
        )


def expect_refusal(action: Callable[[], object], kind: type[GraftError], what: str) -> GraftError:
    """The action raises an error of that kind, in more than a word."""
    try:
        action()
    except kind as error:
        expect(len(error.seen) > 10, f"{what} is refused without saying why: {error.seen!r}")
        return error
    raise AssertionError(f"{what} is not refused")
