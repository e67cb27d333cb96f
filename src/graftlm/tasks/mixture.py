"""The micro-batches of several tasks in one order: each optimizer step belongs to one task."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any

import torch

from graftlm.objectives.multi import PartBatch, part_batch
from graftlm.tasks.base import TaskBatches


class Mixture:
    """Micro-batches of several sources, drawn without chance inside a source.

    An epoch has as many steps as its sources have in one epoch each, handed out by `power` (see
    `MultiSettings.sampling`), in an order drawn by (seed, epoch). The steps of one source take its
    micro-batches in its own order, epoch after epoch, whatever the others do. All micro-batches of a step are
    of one source: its loss is a mean over that source's targets alone.

    Args:
        parts: name -> micro-batches.
        window: micro-batches of one optimizer step.
        power: 1 gives steps in proportion to a source's size, 0 equally many to each.
    """

    def __init__(
        self, parts: Mapping[str, TaskBatches[Any]], *, window: int, power: float, seed: int
    ) -> None:
        self._parts = dict(parts)
        self._window, self._power, self._seed = window, power, seed
        self._steps = shares({name: _steps(source, window) for name, source in parts.items()}, power)
        self._orders: dict[int, list[str]] = {}
        self._ends: dict[str, list[int]] = {name: [] for name in parts}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the sources and how they are mixed."""
        own = [(name, source.fingerprint) for name, source in self._parts.items()]
        return hashlib.sha256(f"{own}{self._window}{self._power}{self._seed}".encode()).hexdigest()

    @property
    def most_tokens(self) -> int:
        """What no micro-batch exceeds, padding included."""
        return max(source.most_tokens for source in self._parts.values())

    @property
    def steps(self) -> Mapping[str, int]:
        """Optimizer steps of each source in one epoch."""
        return self._steps

    def taken(self, steps: int) -> dict[str, int]:
        """Of the first `steps` optimizer steps, those of each source."""
        epochs, rest = divmod(steps, sum(self._steps.values()))
        begun = self._order(epochs)[:rest]
        return {name: epochs * count + begun.count(name) for name, count in self._steps.items()}

    def packing_rate(self, epoch: int = 0) -> float:
        """Share of the tokens that are no padding, weighed by steps."""
        found = sum(self._steps[name] * source.packing_rate(epoch) for name, source in self._parts.items())
        return found / sum(self._steps.values())

    def count(self, epoch: int) -> int:
        """Micro-batches of that epoch (the same in every epoch)."""
        return self._window * sum(self._steps.values())

    def batch(self, epoch: int, index: int) -> PartBatch:
        """Micro-batch `index` (from 0) of that epoch."""
        order = self._order(epoch)
        step, within = divmod(index, self._window)
        name = order[step]
        before = epoch * self._steps[name] + order[:step].count(name)
        return part_batch(name, self._of(name, before * self._window + within))

    def _order(self, epoch: int) -> list[str]:
        """Whose each step of an epoch is; only the last two epochs are kept."""
        if epoch not in self._orders:
            digest = hashlib.sha256(f"graft mixture {self._seed} {epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            names = [name for name, count in self._steps.items() for _ in range(count)]
            drawn = [names[place] for place in torch.randperm(len(names), generator=generator).tolist()]
            self._orders = dict([*self._orders.items()][-1:])
            self._orders[epoch] = drawn
        return self._orders[epoch]

    def _of(self, name: str, position: int) -> Any:
        """The micro-batch of one source at a position counted through all of its epochs."""
        source, ends = self._parts[name], self._ends[name]
        while not ends or ends[-1] <= position:
            ends.append((ends[-1] if ends else 0) + source.count(len(ends)))
        epoch = bisect_right(ends, position)
        return source.batch(epoch, position - (ends[epoch - 1] if epoch else 0))


def shares(counts: Mapping[str, int], power: float) -> dict[str, int]:
    """As many steps as `counts` has in all, handed out in proportion to count ** power, one at least.

    >>> shares({"large": 90, "small": 10}, 1.0), shares({"large": 90, "small": 10}, 0.0)
    ({'large': 90, 'small': 10}, {'large': 50, 'small': 50})
    >>> shares({"large": 90, "small": 10}, 0.5)
    {'large': 75, 'small': 25}
    """
    weights = [count**power for count in counts.values()]
    total, whole = sum(counts.values()), sum(weights)
    # Bounds are rounded, not shares: the shares then add up.
    bounds = [0, *(round(total * part / whole) for part in accumulate(weights))]
    found = (stop - start for start, stop in pairwise(bounds))
    return {name: max(1, share) for name, share in zip(counts, found, strict=True)}


def _steps(source: TaskBatches[Any], window: int) -> int:
    """Optimizer steps of one epoch, to the nearest."""
    return max(1, round(source.count(0) / window))
