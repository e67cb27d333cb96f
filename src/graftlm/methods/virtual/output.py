"""What a caller sees of a call with virtual tokens: the same as without them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.utils import ModelOutput


def without_front(
    output: Any,
    hidden: int,
    total: int,
    *,
    order: Tensor | None = None,
    view: Cache | None = None,
    cache: Cache | None = None,
) -> Any:
    """The output of a call without the first `hidden` of its `total` positions, and without the view.

    `order` [B, total] says for each position where the stack computed it. In attention weights [B, heads,
    rows, columns] the columns stay as they are.
    """

    def plain(value: Any) -> Any:
        if view is not None and value is view:
            return cache
        if isinstance(value, Tensor):
            dim = {3: 1, 4: 2}.get(value.dim())
            if dim is None or value.shape[dim] != total:
                return value
            value = value if order is None else in_order(value, order, dim)
            return value.narrow(dim, hidden, total - hidden) if hidden else value
        return tuple(map(plain, value)) if type(value) is tuple else value

    if isinstance(output, ModelOutput):
        return type(output)(**{key: plain(value) for key, value in output.items()})
    return plain(output)


def in_order(values: Tensor, order: Tensor, dim: int) -> Tensor:
    """Each row's entries along `dim` in the order that `order` [B, entries] gives."""
    shape = [1] * values.dim()
    shape[0], shape[dim] = order.shape
    return values.gather(dim, order.view(shape).expand_as(values))
