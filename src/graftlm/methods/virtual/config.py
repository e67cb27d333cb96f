"""The fields that prompt and prefix tuning share, with PEFT's names."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from pydantic import Field
from torch import nn

from graftlm.methods.base import MethodConfig
from graftlm.methods.virtual.stacks import task_of


class VirtualTokensConfig(MethodConfig):
    """A method whose adapter consists of virtual tokens before the real ones."""

    num_virtual_tokens: int = Field(20, gt=0)
    """How many there are."""
    tokenizer_name_or_path: str | None = None
    """The tokenizer that reads the text to begin with; without one, that of the base."""
    tokenizer_kwargs: dict[str, Any] | None = None
    """Arguments for that tokenizer. Code from its folder is never run."""
    token_dim: int | None = Field(None, gt=0)
    """This and what follows describes the base in files; it is taken from the model."""
    num_layers: int | None = Field(None, gt=0)
    num_attention_heads: int | None = Field(None, gt=0)
    num_transformer_submodules: int | None = Field(None, ge=1, le=2)

    @property
    def positions_taken(self) -> int:
        return self.num_virtual_tokens

    def described(self, model: nn.Module) -> dict[str, Any]:
        """The fields that describe the base, as a file has them."""
        task = self.task_type or task_of(model)
        return {"task_type": task, **self._shape(model)}

    @abstractmethod
    def _shape(self, model: nn.Module) -> dict[str, int]:
        """`token_dim`, `num_layers`, `num_attention_heads` and `num_transformer_submodules` of this model."""
