"""The main directions of rows that arrive in batches: an incremental principal component analysis.

Ross, Lim, Lin, Yang 2008, "Incremental Learning for Robust Visual Tracking", section 3: the kept directions,
scaled by their singular values, stand for all earlier rows; one further row stands for the move of the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_SIDE = 64
"""A matrix whose smaller side is at most this gets an exact SVD, a larger one a randomised one."""
POWER_ITERATIONS = 4


class InputSpace:
    """The first `width` principal directions of the rows seen so far.

    >>> space = InputSpace(1)
    >>> space.add(torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    >>> space.directions(1).abs(), space.shares
    (tensor([[1., 0.]]), tensor([0.9000]))
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._waiting: list[Tensor] = []
        self._seen = 0
        self._mean = torch.zeros(0)
        self._scatter = torch.zeros(0)
        self._values = torch.zeros(0)
        self._components = torch.zeros(0, 0)
        self._cosines = torch.zeros(0)

    @property
    def is_empty(self) -> bool:
        """Too few rows have arrived for any direction."""
        return self._seen == 0

    @property
    def waiting(self) -> int:
        """Rows that wait for enough others to make a first analysis."""
        return sum(len(rows) for rows in self._waiting)

    @property
    def shares(self) -> Tensor:
        """The part of all variance that each direction explains, [width], on the CPU."""
        return (self._values.square() / self._scatter).float().cpu()

    def directions(self, count: int, *, whitened: bool = False) -> Tensor:
        """The first `count`, [count, features]; whitened: over the root of their singular values."""
        rows = self._components[:count]
        return rows / self._values[:count, None].sqrt() if whitened else rows.clone()

    def is_still(self, count: int, tau: float) -> bool:
        """Whether the last rows turned none of the first `count` directions by a cosine below `tau`."""
        if count == 0:
            return True
        return len(self._cosines) >= count and bool((self._cosines[:count] >= tau).all())

    def add(self, rows: Tensor) -> None:
        """Rows [n, features] of any floating dtype; kept back while there are fewer than `width`."""
        self._waiting.append(rows.float())
        self.width = min(self.width, rows.shape[1])
        if self.waiting < self.width:
            return
        batch, self._waiting = torch.cat(self._waiting), []
        mean = batch.mean(0)
        centred = batch - mean
        scatter = centred.square().sum(dtype=torch.float64)
        if self._seen:
            weight = self._seen * len(batch) / (self._seen + len(batch))
            step = self._mean - mean
            scatter = self._scatter + scatter + weight * step.square().sum(dtype=torch.float64)
            centred = torch.cat([self._values[:, None] * self._components, centred, weight**0.5 * step[None]])
            mean = (self._seen * self._mean + len(batch) * mean) / (self._seen + len(batch))
        previous = self._components
        self._values, self._components = _principal(centred, self.width)
        if self._seen:
            self._cosines = torch.nn.functional.cosine_similarity(self._components, previous)
        self._seen, self._mean, self._scatter = self._seen + len(batch), mean, scatter


def _principal(rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Singular values [width] and right singular vectors [width, features], each with its largest entry
    positive, so that directions can be compared between batches."""
    if min(rows.shape) <= max(EXACT_SIDE, 2 * width):
        _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    else:
        devices = [rows.device] if rows.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            _, values, transposed = torch.svd_lowrank(rows, q=2 * width, niter=POWER_ITERATIONS)
        vectors = transposed.t()
    values, vectors = values[:width], vectors[:width]
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return values, vectors * largest.sign()
