"""A view of a model's cache with virtual tokens in front, while the cache itself holds real tokens only.

Whoever made the cache (`generate`, a caller who continues a conversation) therefore finds in it what
would be there without adapters: as many positions as tokens, to be reordered, cropped or copied at will.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache

from graftlm.core.errors import ModelError

States = tuple[Tensor, Tensor]
"""Keys and values of one layer, [rows, heads, tokens, head_dim]; one row stands for all."""


@dataclass
class Recording:
    """Keys and values of virtual tokens that are part of the input, by layer, as the model computes them."""

    width: int
    layers: dict[int, States] = field(default_factory=dict)


class PrefixedCache(Cache):  # type: ignore[misc]
    """`prefix`, what `inner` holds, and the new tokens, as one. Without `inner` nothing is kept.

    The first `recording.width` of the new tokens are virtual: they are recorded and not put into `inner`.
    A layer with a sliding window that no longer reaches back to the first token has no prefix any more.
    """

    def __init__(
        self, inner: Cache | None, prefix: Mapping[int, States], recording: Recording | None = None
    ) -> None:
        super().__init__(layers=[] if inner is None else inner.layers)
        self.inner, self.prefix, self.recording = inner, prefix, recording
        self.width = next(iter(prefix.values()))[0].shape[2] if prefix else 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> States:
        fresh = 0 if self.recording is None else self.recording.width
        new, virtual = _split(key_states, value_states, fresh)
        if self.recording is not None:
            self.recording.layers[layer_idx] = virtual
        reaches_back = self._offset(new[0].shape[2], layer_idx) == 0
        seen = new if self.inner is None else self.inner.update(*new, layer_idx, *args, **kwargs)
        if not reaches_back:
            return seen
        first = [_like(self.prefix[layer_idx], key_states)] if self.width else []
        keys, values = zip(*first, *([virtual] if fresh else []), seen, strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions before the new tokens."""
        return self.width + (0 if self.inner is None else self.inner.get_seq_length(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(columns, position of the first one) of what `update` will return."""
        if self.inner is None:
            return self.width + query_length, 0
        fresh = 0 if self.recording is None else self.recording.width
        length, offset = self.inner.get_mask_sizes(query_length - fresh, layer_idx)
        before = self.width + fresh
        return (length + before, 0) if offset == 0 else (length, offset + before)

    def _offset(self, new_tokens: int, layer_idx: int) -> int:
        return 0 if self.inner is None else self.inner.get_mask_sizes(new_tokens, layer_idx)[1]


class _Forgetful(dict[int, bool]):
    """Nothing is ever up to date: in training, a layer computed again must not read what it stored."""

    def __setitem__(self, layer_idx: int, is_updated: bool) -> None:
        return


def prefixed(
    cache: Cache | None, prefix: Mapping[int, States], recording: Recording | None, *, is_decoder: bool
) -> Cache:
    """The view of `cache` to hand to a stack; `is_decoder`: it also attends to an encoder."""
    if isinstance(cache, EncoderDecoderCache):
        view = EncoderDecoderCache(
            PrefixedCache(cache.self_attention_cache, prefix, recording), cache.cross_attention_cache
        )
        view.is_updated = cache.is_updated
        return view
    if is_decoder and cache is None:
        view = EncoderDecoderCache(PrefixedCache(None, prefix, recording), PrefixedCache(None, {}))
        view.is_updated = _Forgetful()
        return view
    return PrefixedCache(cache, prefix, recording)


def new_cache(config: Any, *, is_decoder: bool) -> Cache:
    """An empty cache, as a stack makes it where none is given."""
    if is_decoder:
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    return DynamicCache(config=config)


def is_filled(cache: Cache | None) -> bool:
    """Whether the cache holds tokens of an earlier call."""
    return cache is not None and bool(cache.get_seq_length() > 0)


def _split(keys: Tensor, values: Tensor, fresh: int) -> tuple[States, States]:
    if not fresh:
        return (keys, values), (keys, values)
    return (keys[:, :, fresh:], values[:, :, fresh:]), (keys[:, :, :fresh], values[:, :, :fresh])


def _like(states: States, other: Tensor) -> States:
    """One row for each row of `other`, on its device, in its dtype."""
    wanted, found = other.shape[1::2], states[0].shape[1::2]
    if wanted != found:
        raise ModelError(
            f"The prefix has {found[0]} heads of {found[1]} numbers, the keys of this layer {wanted[0]} of "
            f"{wanted[1]}.",
            meaning="The model's config does not say how its attention caches.",
            fix="Use prompt tuning, or an adapter of layers.",
        )
    keys, values = (one.to(other.device, other.dtype).expand(other.shape[0], -1, -1, -1) for one in states)
    return keys, values
