"""Attention as `transformers` calls it, for batches that say where each of their documents starts.

A flat batch is one row of tokens with `cu_seq_lens_q` beside them. It gets no mask, and its attention has
no score between two documents, unless `graft_parents` says that one continues the other. Every other call
(padded rows, an encoder, a cache) gets the mask and the attention of "sdpa".
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from graftlm.core.errors import ModelError
from graftlm.data.forms import DOCUMENTS, PARENTS
from graftlm.kernels.attention import attention, attention_is_native

Way = Literal["native kernel", "torch varlen", "document by document"]

STARTS, LONGEST = "cu_seq_lens_q", "max_length_q"
SEEN = "graft_calls"
"""The argument with the list that gets a `Call` for each attention layer; for a probe."""
OTHER_SCORES = ("softcap", "s_aux", "position_bias", "head_mask", "alibi", "cache")
"""Arguments that change scores in a way that is not computed here."""

_is_flat: ContextVar[bool] = ContextVar("is_flat", default=False)
"""Whether the stack that runs now was given documents: a mask is asked for without them."""


@dataclass(frozen=True)
class Call:
    """One attention layer, what it was asked for and how it was computed."""

    layer: nn.Module
    window: int | None
    way: Way


def register() -> None:
    """Make the name `graft` known to `transformers`; nothing changes for models that do not ask for it."""
    AttentionInterface.register(DOCUMENTS, _attention)
    AttentionMaskInterface.register(DOCUMENTS, _mask)


def note_form(stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook before the stack of layers: masks of this call are for documents, or for anything else."""
    _is_flat.set(kwargs.get(STARTS) is not None)


def way_of(x: Tensor) -> Way:
    """How documents are computed where nothing stands against it. Shape of queries: [T, heads, head dim]."""
    if x.device.type == "cpu" and attention_is_native(x.dtype, x.shape[-1]) is None:
        return "native kernel"
    if x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16) and _varlen() is not None:
        return "torch varlen"
    return "document by document"


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _is_flat.get() else ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Shapes: query [B, Hq, T, D], key and value [B, Hkv, T', D] -> [B, T, Hq, D], as for every such."""
    starts: Tensor | None = others.pop(STARTS, None)
    on_device: Tensor | None = others.pop("cu_seq_lens_k", None)
    parents: Tensor | None = others.pop(PARENTS, None)
    longest: int | None = others.pop(LONGEST, None)
    seen: list[Call] | None = others.pop(SEEN, None)
    if starts is None and attention_mask is None and _is_whole(module, query, key, value, dropout, others):
        starts = torch.arange(0, query.shape[0] * query.shape[2] + 1, query.shape[2])
    if starts is None:
        found = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **others,
        )  # fmt: skip
        return found[0], None
    _require_plain(module, attention_mask, others)
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    documents = _Documents(starts, on_device, parents, scale, sliding_window, dropout, longest)
    out, way = documents.attended(q, k, v)
    if seen is not None:
        seen.append(Call(module, sliding_window, way))
    return out.unflatten(0, (query.shape[0], -1)), None


def _is_whole(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, dropout: float, others: dict[str, Any]
) -> bool:
    """Whether each row of a batch is one document from end to end, and the native kernel takes it."""
    fits = query.shape[2] == key.shape[2] > 1 and key.shape == value.shape and dropout == 0
    is_plain = fits and not _changes(module, others)
    return is_plain and not _is_flat.get() and way_of(query) == "native kernel"


def _changes(module: nn.Module, others: dict[str, Any]) -> str:
    """What makes this other than plain causal attention; nothing as a rule."""
    changed = [name for name in OTHER_SCORES if others.get(name) is not None]
    causal = others.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    return ", ".join(changed) or ("" if causal else "attention to later tokens")


def _require_plain(module: nn.Module, mask: Tensor | None, others: dict[str, Any]) -> None:
    why = "a mask of its own" if mask is not None else _changes(module, others)
    if why:
        raise ModelError(
            f"{type(module).__name__} has {why}.",
            meaning="Documents in one row are kept apart without a mask, for plain causal attention only.",
            fix="Give the batch padded, or packed with a mask.",
        )


