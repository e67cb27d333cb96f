"""Several adapters on one batch, each on consecutive tokens of its own: how they are trained side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from graftlm.core.errors import AdapterError


@dataclass(frozen=True)
class Lane:
    """The tokens from `start` to before `stop` belong to the adapter `name`; of a padded batch [B, T] all
    B x T are counted, row after row."""

    name: str
    start: int
    stop: int


def side_by_side(lengths: Mapping[str, int]) -> tuple[Lane, ...]:
    """Lanes of so many tokens, one after the other.

    >>> side_by_side({"a": 2, "b": 3})[1]
    Lane(name='b', start=2, stop=5)
    """
    lanes, start = [], 0
    for name, length in lengths.items():
        lanes.append(Lane(name, start, start + length))
        start += length
    return tuple(lanes)


class Lanes:
    """The lanes of the batch that is being computed, seen by every site of a model.

    Each adapter draws its random numbers from a generator of its own, so that they are those it would have
    drawn alone. Outside of `over` no token belongs to anybody, and the model is its base.
    """

    def __init__(self, generators: Mapping[str, torch.Generator]) -> None:
        self.generators = generators
        self.applies = True
        """False while sites apply what is active, as without lanes."""
        self._by_tokens: Mapping[int, Sequence[Lane]] = {}
        self._last: Mapping[int, Sequence[Lane]] = {}
        self._drawn: defaultdict[tuple[str, int], list[Tensor]] = defaultdict(list)
        """By adapter and layer: what was drawn in the pass, or the generator's state before."""
        self._is_again = False

    @contextmanager
    def over(self, lanes: Mapping[int, Sequence[Lane]]) -> Iterator[None]:
        """Inside, these are the lanes of what has so many tokens. (The end of a model may read fewer.)"""
        self._by_tokens = self._last = lanes
        self._drawn.clear()
        try:
            yield
        finally:
            self._by_tokens = {}

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, layers that are computed again find the lanes and the random numbers of the last pass."""
        self._by_tokens, self._is_again = self._last, True
        try:
            yield
        finally:
            self._by_tokens, self._is_again = {}, False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, sites apply what is active."""
        before, self.applies = self.applies, False
        try:
            yield
        finally:
            self.applies = before

    def of(self, tokens: int) -> Sequence[Lane]:
        """The lanes of a tensor with so many tokens, in their order.

        Raises:
            AdapterError: it has other tokens than the batch.
        """
        if not self._by_tokens:
            return ()
        if tokens not in self._by_tokens:
            raise AdapterError(
                f"A layer got {tokens} tokens, and the batch has {max(self._by_tokens)}.",
                meaning="This layer sees tokens in another order than the batch (experts, for instance), so "
                "it is not known which of them belong to which adapter.",
                fix="Exclude it with exclude_modules, or train these adapters one after the other.",
            )
        return self._by_tokens[tokens]

    def new_seed(self, name: str, layer: int) -> Tensor:
        """As `kernels.dropout.new_seed`, for one adapter at one layer."""
        if self._is_again:
            return self._only(name, layer)
        seed = torch.randint(2**62, (), generator=self.generators[name])
        self._drawn[name, layer].append(seed)
        return seed

    @contextmanager
    def drawing(self, name: str, layer: int) -> Iterator[None]:
        """Inside, what torch draws at random on the CPU is drawn by one adapter's generator."""
        generator, outside = self.generators[name], torch.get_rng_state()
        after = generator.get_state()
        if self._is_again:
            generator.set_state(self._only(name, layer))
        else:
            self._drawn[name, layer].append(after)
        torch.set_rng_state(generator.get_state())
        try:
            yield
        finally:
            generator.set_state(after if self._is_again else torch.get_rng_state())
            torch.set_rng_state(outside)

    def _only(self, name: str, layer: int) -> Tensor:
        """What was drawn there, once."""
        if len(self._drawn[name, layer]) != 1:
            raise AdapterError(
                "A layer that is called several times drops values at random, and is computed again.",
                meaning="Which of its calls is repeated is not known.",
                fix="Set lora_dropout to 0, or recompute to 'cheap'.",
            )
        return self._drawn[name, layer][0]
