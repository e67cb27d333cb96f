"""Attention masks and positions with virtual tokens in front. Pure functions of tensors.

`seen` [B, n] says which virtual columns a row has (None: all of them); they stand right before the row's
real tokens, so that what a row lacks is on the left, like padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core.errors import ModelError
from graftlm.data.forms import DOCUMENTS


def with_columns(mask: Any, before: int, queries: int, seen: Tensor | None, *, is_causal: bool) -> Any:
    """The mask with `before` virtual columns in front, of which the last `queries` are also rows of it.

    Shapes: 2-D [B, tokens] (1 for real tokens) or 4-D [B, 1 or heads, rows, columns], boolean or additive.
    Every real row sees every virtual column that is its own; a virtual row sees those up to itself.

    Raises:
        ModelError: a mask of another kind, or a 4-D mask for a stack without order.
    """
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise ModelError(
            f"Virtual tokens cannot be added to an attention mask of type {_kind(mask)}.",
            meaning="Its layout is that of one attention implementation or one cache.",
            fix="Give a mask [batch, tokens], or a boolean or additive one [batch, 1, rows, columns]; "
            "in generate, leave out cache_implementation.",
        )
    if mask.dim() == 2:
        columns = mask.new_ones(mask.shape[0], before) if seen is None else seen.to(mask.device, mask.dtype)
        return torch.cat((columns, mask), dim=1)
    if queries and not is_causal:
        raise ModelError(
            "A 4-D attention mask does not say what virtual tokens see in a bidirectional model.",
            fix="Give a mask [batch, tokens].",
        )
    return _with_columns_4d(mask, before, queries, seen)


def _with_columns_4d(mask: Tensor, before: int, queries: int, seen: Tensor | None) -> Tensor:
    batch, heads, rows, columns = mask.shape
    visible = torch.ones(rows + queries, before, dtype=torch.bool, device=mask.device)
    # Virtual rows stand in the last `queries` virtual columns, each seeing the columns up to its own.
    visible[:queries] = visible[:queries].tril(before - queries)
    visible = visible.expand(batch, heads, -1, -1)
    if seen is not None:
        visible = visible & seen.to(mask.device).view(batch, 1, 1, before)
        own = torch.zeros_like(visible)
        own[:, :, :queries, before - queries :] = torch.eye(queries, dtype=torch.bool, device=mask.device)
        visible = visible | own  # no row of a softmax may be empty
    hidden = torch.zeros(batch, heads, queries, columns, dtype=torch.bool, device=mask.device)
    if mask.dtype != torch.bool:
        visible, hidden = _additive(visible, mask.dtype), _additive(hidden, mask.dtype)
    return torch.cat((visible, torch.cat((hidden, mask), dim=2)), dim=3)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    if not dtype.is_floating_point:
        raise ModelError(
            f"A 4-D attention mask of {dtype} is neither boolean nor additive.",
            fix="Give torch.bool (True: may attend) or a floating dtype (0: may attend).",
        )
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def is_flat(stack: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether the call is a row of documents that the stack's attention keeps apart without a mask."""
    config = getattr(stack, "config", None)
    name = getattr(config, "_attn_implementation", None)
    return name == DOCUMENTS and given.get("cu_seq_lens_q") is not None


def packed_mask(position_ids: Tensor) -> Tensor:
    """A boolean mask [B, 1, T, T] for windows of documents whose positions start again with each.

    >>> packed_mask(torch.tensor([[0, 1, 0]]))[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    starts = F.pad(position_ids.diff(dim=-1) != 1, (1, 0)).cumsum(-1)
    return (starts[:, :, None] == starts[:, None, :]).tril().unsqueeze(1)


def mask_of_packed(stack: nn.Module, positions: Tensor, before: int) -> Tensor:
    """The mask of documents side by side, which a model itself finds by their positions only without a cache.

    Raises:
        ModelError: an attention implementation, or a sliding window, that this mask would not be right for.
    """
    kind = str(getattr(stack.config, "_attn_implementation", None) or "eager")
    window = getattr(stack.config, "sliding_window", None)
    if kind not in ("eager", "sdpa") or (window and positions.shape[1] + before > window):
        raise ModelError(
            "Virtual tokens need an attention mask beside position_ids here.",
            meaning=f"The model would find documents by their positions ({kind} attention).",
            fix="Give an attention mask, or train without packing.",
        )
    mask = packed_mask(positions)
    if kind == "sdpa":
        return mask
    dtype = next(stack.parameters()).dtype
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def real_positions(mask: Any, tokens: int) -> Tensor | None:
    """Positions [B, tokens] of the new tokens where padding does not count; None without a 2-D mask.

    Padding itself counts on from the last real token, so that right padding changes nothing at all.

    >>> real_positions(torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]]), 4).tolist()
    [[0, 1, 0, 1], [0, 1, 2, 3]]
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    is_real = mask != 0
    columns = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    last_real = torch.where(is_real, columns, -1).cummax(-1).values
    return (is_real.cumsum(-1) - 1 + columns - last_real)[:, -tokens:]


def virtual_positions(width: int, start: Tensor | int, count: Tensor | int, device: torch.device) -> Tensor:
    """Positions of `width` columns of which the last `count` are a row's own, the first of these at `start`.

    `start` and `count` are numbers, or one for each row as [B, 1]. Shape: [1 or B, width].
    """
    columns = torch.arange(width, device=device).unsqueeze(0)
    return (columns - (width - count)).clamp(min=0) + start


def _kind(mask: Any) -> str:
    return f"{mask.dim()}-D tensor" if isinstance(mask, Tensor) else type(mask).__name__
