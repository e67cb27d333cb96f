"""Prompt tuning: trained vectors that stand before the input, as if they were tokens (Lester et al. 2021,
arXiv 2104.08691). In an encoder-decoder they stand before the input of the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from graftlm.core.errors import TargetError
from graftlm.methods.base import Layer, Maker
from graftlm.methods.site import Site
from graftlm.methods.virtual.config import VirtualTokensConfig
from graftlm.methods.virtual.rows import InputTokens
from graftlm.methods.virtual.stacks import argument_names, is_encoder_decoder, stack_path
from graftlm.methods.virtual.text import token_ids


class PromptTuningConfig(VirtualTokensConfig):
    """Prompt tuning on any `transformers` model that reads tokens.

    In an encoder-decoder twice as many vectors are stored, as PEFT has it, of which the second half is idle;
    `num_transformer_submodules=1` saves those.

    >>> PromptTuningConfig(num_virtual_tokens=8).positions_taken
    8
    """

    peft_type: ClassVar[str] = "PROMPT_TUNING"

    prompt_tuning_init: Literal["SAMPLE_VOCAB", "TEXT", "RANDOM"] = "SAMPLE_VOCAB"
    """Begin with embeddings of random tokens, with those of a text, or with standard normal numbers, which
    lie far from every token."""
    prompt_tuning_init_text: str | None = None
    """The text to begin with (`TEXT`), repeated or cut to the number of virtual tokens."""

    @property
    def rate_scale(self) -> float:
        return 15.0

    @model_validator(mode="after")
    def _text_is_whole(self) -> PromptTuningConfig:
        if self.prompt_tuning_init == "TEXT" and not self.prompt_tuning_init_text:
            raise ValueError("prompt_tuning_init: TEXT needs prompt_tuning_init_text")
        if self.prompt_tuning_init != "TEXT" and self.tokenizer_kwargs:
            raise ValueError("tokenizer_kwargs: used with prompt_tuning_init TEXT only")
        return self

    def places(self, model: nn.Module) -> Mapping[str, Maker]:
        path = stack_path(model, "encoder" if is_encoder_decoder(model) else "backbone")
        stack = model.get_submodule(path)
        arguments = argument_names(stack)
        if "use_cache" in arguments and "past_key_values" not in arguments:
            raise TargetError(
                f"{type(model).__name__} keeps a state, not a cache of keys and values.",
                meaning="What it has read of a prompt could not be told from the rest.",
                fix="Use an adapter of layers.",
            )
        if not isinstance(_table(stack), nn.Module) or "inputs_embeds" not in arguments:
            raise TargetError(
                f"{type(model).__name__} does not read embeddings.",
                meaning="A prompt stands among the embeddings of the tokens.",
                fix="Use prefix tuning, or an adapter of layers.",
            )
        count = self.num_virtual_tokens * self._submodules(model)
        return {path: lambda layer: self._build(layer, count)}

    def _submodules(self, model: nn.Module) -> int:
        return (self.num_transformer_submodules or 2) if is_encoder_decoder(model) else 1

    def _shape(self, model: nn.Module) -> dict[str, int]:
        config: Any = model.config
        config = config.get_text_config() if not is_encoder_decoder(model) else config
        return {
            "token_dim": config.hidden_size,
            "num_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_transformer_submodules": self._submodules(model),
        }

    def _build(self, layer: Layer, count: int) -> Prompt:
        table = _table(layer.module)
        vocabulary, dim = table.weight.shape
        vectors = torch.randn(count, dim)
        if self.prompt_tuning_init != "RANDOM":
            ids = torch.randint(0, vocabulary, (count,))
            if self.prompt_tuning_init == "TEXT":
                assert self.prompt_tuning_init_text is not None
                ids = token_ids(
                    self.prompt_tuning_init_text,
                    count,
                    tokenizer=self.tokenizer_name_or_path,
                    base=layer.module,
                    options=self.tokenizer_kwargs or {},
                )
            with torch.no_grad():
                vectors = table(ids.to(table.weight.device)).float()
        return Prompt(vectors, self.num_virtual_tokens)


def _table(stack: Any) -> Any:
    """The base's token embeddings, without adapters."""
    table = stack.get_input_embeddings()
    return table.base_layer if isinstance(table, Site) else table


class Prompt(InputTokens):
    """The vectors. Shape of `prompt_embeddings`: [n, hidden size], or [2 n, ...] in some files of PEFT."""

    def __init__(self, vectors: Tensor, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.prompt_embeddings = nn.Parameter(vectors.detach().clone())

    def embeddings(self) -> Tensor:
        return self.prompt_embeddings[: self.tokens]
