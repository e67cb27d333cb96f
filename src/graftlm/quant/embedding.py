"""Embeddings and output heads in 8 bits: a scale for each token, half the memory of 16 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core.errors import ModelError
from graftlm.kernels.quantised import quantised_linear
from graftlm.quant.linear import QuantisedLinear
from graftlm.quant.module import PackedModule
from graftlm.quant.packed import PackedWeight, encode
from graftlm.quant.scheme import Scheme


class QuantisedEmbedding(PackedModule):
    """`nn.Embedding` with a packed, frozen table [tokens, hidden] of a kind that has a scale for each row."""

    made_from = nn.Embedding

    def __init__(self, packed: PackedWeight, dtype: torch.dtype) -> None:
        super().__init__(packed, dtype)
        self.num_embeddings, self.embedding_dim = packed.shape

    def forward(self, ids: Tensor) -> Tensor:
        """Only the rows that are asked for are decoded. Shapes: ids [...] -> [..., hidden]."""
        if self.dense is not None:
            return F.embedding(ids, self.dense)
        return self.packed.rows(ids.reshape(-1), self.dtype).view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.scheme.kind}"


class TiedHead(nn.Module):
    """An output head that computes with the table of a `QuantisedEmbedding` and holds none of its own.

    Moved, copied or saved, the two stay one.
    """

    def __init__(self, embedding: QuantisedEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple it is no submodule, whose tensors would count twice
        self.out_features, self.in_features = embedding.packed.shape
        self.bias = bias

    @property
    def embedding(self) -> QuantisedEmbedding:
        """Where the weight is."""
        return self._embedding[0]

    @property
    def weight(self) -> Tensor:
        """The dense weight [tokens, hidden]. Decoded at every call."""
        return self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding.dense is not None:
            return F.linear(x, self.embedding.dense, self.bias)
        packed = self.embedding.packed
        scheme = packed.scheme
        return quantised_linear(x, packed.stored, scheme.kind, scheme.block_size, *packed.shape, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, tied"


def packed_head(module: nn.Module) -> PackedWeight | None:
    """What this output head computes with, its own weight or that of the embeddings, where that is packed by
    rows and nothing dense stands in for it."""
    holder = module.embedding if isinstance(module, TiedHead) else module
    if not isinstance(holder, PackedModule) or holder.dense is not None or not holder.scheme.has_row_scales:
        return None
    return holder.packed


@torch.no_grad()
def quantise_embeddings(model: nn.Module, kind: str = "int8") -> list[str]:
    """Store the input embeddings and the output head of a model in 8 bits, in place; returns their paths.

    Tied ones stay tied: the table is stored once. Left as they are: embeddings that do more than look up
    (Gemma's scale theirs), tables that a third module shares, and what is quantised already.

    Args:
        kind: `int8` or `fp8`.

    Raises:
        ModelError: a kind without a scale for each row, or weights that are not finite.
    """
    if not Scheme(kind).has_row_scales:
        raise ModelError(
            f"Embeddings cannot be stored as {kind}.",
            meaning="A row is decoded by itself, so that it needs a scale of its own; others have blocks.",
            fix="Use int8 or fp8.",
        )
    table, head = _ends(model)
    is_tied = type(head) is nn.Linear and getattr(table, "weight", None) is head.weight
    made: dict[str, nn.Module] = {}
    if type(table) is nn.Embedding and _holders(model, table.weight) == 1 + is_tied:
        path = _path_of(model, table)
        embedding = QuantisedEmbedding(_packed(table, kind, path), table.weight.dtype)
        made[path] = embedding
        if is_tied:
            made[_path_of(model, head)] = TiedHead(embedding, head.bias)
    if type(head) is nn.Linear and _holders(model, head.weight) == 1:
        path = _path_of(model, head)
        made[path] = QuantisedLinear(_packed(head, kind, path), head.bias, head.weight.dtype)
    for path, module in made.items():
        model.set_submodule(path, module.train(model.get_submodule(path).training))
    return list(made)


def _ends(model: Any) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _packed(module: nn.Module, kind: str, path: str) -> PackedWeight:
    return encode(module.get_parameter("weight").detach(), Scheme(kind), name=f"{path}.weight")


def _holders(model: nn.Module, weight: object) -> int:
    """How many modules have this very parameter."""
    return sum(any(p is weight for p in module.parameters(recurse=False)) for module in model.modules())


def _path_of(model: nn.Module, wanted: object) -> str:
    return next(str(path) for path, module in model.named_modules() if module is wanted)