@dataclass(frozen=True)
class _Documents:
    """Documents one after another; virtual tokens that all of them see may stand before the first.

    starts: [n + 1], int64 on the CPU, the same on_device in int32. parents: [n], int64 on the CPU, the
    document that each one continues and sees all of, or -1. window: how many keys a token sees at most, it
    and virtual ones included.
    """

    starts: Tensor
    on_device: Tensor | None
    parents: Tensor | None
    scale: float
    window: int | None
    dropout: float
    longest: int | None = None
    """No document has more tokens, where batches have one shape and no virtual queries; otherwise the starts
    are read."""

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Way]:
        """Shapes: q [V + T, Hq, D], k and v [P + T, Hkv, D]; the last V of P virtual tokens ask as well."""
        # Compiled and recorded layers are called without virtual queries only; a number read from a tensor
        # would cut their code in two, or stay what it was when they were recorded.
        is_whole = torch.compiler.is_compiling() or self.longest is not None
        tokens = len(q) if is_whole else int(self.starts[-1])
        virtual, shared = len(q) - tokens, len(k) - tokens
        if virtual == 0:
            return self._attend(q, k, v)
        first, rest = q.split([virtual, tokens])
        alone = _Documents(torch.tensor([0, virtual]), None, None, self.scale, self.window, self.dropout)
        seen_first, _ = alone._attend(first, k[:shared], v[:shared])
        seen, way = self._attend(rest, k, v)
        return torch.cat([seen_first, seen]), way

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Way]:
        shared = len(k) - len(q)
        window = self.window
        if window is not None and shared + self._longest(q) <= window:
            window = None
        way = way_of(q)
        in_front = shared > 0 or self.parents is not None
        is_plain = self.dropout == 0 and v.shape == k.shape and not (in_front and window is not None)
        if way == "native kernel" and is_plain:
            return attention(q, k, v, self.starts, scale=self.scale, window=window, parents=self.parents), way
        if way == "torch varlen" and is_plain and shared == 0 and self.on_device is not None:
            return self._varlen(q, k, v, window), way
        return self._one_by_one(q, k, v, window), "document by document"

    def _longest(self, q: Tensor) -> int:
        """Tokens that the last one of a document sees, at most; an upper bound in compiled code, which reads
        no tensor."""
        if self.longest is not None:
            return self.longest
        return len(q) if torch.compiler.is_compiling() else max(map(sum, zip(*self._lengths(), strict=True)))

    def _lengths(self) -> tuple[list[int], list[int]]:
        """Tokens of each document, and of what it continues."""
        lengths = self.starts.diff()
        if self.parents is None:
            return lengths.tolist(), [0] * len(lengths)
        return lengths.tolist(), torch.where(self.parents < 0, 0, lengths[self.parents]).tolist()

    def _varlen(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """FlashAttention counts in a window the keys before the token's own. It aligns queries and keys at
        their ends, so that a document that continues another has that one's keys before its own."""
        varlen = _varlen()
        assert varlen is not None
        longest, ends = self._longest(q), self.on_device
        if self.parents is not None:
            k, v = (torch.cat(self._with_parents(x)) for x in (k, v))
            ends = torch.tensor(
                [0, *accumulate(map(sum, zip(*self._lengths(), strict=True)))], dtype=torch.int32
            )
            ends = ends.to(q.device, non_blocking=True)
        found: Tensor = varlen(
            q, k, v, self.on_device, ends, longest, longest, scale=self.scale,
            window_size=(-1 if window is None else window - 1, 0), enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return found

    def _with_parents(self, x: Tensor) -> list[Tensor]:
        """Keys or values of each document behind those of what it continues."""
        own = x.split(self._lengths()[0])
        if self.parents is None:
            return list(own)
        pairs = zip(own, self.parents.tolist(), strict=True)
        return [each if parent < 0 else torch.cat([own[parent], each]) for each, parent in pairs]

    def _one_by_one(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        shared = len(k) - len(q)
        keys, values = (self._with_parents(x[shared:]) for x in (k, v))
        seen = []
        for queries, *pair in zip(q.split(self._lengths()[0]), keys, values, strict=True):
            if shared:
                pair = [torch.cat(both) for both in zip((k[:shared], v[:shared]), pair, strict=True)]
            mask = _visible(len(queries), len(pair[0]) - len(queries), window, q.device)
            query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (queries, *pair))
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=self.dropout, scale=self.scale,
                is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip
            seen.append(out[0].transpose(0, 1))
        return torch.cat(seen)


def _visible(tokens: int, before: int, window: int | None, device: torch.device) -> Tensor | None:
    """The mask [tokens, before + tokens] of one document, True where seen; None where it is just causal."""
    if before == 0 and (window is None or tokens <= window):
        return None
    rows = torch.arange(before, before + tokens, device=device).unsqueeze(1)
    columns = torch.arange(before + tokens, device=device)
    seen = columns <= rows
    return seen if window is None else seen & (columns > rows - window)


@cache
def _varlen() -> Callable[..., Any] | None:
    """torch's own attention over documents, where this version takes a scale, a window and grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= set(names) else None
