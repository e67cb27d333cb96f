"""All faster parts of a model together, for the time of a training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import nn

from graftlm.models.fusing.attention import attention_layers
from graftlm.models.fusing.base import FasterPart
from graftlm.models.fusing.feed_forward import feed_forward_parts
from graftlm.models.fusing.last_rows import last_layer
from graftlm.models.fusing.norms import norms
from graftlm.models.fusing.projections import projections
from graftlm.models.fusing.rotary import rotary_embeddings

KINDS: tuple[Callable[[nn.Module], FasterPart], ...] = (
    norms,
    feed_forward_parts,
    rotary_embeddings,
    attention_layers,
    projections,
    last_layer,
)
"""Every kind of part; a later one may rely on what the earlier ones put in place."""


@dataclass(frozen=True)
class Fusable:
    """The parts of a model that can run a faster way."""

    parts: tuple[FasterPart, ...]

    @property
    def summary(self) -> str:
        """One line, as `plan.json` has it."""
        return ", ".join(part.summary for part in self.parts)


def fusable(model: nn.Module) -> Fusable:
    """All parts that have a faster way, found and probed."""
    return Fusable(tuple(kind(model) for kind in KINDS))


@contextmanager
def fused(found: Fusable) -> Iterator[None]:
    """Inside, they run the faster way, outside as before: the same outputs and gradients within rounding."""
    with ExitStack() as stack:
        for part in found.parts:
            stack.enter_context(part.in_use())
        yield
