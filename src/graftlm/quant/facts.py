"""What modules say about themselves, whatever their weights are stored in: dtype, device, numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.quant.embedding import QuantisedEmbedding, TiedHead
from graftlm.quant.foreign import is_foreign
from graftlm.quant.linear import QuantisedLinear
from graftlm.quant.module import PackedModule
from graftlm.quant.weights import DENSE_TYPES, WeightHandle


def is_packed(module: nn.Module) -> bool:
    """Whether the module is a linear layer whose weight is stored in few bits, here or by bitsandbytes.

    >>> is_packed(nn.Linear(2, 2))
    False
    """
    return isinstance(module, QuantisedLinear) or is_foreign(module)


def is_in_few_bits(module: nn.Module) -> bool:
    """Whether the module computes with a weight in few bits: such a linear layer, an embedding, or a head
    that takes the embedding's."""
    return is_packed(module) or isinstance(module, QuantisedEmbedding | TiedHead)


def on_meta(module: Any) -> nn.Module:
    """The dense module that one with a weight in few bits stands for, without memory."""
    if isinstance(module, QuantisedEmbedding):
        return nn.Embedding(module.num_embeddings, module.embedding_dim, device="meta", dtype=torch.float32)
    shape = (module.in_features, module.out_features)
    return nn.Linear(*shape, bias=module.bias is not None, device="meta", dtype=torch.float32)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The floating dtype that a module's weights have, or are read in where they are packed."""
    found = next(_dtypes(module), None)
    return torch.get_default_dtype() if found is None else found


def device_of(module: nn.Module) -> torch.device:
    """Where the module computes: where its weights lie, unless these are elsewhere for the time being."""
    inner, tensor = next(_tensors(module))
    computes_on: torch.device | None = vars(inner).get("computes_on")
    return tensor.device if computes_on is None else computes_on


def counted(model: nn.Module) -> Iterator[tuple[bool, int]]:
    """(whether it is trained, how many numbers it stands for) for every parameter and packed weight.

    >>> sum(count for _, count in counted(nn.Linear(3, 4)))
    16
    """
    packed: list[Any] = [module for module in model.modules() if is_packed(module)]
    yield from ((False, layer.in_features * layer.out_features) for layer in packed)
    tables = [module for module in model.modules() if isinstance(module, QuantisedEmbedding)]
    yield from ((False, table.num_embeddings * table.embedding_dim) for table in tables)
    theirs = {id(layer._parameters.get(name)) for layer in packed for name in ("weight", "dense")}
    yield from ((p.requires_grad, p.numel()) for p in model.parameters() if id(p) not in theirs)


def _dtypes(module: nn.Module) -> Iterator[torch.dtype]:
    for inner in module.modules():
        if isinstance(inner, PackedModule):
            yield inner.dtype
        elif is_foreign(inner):
            yield WeightHandle(inner).dtype
        yield from (p.dtype for p in inner.parameters(recurse=False) if p.dtype in DENSE_TYPES)


def _tensors(module: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Every tensor with the module that holds it."""
    yield from ((inner, tensor) for inner in module.modules() for tensor in inner.parameters(recurse=False))
    # Of a packed layer without a bias:
    yield from ((inner, tensor) for inner in module.modules() for tensor in inner.buffers(recurse=False))
