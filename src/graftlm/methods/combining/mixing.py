"""Ways to add several changes of the same weights: sums, and sums of sparsified changes.

ties        trim each change, elect a sign per entry, average those that agree    arXiv 2306.01708
dare        drop entries at random, rescale the rest, add                         arXiv 2311.03099
magnitude   keep the largest entries of each change, add
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from graftlm.core.config import Config, suggest

How = Literal["linear", "cat", "svd", "ties", "dare", "magnitude"]
SPARSE = ("ties", "dare", "magnitude")
"""Ways that look at single entries, so that the change of a layer has to be formed."""


class Mixing(Config):
    """How changes are added. An option that the chosen way would not read is an error.

    >>> Mixing(how="tise")
    Traceback (most recent call last):
    graftlm.core.errors.ConfigError: Mixing has 1 problem.
      - how: must be one of linear, cat, svd, ties, dare, magnitude; did you mean 'ties'? (got 'tise')
      fix: Correct the keys above.
    """

    how: How = "linear"
    """`linear` and `cat` are the exact sum, `svd` is the sum cut to the largest rank of its terms."""
    rank: int | None = Field(None, gt=0)
    """Rank of the result; by default what holds the exact sum, for svd the largest rank of the terms."""
    density: float | None = Field(None, gt=0, le=1)
    """Fraction of the entries of each change that is kept; 0.5 unless given."""
    majority_sign: Literal["total", "frequency"] | None = None
    """Election of the sign in ties: by the sum of the values (unless given), or by their number."""
    seed: int | None = Field(None, ge=0, lt=2**32)
    """Of the drops of dare; 0 unless given."""

    @field_validator("how", mode="before")
    @classmethod
    def _known(cls, value: object) -> object:
        known = get_args(How)
        if value not in known:
            raise ValueError(f"must be one of {', '.join(known)}{suggest(str(value), known)}")
        return value

    @model_validator(mode="after")
    def _every_option_acts(self) -> Mixing:
        readers = {"density": SPARSE, "majority_sign": ("ties",), "seed": ("dare",)}
        idle = [
            name for name, ways in readers.items() if getattr(self, name) is not None and self.how not in ways
        ]
        if idle:
            raise ValueError(f"{', '.join(idle)}: not used by how={self.how!r}")
        return self

    @property
    def is_sparse(self) -> bool:
        """Whether single entries of the changes matter."""
        return self.how in SPARSE

    def mix(self, weights: Sequence[float], changes: Sequence[Tensor], place: int = 0) -> Tensor:
        """One change from several of the same shape. `place` numbers it: each has its own drops."""
        density = 0.5 if self.density is None else self.density
        if self.how == "ties":
            return _ties(
                weights, [largest(change, density) for change in changes], self.majority_sign or "total"
            )
        if self.how == "magnitude":
            changes = [largest(change, density) for change in changes]
        if self.how == "dare":
            generator = torch.Generator().manual_seed((self.seed or 0) * 1_000_003 + place)
            changes = [dropped(change, density, generator) for change in changes]
        return _sum(weights, changes)


def largest(change: Tensor, density: float) -> Tensor:
    """The `density` of the entries that are largest in size, at least one; zero elsewhere.

    >>> largest(torch.tensor([1.0, -3.0, 2.0, 0.5]), 0.5)
    tensor([ 0., -3.,  2.,  0.])
    """
    flat = change.reshape(-1)
    count = max(1, int(density * flat.numel()))
    index = flat.abs().topk(count, sorted=False).indices
    return torch.zeros_like(flat).index_copy(0, index, flat[index]).view_as(change)


def dropped(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry kept with probability `density` and divided by it, so that the expectation stays."""
    keep = torch.rand(change.shape, generator=generator).to(change.device) < density
    return torch.where(keep, change / density, 0.0)


def _ties(weights: Sequence[float], changes: Sequence[Tensor], majority_sign: str) -> Tensor:
    """The mean of the weighted changes that agree with the elected sign, entry by entry.

    A vote does not depend on the size of a weight, only on its sign: an adapter that is subtracted votes for
    the opposite of what it does. With equal totals the sign is plus.
    """
    votes = [change if weight > 0 else -change for weight, change in zip(weights, changes, strict=True)]
    signed = votes if majority_sign == "total" else [vote.sign() for vote in votes]
    elected = torch.where(_sum([1.0] * len(signed), signed) >= 0, 1.0, -1.0).to(changes[0].dtype)
    total, count = torch.zeros_like(changes[0]), torch.zeros_like(changes[0])
    for weight, vote in zip(weights, votes, strict=True):
        agrees = vote.sign() == elected
        total += abs(weight) * torch.where(agrees, vote, 0.0)
        count += agrees
    return total / count.clamp_min(1)


def _sum(weights: Sequence[float], changes: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(changes[0])
    for weight, change in zip(weights, changes, strict=True):
        total = total + weight * change
    return total
