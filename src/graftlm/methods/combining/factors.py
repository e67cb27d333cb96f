"""Changes of weights as products of two thin matrices: sums that are exact, and the best of lower rank.

A large layer's change is never formed to add or to reduce: all that is decomposed has the size of the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT_SIDE = 1024
"""A dense matrix whose smaller side is at most this gets an exact SVD, a larger one a randomised one."""
OVERSAMPLING, ITERATIONS = 16, 4
"""Of the randomised SVD (Halko, Martinsson, Tropp 2011, arXiv 0909.4061)."""


@dataclass(frozen=True)
class Factors:
    """The change b @ a. Shapes: a [..., r, in], b [..., out, r]; leading dimensions are a batch of changes.

    >>> two = Factors(torch.ones(2, 3), torch.ones(4, 2))
    >>> two.rank, two.dense().shape
    (2, torch.Size([4, 3]))
    """

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    @property
    def sides(self) -> tuple[int, int]:
        """(out, in)."""
        return self.b.shape[-2], self.a.shape[-1]

    def dense(self) -> Tensor:
        """The change itself, [..., out, in]."""
        return self.b @ self.a

    def square(self) -> float:
        """The squared Frobenius norm of the change."""
        return float(((self.b.mT @ self.b) * (self.a @ self.a.mT)).sum())


@dataclass(frozen=True)
class Reduced:
    """The best approximation of lower rank, and squared norms that say how much of the change it keeps."""

    factors: Factors
    kept: float
    """Squared Frobenius norm of the approximation."""
    total: float
    """Squared Frobenius norm of what was approximated."""


def weighted_sum(weights: Sequence[float], terms: Sequence[Factors]) -> Factors:
    """The sum of w * term, exactly: factors side by side, weights in b. Its rank is the sum of the ranks.

    >>> one = Factors(torch.ones(1, 2), torch.ones(2, 1))
    >>> weighted_sum([2.0, -1.0], [one, one]).dense()
    tensor([[1., 1.],
            [1., 1.]])
    """
    a = torch.cat([term.a for term in terms], dim=-2)
    b = torch.cat([weight * term.b for weight, term in zip(weights, terms, strict=True)], dim=-1)
    return Factors(a, b)


def reduced(factors: Factors, rank: int) -> Reduced:
    """The best approximation of at most `rank` (Eckart-Young), from QR decompositions of the thin factors."""
    left, upper = torch.linalg.qr(factors.b)
    right, lower = torch.linalg.qr(factors.a.mT)
    u, values, v = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    return _cut(left @ u, values, v @ right.mT, rank, total=float(values.square().sum()))


def approximated(dense: Tensor, rank: int, *, seed: int = 0) -> Reduced:
    """A dense change [..., out, in] as factors of at most `rank`.

    Exact for matrices of moderate size. For large ones the space is found by random projection with power
    iterations; `kept` is the figure of what was found, so a loss never goes unseen.
    """
    total = float(dense.square().sum(dtype=torch.float64))
    if min(dense.shape[-2:]) <= max(EXACT_SIDE, rank + OVERSAMPLING):
        u, values, v = torch.linalg.svd(dense, full_matrices=False)
        return _cut(u, values, v, rank, total)
    basis = _range_of(dense, rank + OVERSAMPLING, seed)
    u, values, v = torch.linalg.svd(basis.mT @ dense, full_matrices=False)
    return _cut(basis @ u, values, v, rank, total)


def _range_of(dense: Tensor, width: int, seed: int) -> Tensor:
    """An orthonormal basis [..., out, width] of nearly all that the matrix does."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*dense.shape[:-2], dense.shape[-1], width)
    start = torch.randn(shape, generator=generator).to(dense)
    basis: Tensor = torch.linalg.qr(dense @ start)[0]
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(dense.mT @ basis)[0]
        basis = torch.linalg.qr(dense @ basis)[0]
    return basis


def _cut(u: Tensor, values: Tensor, v: Tensor, rank: int, total: float) -> Reduced:
    """The first `rank` singular triples, the values shared out evenly between the two factors."""
    root = values[..., :rank].sqrt()
    factors = Factors(root[..., :, None] * v[..., :rank, :], u[..., :, :rank] * root[..., None, :])
    return Reduced(factors, float(values[..., :rank].square().sum(dtype=torch.float64)), total)
