"""DoRA: LoRA for the directions of a weight's rows, trained magnitudes for their lengths (arXiv 2402.09353).

y = m / |W + s B A| * (W x + s B A x) + bias        |.| per row, a constant for gradients as in the paper

The base layer computes W x as it always does, and B A is never formed (`kernels.lengths`). A row of zeros,
of length 0, stays a row of zeros.

Dropout acts on the input of B A alone, as in LoRA. (PEFT also drops inputs of the part of W x that the
magnitudes add.) Without dropout the two agree.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftlm.kernels.adapted import Adapted, Frozen, Given, adapted_linears
from graftlm.kernels.lengths import changed_lengths
from graftlm.kernels.ops import row_products
from graftlm.methods.base import Dense, Part, SiteAdapter
from graftlm.methods.low_rank import LoraEmbedding, LoraLinear
from graftlm.quant.weights import WeightHandle


class DoraLinear(SiteAdapter):
    """A LoRA of one linear layer with trained lengths of the rows. Shape: magnitude [out]."""

    output_side: ClassVar[tuple[str, ...]] = (*(f"lora.{n}" for n in LoraLinear.output_side), "magnitude")

    def __init__(self, lora: LoraLinear, weight: Tensor) -> None:
        """`weight` [out, in] is the base's; the adapted layer starts with the lengths that its rows have."""
        super().__init__()
        self.lora = lora
        self._rows = KnownRows()
        a, b = lora.factors()
        self.magnitude = nn.Parameter(changed_lengths(*row_products(weight, a), a, b, lora.scaling))

    def forward(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y, bias = base(x, *args, **kwargs), getattr(base, "bias", None)
        layer = Given(y, None if bias is None else bias.detach().to(y.dtype))
        y = adapted_linears(x.to(y.dtype), [self._changed(layer, base)])[0]
        return y if self.lora.shift is None else self.lora.shift.post(x, y)

    def change_of(self, layer: Frozen, base: nn.Module) -> Adapted | None:
        return self._changed(layer, base) if self.lora.shift is None else None

    def _changed(self, layer: Frozen | Given, base: nn.Module) -> Adapted:
        lora = self.lora
        a, b = lora.factors()
        squares, products = self._rows.products(WeightHandle(base), a)
        lengthened = gain(self.magnitude, changed_lengths(squares, products, a, b, lora.scaling))
        return Adapted(layer, a, b, lora.scaling, lora.dropout if self.training else 0.0, lengthened)

    def saved(self) -> dict[str, Tensor]:
        return _saved(self.lora, self.magnitude)

    def load_saved(self, tensors: Mapping[str, Tensor]) -> None:
        _load_saved(self.lora, self.magnitude, tensors)

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        changed = self.lora.merged(dense)
        norms = torch.linalg.vector_norm(changed["weight"], dim=1)
        return {**changed, "weight": changed["weight"] * gain(self.magnitude, norms).unsqueeze(1)}


class DoraEmbedding(SiteAdapter):
    """A LoRA of one embedding with trained lengths of the table's columns. Shape: magnitude [dim]."""

    output_side: ClassVar[tuple[str, ...]] = (*(f"lora.{n}" for n in LoraEmbedding.output_side), "magnitude")

    def __init__(self, lora: LoraEmbedding, table: Tensor) -> None:
        """`table` [vocabulary, dim] is the base's."""
        super().__init__()
        self.lora = lora
        self._rows = KnownRows()
        a, b = lora.factors()
        self.magnitude = nn.Parameter(changed_lengths(*row_products(table.t(), a), a, b, lora.scaling))

    def forward(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = base(x, *args, **kwargs)
        a, b = self.lora.factors()
        squares, products = self._rows.products(WeightHandle(base), a, of_columns=True)
        change = gain(self.magnitude, changed_lengths(squares, products, a, b, self.lora.scaling)) - 1
        total = y + self.lora.update(x).to(y.dtype)
        return torch.addcmul(total, total, change.to(y.dtype))

    def saved(self) -> dict[str, Tensor]:
        return _saved(self.lora, self.magnitude)

    def load_saved(self, tensors: Mapping[str, Tensor]) -> None:
        _load_saved(self.lora, self.magnitude, tensors)

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        table = self.lora.merged(dense)["weight"]
        return {"weight": table * gain(self.magnitude, torch.linalg.vector_norm(table, dim=0))}


def gain(magnitude: Tensor, norms: Tensor) -> Tensor:
    """The factor on every row of the changed weight; 0 where there is nothing to scale.

    >>> gain(torch.tensor([3.0, 0.0]), torch.tensor([2.0, 0.0]))
    tensor([1.5000, 0.0000])
    """
    return magnitude.to(norms.dtype) / norms.masked_fill(norms == 0, 1.0)


def _saved(lora: Part, magnitude: Tensor) -> dict[str, Tensor]:
    return {f"lora.{name}": tensor for name, tensor in lora.saved().items()} | {
        "magnitude": magnitude.detach()
    }


@torch.no_grad()
def _load_saved(lora: Part, magnitude: Tensor, tensors: Mapping[str, Tensor]) -> None:
    names = {f"lora.{name}": name for name in lora.saved()}
    lora.load_saved({names[key]: tensor for key, tensor in tensors.items() if key in names})
    if "magnitude" in tensors:
        magnitude.copy_(tensors["magnitude"])


class KnownRows:
    """`row_products` of one base layer, remembered while what they come from has not changed.

    The squares hold as long as the weight is stored in the same tensor in the same version. The products
    change with A, that is with every step of training; without gradients (generation, evaluation) they are
    kept too, which saves r times the work of the layer itself for every token that is generated, and the
    decoding of a packed weight.
    """

    def __init__(self) -> None:
        self._stored: Callable[[], Tensor | None] = lambda: None
        self._key: tuple[Any, ...] = ()
        self._squares = torch.empty(0)
        self._a: Tensor | None = None
        self._products = torch.empty(0)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy remembers nothing: it belongs to the copy of the base."""
        return KnownRows, ()

    def products(self, handle: WeightHandle, a: Tensor, *, of_columns: bool = False) -> tuple[Tensor, Tensor]:
        """(squares, products) of the base's weight, or of its columns as an embedding has it."""
        stored = handle.stored
        is_rememberable = not (torch.compiler.is_compiling() or stored.is_meta or stored.is_inference())
        key = (stored._version, stored.data_ptr(), handle.dtype) if is_rememberable else ()
        is_known = is_rememberable and self._stored() is stored and self._key == key
        if is_known and self._a is not None and _is_equal(a, self._a):
            return self._squares, self._products
        weight = handle.weight().t() if of_columns else handle.weight()
        squares, products = row_products(weight, a, need_squares=not is_known)
        if not is_rememberable:
            return squares, products
        if not is_known:
            self._stored, self._key, self._squares = weakref.ref(stored), key, squares
        self._a = None if torch.is_grad_enabled() else a.detach().clone()
        self._products = products if self._a is not None else torch.empty(0)
        return self._squares, products


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
