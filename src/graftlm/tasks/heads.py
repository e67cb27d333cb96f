"""What tasks share that give the base a new head: it is trained, saved and served with the adapter."""

from __future__ import annotations

from typing import Any, Generic, Protocol, TypeVar

from torch import nn

from graftlm.data.batches import Batch
from graftlm.data.records import Record
from graftlm.methods.base import MethodConfig
from graftlm.models.heads import describe_head, with_head
from graftlm.tasks.base import spread
from graftlm.tasks.dataset import Row
from graftlm.tasks.records import RecordTask

HEAD_RATE_SCALE = 0.3
"""A head of random weights sends rough gradients into the body at first: at the rate that suits text, small
encoders stay at chance on hard labels (docs/how-to/classification.md)."""


class HeadRow(Row, Protocol):
    """A row of a task with a head."""

    @property
    def input_ids(self) -> tuple[int, ...]: ...


X = TypeVar("X", bound=Record)
R = TypeVar("R", bound=HeadRow)
B = TypeVar("B", bound=Batch)


class HeadTask(RecordTask[X, R, B], Generic[X, R, B]):
    """A task whose head tells labels, tags or numbers."""

    keeps_known_text = False
    rate_scale = HEAD_RATE_SCALE

    def require_base(self, model: nn.Module) -> None:
        """Whatever was loaded with this ending has the head."""
        self._head = describe_head(model)

    def encode(self, tokenizer: Any) -> None:
        self._pad = int(tokenizer.pad_token_id)
        super().encode(tokenizer)

    def method(self, model: nn.Module) -> MethodConfig:
        return with_head(self.recipe.method.config, model)

    def probes(self, count: int) -> list[list[int]]:
        return [list(row.input_ids) for row in spread(self.dataset.held_out, count)]
