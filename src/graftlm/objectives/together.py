"""Losses of several adapters from one pass: the micro-batch of each has a lane of its own.

Nothing that one adapter computes depends on the tokens of another, so the gradient of the sum of all losses
is for each adapter that of its own loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from graftlm.data.batches import WIDTH_STEP, Batch
from graftlm.data.filled import filled
from graftlm.data.forms import DOCUMENTS, for_attention
from graftlm.data.joined import beside, joined
from graftlm.kernels.few_shapes import missing_rows
from graftlm.kernels.stacked import FEW
from graftlm.methods.lanes import Lane, Lanes, side_by_side
from graftlm.models.fusing.last_rows import Wanted, only
from graftlm.objectives.base import LossParts

B_contra = TypeVar("B_contra", contravariant=True)

FILLING = 0.4
"""Share of padding that is worth it, so that short lanes have one length (`kernels.stacked_alike`)."""
MOST = 0.9
"""Share of wanted tokens from which on choosing them early gains nothing."""


@runtime_checkable
class TogetherObjective(Protocol[B_contra]):
    """An objective that can be asked for the losses of several micro-batches at once."""

    def __call__(self, model: nn.Module, batch: B_contra, /) -> LossParts: ...

    def together(
        self, model: nn.Module, batches: Mapping[str, B_contra], lanes: Lanes
    ) -> dict[str, LossParts]:
        """The loss of each micro-batch, by the name of the adapter that it belongs to; all have the same
        inputs. Inside, `lanes` shows the model's sites which tokens are whose."""


@dataclass(frozen=True)
class Joint:
    """Micro-batches as the one batch that goes into the model, and whose tokens are whose.

    rows: whose rows are whose, where they are padded: some layers see one vector for each row.
    """

    batch: Batch
    tokens: Sequence[Lane]
    rows: Sequence[Lane]

    def chosen(self, wanted: Tensor) -> Chosen:
        """Those tokens of each lane that a boolean of the shape of the labels names."""
        flat = wanted.flatten()
        each = [flat[lane.start : lane.stop].nonzero().flatten() + lane.start for lane in self.tokens]
        return Chosen(self, wanted, each)

    def over(
        self, lanes: Lanes, more: Mapping[int, Sequence[Lane]] | None = None
    ) -> AbstractContextManager[None]:
        """Inside, sites know the lanes of this batch, and `more`, by their number of tokens."""
        by_rows = {self.rows[-1].stop: self.rows} if self.rows else {}
        return lanes.over({**by_rows, **(more or {}), self.batch.labels.numel(): self.tokens})


@dataclass(frozen=True)
class Chosen:
    """Tokens of each lane that something is wanted of, as `each` lists their places in the batch."""

    joint: Joint
    wanted: Tensor
    each: Sequence[Tensor]

    @property
    def is_few(self) -> bool:
        """Whether it pays that the end of the model leaves the other tokens out."""
        return sum(map(len, self.each)) <= MOST * self.wanted.numel()

    def index(self) -> tuple[Tensor, Sequence[Lane]]:
        """The places, lane by lane, each filled up to the length of the longest, and the lanes of that. Some
        more at the end tell their number from that of all tokens."""
        longest = max(map(len, self.each))
        any_place = torch.cat(list(self.each))[:1]
        filled_up = [torch.cat([own[:1], any_place])[:1].expand(longest - len(own)) for own in self.each]
        found = torch.cat([part for pair in zip(self.each, filled_up, strict=True) for part in pair])
        missing = missing_rows(len(found), found.device)
        missing += WIDTH_STEP if len(found) + missing == self.wanted.numel() else 0
        lanes = side_by_side({lane.name: longest for lane in self.joint.tokens})
        return torch.cat([found, found[:1].expand(missing)]), lanes

    def only(self, index: Tensor) -> AbstractContextManager[Wanted]:
        """Inside, the model may give the tokens of that `index` alone."""
        return only(self.wanted, index)

    def of(self, hidden: Tensor) -> list[Tensor]:
        """The wanted tokens of each lane, of something that has all: [B, T, N] -> [count, N] each."""
        flat = hidden.flatten(0, 1)
        return [flat.index_select(0, own.to(flat.device, non_blocking=True)) for own in self.each]

    def of_index(self, hidden: Tensor) -> list[Tensor]:
        """The same, of something that has a line for each place of `index`: [M, N] -> [count, N] each."""
        longest = max(map(len, self.each))
        starts = range(0, longest * len(self.each), longest)
        return [hidden[start : start + len(own)] for start, own in zip(starts, self.each, strict=True)]


def joint_of(batches: Mapping[str, Batch], attention: str, dtype: torch.dtype) -> Joint:
    """Micro-batches as the model's attention reads them, side by side."""
    if attention == DOCUMENTS and all(batch.documents for batch in batches.values()):
        flat = {name: for_attention(batch, attention, dtype) for name, batch in batches.items()}
        real = {name: batch.labels.shape[1] for name, batch in flat.items()}
        length = _common_length(list(real.values()))
        lengths = dict.fromkeys(flat, length) if length else real
        whole = beside([filled(batch, lengths[name]) for name, batch in flat.items()])
        whole = filled(whole, -(-whole.labels.shape[1] // WIDTH_STEP) * WIDTH_STEP)
        return Joint(whole, side_by_side(lengths), ())
    padded = joined([*batches.values()])
    whole = for_attention(padded, attention, dtype)
    width = whole.labels.shape[1]
    rows = {name: len(batch.labels) for name, batch in batches.items()}
    tokens = side_by_side({name: width * count for name, count in rows.items()})
    return Joint(whole, tokens, side_by_side(rows))


def _common_length(lengths: Sequence[int]) -> int:
    """What all lanes are filled up to; 0 where they are long, or differ too much."""
    length = -(-max(lengths) // WIDTH_STEP) * WIDTH_STEP
    padding = 1 - sum(lengths) / (length * len(lengths))
    return length if length <= FEW and padding <= FILLING else 0
