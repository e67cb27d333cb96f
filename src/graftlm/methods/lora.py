"""LoRA: a frozen weight plus a trained product of two thin matrices (Hu et al. 2021, arXiv 2106.09685).

y = W x + s B A x        s = alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.kernels.ops import low_rank_add
from graftlm.methods.base import Dense, Layer, LayerAdapter, Maker, SiteAdapter
from graftlm.methods.bias import BiasShift, has_bias
from graftlm.methods.families import is_linear
from graftlm.methods.layer_config import LayerConfig
from graftlm.methods.site import base_modules

Init = Literal["kaiming", "gaussian", "random"]


class LoraConfig(LayerConfig):
    """LoRA on linear layers, GPT-2's Conv1D and embeddings.

    >>> LoraConfig(r=8, lora_alpha=16).scaling
    2.0
    >>> LoraConfig(r=16, lora_alpha=16, use_rslora=True).scaling
    4.0
    """

    peft_type: ClassVar[str] = "LORA"

    r: int = Field(16, gt=0)
    """Rank of the update."""
    lora_alpha: int | float = Field(32, gt=0)
    """Numerator of the scaling."""
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the input of the update, never on the base's."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""
    init_lora_weights: bool | Literal["gaussian"] = True
    """True: Kaiming-uniform A, zero B. `gaussian`: normal A, deviation 1/r. False: both random (tests)."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Which of the base's biases are trained too: none, those of adapted layers, or all."""

    @property
    def scaling(self) -> float:
        """The factor on B A."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def supports(self, module: nn.Module) -> bool:
        return is_linear(module) or isinstance(module, nn.Embedding)

    def build(self, layer: Layer) -> SiteAdapter:
        init: Init = "kaiming" if self.init_lora_weights else "random"
        if self.init_lora_weights == "gaussian":
            init = "gaussian"
        module = layer.module
        if isinstance(module, nn.Embedding):
            return LoraEmbedding(module, r=self.r, scaling=self.scaling, init=init)
        rows, columns = layer.handle.shape
        bias = module.bias if self.bias != "none" and has_bias(module) else None
        return LoraLinear(
            columns, rows, r=self.r, scaling=self.scaling, dropout=self.lora_dropout, init=init, bias=bias
        )

    def extra(self, model: nn.Module, chosen: Sequence[str]) -> Mapping[str, Maker]:
        if self.bias != "all":
            return {}
        return {
            path: lambda layer: BiasShift(layer.module.get_parameter("bias"))
            for path, module in base_modules(model).items()
            if path not in chosen and has_bias(module)
        }


class LoraLinear(LayerAdapter):
    """The update of one linear layer. Shapes: lora_A [r, in], lora_B [out, r], whatever the base's layout."""

    is_additive: ClassVar[bool] = True
    output_side: ClassVar[tuple[str, ...]] = ("lora_B",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int,
        scaling: float,
        dropout: float = 0.0,
        init: Init = "kaiming",
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.scaling, self.dropout = scaling, dropout
        self.lora_A = nn.Parameter(torch.empty(r, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r))
        self.shift = BiasShift(bias) if bias is not None else None
        if init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if init == "random":
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        y = low_rank_add(y, x.to(y.dtype), self.lora_A, self.lora_B, scale=self.scaling, dropout=dropout)
        return y if self.shift is None else self.shift.post(x, y)

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        weight = dense["weight"]
        delta = self.lora_B.to(weight.dtype) @ self.lora_A.to(weight.dtype)
        changed = {} if self.shift is None else self.shift.merged(dense)
        return {"weight": weight + self.scaling * delta, **changed}


class LoraEmbedding(LayerAdapter):
    """The update of an embedding. Shapes: lora_embedding_A [r, vocabulary], lora_embedding_B [dim, r]."""

    is_additive: ClassVar[bool] = True
    output_side: ClassVar[tuple[str, ...]] = ("lora_embedding_B",)

    def __init__(self, base: nn.Embedding, *, r: int, scaling: float, init: Init = "kaiming") -> None:
        super().__init__()
        self.scaling, self.padding_idx = scaling, base.padding_idx
        self.embed_scale = embedding_scale(base)
        self.lora_embedding_A = nn.Parameter(torch.zeros(r, base.num_embeddings))
        self.lora_embedding_B = nn.Parameter(torch.randn(base.embedding_dim, r))
        if init == "random":
            nn.init.normal_(self.lora_embedding_A)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        rows = F.embedding(x, self.lora_embedding_A.t(), padding_idx=self.padding_idx)
        return y + (rows @ self.lora_embedding_B.t() * (self.scaling * self.embed_scale)).to(y.dtype)

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        weight = dense["weight"]
        a, b = self.lora_embedding_A.to(weight.dtype), self.lora_embedding_B.to(weight.dtype)
        return {"weight": weight + self.scaling * (b @ a).t()}


def embedding_scale(base: nn.Embedding) -> float:
    """The factor that some models (Gemma 3, BART) apply inside the embedding's forward, after the table."""
    return float(getattr(base, "scalar_embed_scale", getattr(base, "embed_scale", 1.0)))
