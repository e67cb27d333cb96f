"""Tensors that are cheap to make again: how they were made, remembered on the tensor itself.

What an operator gives is a copy of what is known elsewhere: a norm's output can be made from its input, which
the residual connection holds anyway. Whoever would keep such a tensor for backward keeps the producer's
inputs instead and calls the producer again: the same operator, so the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

Producer = Callable[..., Tensor]


@dataclass(frozen=True)
class Source:
    """`producer(*inputs)` gives the tensor again, to the bit."""

    producer: Producer
    inputs: tuple[Tensor, ...]


class _Policy:
    """Of the process, not of a thread: autograd calls checkpointed parts again from threads of its own."""

    recomputing = 0


@contextmanager
def recomputing_cheap_parts() -> Iterator[None]:
    """Inside, tensors remember how they were made (`remember`), and are not kept for backward by those who
    ask (`source_of`)."""
    _Policy.recomputing += 1
    try:
        yield
    finally:
        _Policy.recomputing -= 1


def remember(x: Tensor, producer: Producer, *inputs: Tensor) -> Tensor:
    """The very `x`; where cheap parts are recomputed, it remembers that `producer(*inputs)` made it.

    The inputs must be kept for backward anyway, or nothing is spared: an `x` without gradient therefore does
    not remember, for then its producer keeps nothing. What is made from `x` remembers nothing.
    """
    if _Policy.recomputing and x.requires_grad and not torch.compiler.is_compiling():
        x._graft_source = Source(producer, tuple(one.detach() for one in inputs))  # type: ignore[attr-defined]
    return x


def source_of(x: Tensor) -> Source | None:
    """How `x` was made, if it remembers."""
    return getattr(x, "_graft_source", None)


def forget(x: Tensor) -> None:
    """From here on `x` counts as given, not as made from something."""
    vars(x).pop("_graft_source", None)
