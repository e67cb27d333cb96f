"""The layers of LoRA: a trained product of two thin matrices beside a frozen weight (arXiv 2106.09685).

y = W x + s (B A x + c)        c only with `lora_bias`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core.errors import MergeError
from graftlm.kernels.adapted import Adapted, Frozen, Given, adapted_linears
from graftlm.methods.base import Dense, LayerAdapter
from graftlm.methods.bias import BiasShift
from graftlm.methods.starts.initialise import Origin, start, start_of_table


class LoraLinear(LayerAdapter):
    """The update of one linear layer. Shapes: lora_A [r, in], lora_B [out, r], whatever the base's layout."""

    is_additive: ClassVar[bool] = True
    output_side: ClassVar[tuple[str, ...]] = ("lora_B", "lora_B_bias", "shift.bias")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int,
        scaling: float,
        dropout: float = 0.0,
        init: bool | str = True,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        lora_bias: bool = False,
    ) -> None:
        super().__init__()
        self.scaling, self.dropout = scaling, dropout
        begin = start(init, (out_features, in_features), r, scaling, weight)
        self.lora_A, self.lora_B = nn.Parameter(begin.a), nn.Parameter(begin.b)
        self.origin = Origin(begin) if begin.is_subtracted else None
        self.lora_B_bias = nn.Parameter(torch.zeros(out_features)) if lora_bias else None
        self.shift = BiasShift(bias) if bias is not None else None

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B whose product is the change: those that are trained, or both with those of the start."""
        pair = (self.lora_A, self.lora_B)
        return pair if self.origin is None else self.origin.change(*pair)

    def saved(self) -> dict[str, Tensor]:
        a, b = self.factors()
        return super().saved() | {"lora_A": a.detach(), "lora_B": b.detach()}

    def load_saved(self, tensors: Mapping[str, Tensor]) -> None:
        if self.origin is not None:
            a, b = self.origin.restore(tensors["lora_A"], tensors["lora_B"])
            tensors = {**tensors, "lora_A": a, "lora_B": b}
        super().load_saved(tensors)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return adapted_linears(x.to(y.dtype), [self._changed(Given(y))])[0]

    def change_of(self, layer: Frozen, base: nn.Module) -> Adapted | None:
        return self._changed(layer) if type(self) is LoraLinear else None

    def _changed(self, layer: Frozen | Given) -> Adapted:
        a, b = self.factors()
        dropout = self.dropout if self.training else 0.0
        return Adapted(layer, a, b, self.scaling, dropout, shift=self._shift())

    def _shift(self) -> Tensor | None:
        """What is added to every output."""
        own = None if self.lora_B_bias is None else self.scaling * self.lora_B_bias
        of_bias = None if self.shift is None else self.shift.change()
        return own if of_bias is None else of_bias if own is None else own + of_bias

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        weight = dense["weight"]
        a, b = self.factors()
        delta = b.to(weight.dtype) @ a.to(weight.dtype)
        return {"weight": weight + self.scaling * delta, **self._merged_bias(dense)}

    def _merged_bias(self, dense: Dense) -> dict[str, Tensor]:
        changed = {} if self.shift is None else self.shift.merged(dense)
        if self.lora_B_bias is None:
            return changed
        if "bias" not in dense:
            raise MergeError(
                "The adapter has a bias (lora_bias), and the base layer has none to fold it into.",
                meaning="A merged layer must have the parameters that its model's config describes.",
                fix="Serve the adapter unmerged, or train it with lora_bias=False.",
            )
        bias = changed.get("bias", dense["bias"])
        return {"bias": bias + self.scaling * self.lora_B_bias.to(bias.dtype)}


class LoraEmbedding(LayerAdapter):
    """The update of an embedding. Shapes: lora_embedding_A [r, vocabulary], lora_embedding_B [dim, r]."""

    is_additive: ClassVar[bool] = True
    output_side: ClassVar[tuple[str, ...]] = ("lora_embedding_B",)

    def __init__(
        self,
        base: nn.Embedding,
        *,
        r: int,
        scaling: float,
        init: bool | str = True,
        weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.scaling, self.padding_idx = scaling, base.padding_idx
        self.embed_scale = embedding_scale(base)
        begin = start_of_table(init, (base.embedding_dim, base.num_embeddings), r, scaling, weight)
        self.lora_embedding_A, self.lora_embedding_B = nn.Parameter(begin.a), nn.Parameter(begin.b)
        self.origin = Origin(begin) if begin.is_subtracted else None

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B whose product is the change: those that are trained, or both with those of the start."""
        pair = (self.lora_embedding_A, self.lora_embedding_B)
        return pair if self.origin is None else self.origin.change(*pair)

    def saved(self) -> dict[str, Tensor]:
        a, b = self.factors()
        return super().saved() | {"lora_embedding_A": a.detach(), "lora_embedding_B": b.detach()}

    def load_saved(self, tensors: Mapping[str, Tensor]) -> None:
        if self.origin is not None:
            a, b = self.origin.restore(tensors["lora_embedding_A"], tensors["lora_embedding_B"])
            tensors = {**tensors, "lora_embedding_A": a, "lora_embedding_B": b}
        super().load_saved(tensors)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.update(x).to(y.dtype)

    def update(self, x: Tensor) -> Tensor:
        """What is added to the embeddings of the token ids `x`, [..., dim]."""
        a, b = self.factors()
        rows = F.embedding(x, a.t(), padding_idx=self.padding_idx)
        return rows @ b.t() * (self.scaling * self.embed_scale)

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        weight = dense["weight"]
        a, b = self.factors()
        return {"weight": weight + self.scaling * (b.to(weight.dtype) @ a.to(weight.dtype)).t()}


def embedding_scale(base: nn.Embedding) -> float:
    """The factor that some models (Gemma 3, BART) apply inside the embedding's forward, after the table."""
    return float(getattr(base, "scalar_embed_scale", getattr(base, "embed_scale", 1.0)))
