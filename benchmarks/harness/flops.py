"""Arithmetic that training needs, whoever does it; what is computed twice does not count twice.

With every linear layer adapted, a token costs 4 (linear + head) + 6 adapter + 3.5 attention: two for each
weight forward and two for the gradient of the input; a frozen weight has no gradient, an adapter has.
Attention is causal: 2 S heads head_dim layers forward, for a document of S tokens, and 2.5 times that
backward.
"""

from __future__ import annotations

from collections.abc import Iterable

from harness.case import Case

FORWARD_AND_INPUT = 4
WITH_WEIGHT = 6
ATTENTION = 3.5


def step_flops(case: Case, documents: Iterable[int], targets: int) -> float:
    """Of a step over documents of these lengths, `targets` of whose tokens have a label.

    >>> from harness.shapes import SHAPES
    >>> case = Case("a", shape="8b", rank=16)
    >>> round(step_flops(case, [2048], 2048) / 2048 / 1e9, 2)
    32.15
    """
    shape, lengths = case.model, list(documents)
    tokens = sum(lengths)
    trained = shape.adapter(case.rank) if case.method in ("lora", "dora") else 0
    matrices = tokens * (FORWARD_AND_INPUT * shape.linear + WITH_WEIGHT * trained)
    return matrices + FORWARD_AND_INPUT * shape.head * targets + ATTENTION * attention_flops(case, lengths)


def attention_flops(case: Case, lengths: Iterable[int]) -> float:
    """Of the forward pass."""
    shape = case.model
    return 2.0 * shape.heads * shape.head_dim * shape.layers * sum(length**2 for length in lengths)
