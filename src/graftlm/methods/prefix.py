"""Prefix tuning: trained keys and values that every attention layer finds before the real tokens (Li and
Liang 2021, arXiv 2101.00190). In an encoder-decoder they stand before the tokens of the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from graftlm.core.errors import TargetError
from graftlm.methods.base import Layer, Maker
from graftlm.methods.virtual.config import VirtualTokensConfig
from graftlm.methods.virtual.real_prefix import real_states
from graftlm.methods.virtual.rows import CacheTokens
from graftlm.methods.virtual.stacks import (
    KeyValues,
    argument_names,
    is_encoder_decoder,
    key_values,
    stack_path,
)
from graftlm.methods.virtual.text import token_ids


class PrefixTuningConfig(VirtualTokensConfig):
    """Prefix tuning on any `transformers` model whose attention reads a cache.

    In an encoder-decoder of L layers, layer i reads slot 2 i mod L of the file, as in PEFT, so that pairs of
    layers share a prefix if L is even. With `num_transformer_submodules=1` every layer has its own; such a
    file PEFT cannot read.

    >>> PrefixTuningConfig(num_virtual_tokens=8, prefix_projection=True).positions_taken
    8
    """

    peft_type: ClassVar[str] = "PREFIX_TUNING"

    prefix_projection: bool = False
    """Train a small network that computes the prefix, which is what a file holds, instead of the prefix."""
    encoder_hidden_size: int | None = Field(None, gt=0)
    """Width of that network; `token_dim` without it."""
    init_weights: Literal["zero", "text"] | None = None
    """Begin with standard normal numbers (None; with a projection, its default), with zeros, or with the keys
    and values of a text."""
    init_text: str | None = None
    """The text to begin with (`text`), repeated or cut to the number of virtual tokens."""

    @property
    def rate_scale(self) -> float:
        return 3.0

    @model_validator(mode="after")
    def _text_is_whole(self) -> PrefixTuningConfig:
        if (self.init_weights == "text") != bool(self.init_text):
            raise ValueError("init_weights: 'text' and init_text belong together")
        return self

    def described(self, model: nn.Module) -> dict[str, Any]:
        fields = super().described(model)
        return fields | {"encoder_hidden_size": self.encoder_hidden_size or fields["token_dim"]}

    def portable(self) -> PrefixTuningConfig:
        return self.replace(prefix_projection=False)

    def places(self, model: nn.Module) -> Mapping[str, Maker]:
        path = stack_path(model, "decoder" if is_encoder_decoder(model) else "backbone")
        stack = model.get_submodule(path)
        if "past_key_values" not in argument_names(stack):
            raise TargetError(
                f"The layers of {type(model).__name__} read no cache.",
                meaning="A prefix stands in the cache of keys and values.",
                fix="Use prompt tuning, or an adapter of layers.",
            )
        shape = key_values(model, stack)
        self._require_fit(model)
        is_paired = is_encoder_decoder(model) and self.num_transformer_submodules != 1
        order = tuple(2 * layer % shape.layers if is_paired else layer for layer in range(shape.layers))
        return {path: lambda layer: self._build(layer, Slots(shape, order))}

    def _shape(self, model: nn.Module) -> dict[str, int]:
        is_pair = is_encoder_decoder(model)
        shape = key_values(
            model, model.get_submodule(stack_path(model, "decoder" if is_pair else "backbone"))
        )
        return {
            "token_dim": shape.heads * shape.head_dim,
            "num_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_transformer_submodules": (self.num_transformer_submodules or 2) if is_pair else 1,
        }

    def _require_fit(self, model: nn.Module) -> None:
        wrong = [
            f"{name}: {getattr(self, name)}, but the model has {value}"
            for name, value in self._shape(model).items()
            if getattr(self, name) not in (None, value)
        ]
        if wrong:
            raise TargetError(
                "The prefix does not fit this model.", problems=wrong, fix="Leave these fields out."
            )

    def _build(self, layer: Layer, slots: Slots) -> CacheTokens:
        start = None
        if self.init_text is not None:
            options = self.tokenizer_kwargs or {}
            ids = token_ids(
                self.init_text,
                self.num_virtual_tokens,
                tokenizer=self.tokenizer_name_or_path,
                base=layer.module,
                options=options,
            )
            start = slots.filled(real_states(layer.module, ids, slots.shape))
        is_zero = self.init_weights is not None
        if not self.prefix_projection:
            if start is None:
                make = torch.zeros if is_zero else torch.randn
                start = make(self.num_virtual_tokens, slots.shape.width)
            return Prefix(start, slots)
        width = self.encoder_hidden_size or slots.token_dim
        return ProjectedPrefix(self.num_virtual_tokens, slots, width, start=start, is_zero=is_zero)


@dataclass(frozen=True)
class Slots:
    """How a flat prefix [n, layers x (keys, values) x heads x size] is dealt: layer i reads `order[i]`."""

    shape: KeyValues
    order: tuple[int, ...]

    @property
    def token_dim(self) -> int:
        return self.shape.heads * self.shape.head_dim

    def dealt(self, prefix: Tensor) -> Tensor:
        """[layers, 2, heads, n, head size], for the layers in their order."""
        shape = self.shape
        slots = prefix.view(len(prefix), shape.layers, 2, shape.heads, shape.head_dim).permute(1, 2, 3, 0, 4)
        return slots if self.order == tuple(range(shape.layers)) else slots[list(self.order)]

    def filled(self, states: Tensor) -> Tensor:
        """A flat prefix with the states of each slot's first reader; slots that nobody reads get those of the
        layer of their number."""
        readers = [self.order.index(slot) if slot in self.order else slot for slot in range(len(states))]
        return states[readers].permute(3, 0, 1, 2, 4).reshape(states.shape[3], -1)


class Prefix(CacheTokens):
    """The prefix itself. Shape of `prompt_embeddings`: [n, layers x (keys, values) x heads x head size]."""

    def __init__(self, start: Tensor, slots: Slots) -> None:
        super().__init__()
        self.slots = slots
        self.prompt_embeddings = nn.Parameter(start.detach().clone())

    def states(self) -> Tensor:
        return self.slots.dealt(self.prompt_embeddings)


class ProjectedPrefix(CacheTokens):
    """start + W2 tanh(W1 e): a prefix that a small network computes from one vector per token.

    `start` is fixed: nothing, the prefix of a text, or what a file held, from which training goes on.
    """

    start: Tensor

    def __init__(
        self, tokens: int, slots: Slots, width: int, *, start: Tensor | None = None, is_zero: bool = False
    ) -> None:
        super().__init__()
        self.slots = slots
        whole = slots.shape.width
        self.embedding = nn.Embedding(tokens, slots.token_dim)
        self.transform = nn.Sequential(nn.Linear(slots.token_dim, width), nn.Tanh(), nn.Linear(width, whole))
        self.register_buffer("start", torch.zeros(tokens, whole) if start is None else start.detach())
        if is_zero or start is not None:
            self._silence()

    def states(self) -> Tensor:
        return self.slots.dealt(self.folded())

    def folded(self) -> Tensor:
        """The prefix itself. Shape: [n, layers x (keys, values) x heads x head size]."""
        change: Tensor = self.transform(self.embedding.weight)
        return self.start + change

    @torch.no_grad()
    def saved(self) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.folded()}

    @torch.no_grad()
    def load_saved(self, tensors: Mapping[str, Tensor]) -> None:
        if "prompt_embeddings" in tensors:
            self.start.copy_(tensors["prompt_embeddings"])
            self._silence()

    @torch.no_grad()
    def _silence(self) -> None:
        for parameter in self.transform[-1].parameters():
            parameter.zero_()
