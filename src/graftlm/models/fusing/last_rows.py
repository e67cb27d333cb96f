"""The end of a decoder for the wanted rows only: after the last attention, rows no longer meet.

Tokens without a label give keys and values to others, up to the last attention. The last feed-forward part,
the last norm and the output head of such a token are computed for nothing, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.kernels.few_shapes import missing_rows
from graftlm.methods.families import Block, blocks_of
from graftlm.methods.site import base_modules
from graftlm.models.recompute.exchange import exchanged
from graftlm.quant.facts import device_of, dtype_of

NEAR = {torch.float64: 1e-6, torch.float32: 1e-4}
"""How far the hidden states of a probe may be from the model's own, relative to their size; in 16 bits:"""
NEAR_IN_16_BITS = 0.02


@dataclass
class Wanted:
    """The rows that somebody will look at."""

    rows: Tensor
    """Boolean [B, T]."""
    index: Tensor | None = None
    """Their numbers, where somebody has them on the model's device already: the same number at every call."""
    taken: bool = False
    """The model gave these rows alone: hidden states are [1, number of rows, H]."""


_wanted: ContextVar[Wanted | None] = ContextVar("wanted rows", default=None)


@contextmanager
def only(rows: Tensor, index: Tensor | None = None) -> Iterator[Wanted]:
    """Inside, the last hidden states of `rows` [B, T] are enough; `taken` tells whether the model obeyed."""
    wanted = Wanted(rows, index)
    token = _wanted.set(wanted)
    try:
        yield wanted
    finally:
        _wanted.reset(token)


@dataclass(frozen=True)
class LastLayer:
    """The last layer of a decoder whose end can be left out for some rows, or the reason why not."""

    layer: nn.Module | None
    end: Callable[..., Tensor] | None
    why: str = ""

    @property
    def summary(self) -> str:
        """As every `FasterPart`."""
        return f"0 of 1 last layers ({self.why})" if self.why else "1 of 1 last layers for rows with a label"

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the layer looks at what is wanted, and outside of `only` it is as before."""
        if self.layer is None or self.end is None or self.why:
            yield
            return
        with exchanged(self.layer, partial(_around, self.end)):
            yield


def last_layer(model: nn.Module) -> LastLayer:
    """The last layer of a causal model, if a probe of some rows gives what all rows give there."""
    blocks = blocks_of(model)
    if not blocks or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return LastLayer(None, None, "no decoder")
    layer = base_modules(model)[blocks[-1].path]
    if layer is not model.get_submodule(blocks[-1].path):
        return LastLayer(None, None, "an adapter lies around it")
    end = _computation(layer, blocks[-1])
    if end is None:
        return LastLayer(None, None, "another structure")
    found = LastLayer(layer, end)
    why = _against(model, found)
    return LastLayer(layer, end, why)


def _computation(layer: nn.Module, block: Block) -> Callable[..., Tensor] | None:
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`, each perhaps with a norm behind as well."""
    if len(block.attentions) != 1:
        return None
    inside = block.attentions[0].path.removeprefix(f"{block.path}.").split(".")[0]
    norms = [name for name, child in layer.named_children() if _is_norm(child)]
    others = [name for name, _ in layer.named_children() if name not in (*norms, inside)]
    if len(others) != 1 or len(norms) not in (2, 4):
        return None
    before, behind = (norms[0::2], norms[1::2]) if len(norms) == 4 else (norms, [])

    def end(x: Tensor, rows: Tensor, **kwargs: Any) -> Tensor:
        given = layer.get_submodule(inside)(layer.get_submodule(before[0])(x), **kwargs)
        attended = given[0] if isinstance(given, tuple) else given
        x, attended = _chosen(x, rows), _chosen(attended, rows)
        x = x + (layer.get_submodule(behind[0])(attended) if behind else attended)
        out = layer.get_submodule(others[0])(layer.get_submodule(before[1])(x))
        result: Tensor = x + (layer.get_submodule(behind[1])(out) if behind else out)
        return result

    return end


def _is_norm(module: nn.Module) -> bool:
    parameters = list(module.parameters(recurse=False))
    return not list(module.children()) and bool(parameters) and all(each.dim() == 1 for each in parameters)


def _chosen(x: Tensor, rows: Tensor) -> Tensor:
    """Shapes: [B, T, H] -> [1, number of rows, H]."""
    return x.flatten(0, 1).index_select(0, rows).unsqueeze(0)


def _around(end: Callable[..., Tensor], plain: Callable[..., Any]) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        wanted = _wanted.get()
        if wanted is None or args or wanted.rows.shape != hidden_states.shape[:2]:
            return plain(hidden_states, *args, **kwargs)
        wanted.taken = True
        if wanted.index is not None:
            return end(hidden_states, wanted.index, **kwargs)
        index = wanted.rows.flatten().nonzero().flatten()  # on the host, as labels are: no waiting
        count = len(index)
        index = torch.cat([index, index[:1].expand(missing_rows(count, hidden_states.device))])
        found = end(hidden_states, index.to(hidden_states.device, non_blocking=True), **kwargs)
        return found[:, :count]

    return forward


@torch.no_grad()
def _against(model: nn.Module, found: LastLayer) -> str:
    """What a probe says against it: two rows, the first wanted in part, the second not at all."""
    stack: Any = getattr(model, "base_model", model)
    ids = torch.arange(3, 13, device=device_of(model)).view(2, 5)
    rows = torch.tensor([[True, False, True, False, True], [False] * 5], device=ids.device)
    was_training = model.training
    model.eval()
    try:
        expected = stack(input_ids=ids, use_cache=False)[0][rows]
        with found.in_use(), only(rows) as wanted:
            hidden = stack(input_ids=ids, use_cache=False)[0]
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        return f"does not run: {type(error).__name__}"
    finally:
        model.train(was_training)
    if not wanted.taken:
        return "called in another way"
    if not isinstance(hidden, Tensor) or hidden.shape != (1, *expected.shape):
        return "another shape"
    difference, size = (hidden[0] - expected).float().norm(dim=-1), expected.float().norm(dim=-1)
    near = NEAR.get(dtype_of(model), NEAR_IN_16_BITS)
    return "" if bool((difference <= near * size).all()) else "another result"
