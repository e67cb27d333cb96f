"""Facts from the trained tensors."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

ENERGY = 0.99
"""Share of the squared norm that an effective rank holds."""


@dataclass(frozen=True)
class LayerChange:
    """The change of one weight as a product of two thin matrices."""

    path: str
    rank: int
    """Columns of the factors."""
    values: tuple[float, ...]
    """Singular values of the change, the largest first; none above zero: the adapter does nothing here."""

    @property
    def square(self) -> float:
        """The squared Frobenius norm."""
        return sum(value * value for value in self.values)

    @property
    def is_zero(self) -> bool:
        """Whether the weight is as it was."""
        return self.square == 0.0

    @property
    def stable_rank(self) -> float:
        """Squared Frobenius norm over squared spectral norm: between 1 and the rank."""
        return self.square / self.values[0] ** 2 if not self.is_zero else 0.0

    @property
    def effective_rank(self) -> int:
        """Directions that hold `ENERGY` of the change.

        >>> LayerChange("q_proj", 3, (10.0, 1.0, 0.1)).effective_rank
        1
        """
        sums = accumulate(value * value for value in self.values)
        return sum(total < ENERGY * self.square for total in sums) + 1 if not self.is_zero else 0

    def tail(self, kept: int) -> float:
        """Share of the change that is lost when only the first `kept` directions are kept."""
        lost = sum(value * value for value in self.values[kept:])
        return lost / self.square if not self.is_zero else 0.0


@dataclass(frozen=True)
class AdapterFacts:
    """Facts from the trained tensors; a field is None where it was not looked at."""

    kind: str = ""
    """PEFT's name of the method: `LORA`."""
    config: dict[str, Any] | None = None
    """`adapter_config.json`."""
    tensors: tuple[tuple[str, tuple[int, ...], str], ...] = ()
    """(key in the file, shape, dtype) of every tensor."""
    layers: tuple[LayerChange, ...] | None = None
    """Of methods whose change is a product of two thin matrices."""
    not_finite: tuple[str, ...] = ()
    """Keys of tensors that hold a NaN or an infinity."""
    still: tuple[str, ...] | None = None
    """Places where the trained tensors are as they started: the product of the factors is exactly zero."""
    trained: int = 0
    """Places that are trained."""
    without_state: tuple[str, ...] | None = None
    """Trained parameters of the newest checkpoint of which the optimizer remembers nothing."""
