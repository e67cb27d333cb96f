"""Operators on packed weights: schema, shape function, autograd, public function.

Nothing is kept for backward but the packed weight itself, which needs no gradient; it is read again there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graftlm.kernels import decoding, fp8_products, quantised_cpu, quantised_cuda
from graftlm.kernels.ops import LIBRARY

STORED = "Tensor[] stored, str kind, int block, int rows, int columns"
LIBRARY.define(f"decode({STORED}, ScalarType dtype) -> Tensor")
LIBRARY.define(f"quantised_linear(Tensor x, {STORED}, Tensor? bias) -> Tensor")
LIBRARY.define(f"quantised_linear_backward(Tensor grad, {STORED}) -> Tensor")
LIBRARY.define(f"quantised_linear_accumulate(Tensor(a!) out, Tensor grad, {STORED}) -> ()")
for _forms, _key, _multiply in (
    (decoding, "CompositeExplicitAutograd", fp8_products.multiply_as_defined),
    (quantised_cpu, "CPU", fp8_products.multiply_in_8_bits),
    (quantised_cuda, "CUDA", fp8_products.multiply_in_8_bits),
):
    LIBRARY.impl("decode", _forms.decode, _key)
    LIBRARY.impl("quantised_linear", fp8_products.by_kind(_forms.quantised_linear, _multiply), _key)
    _backward = fp8_products.backward_by_kind(_forms.quantised_linear_backward, _multiply)
    LIBRARY.impl("quantised_linear_backward", _backward, _key)


def _accumulate(
    out: Tensor, grad: Tensor, stored: Sequence[Tensor], kind: str, block: int, rows: int, columns: int
) -> None:
    """`out += grad W`, the gradient of the input where other layers have one too. Shapes: [T, columns]."""
    out += torch.ops.graft.quantised_linear_backward(grad, stored, kind, block, rows, columns)


LIBRARY.impl("quantised_linear_accumulate", _accumulate, "CompositeExplicitAutograd")
LIBRARY.impl(
    "quantised_linear_accumulate",
    fp8_products.accumulate_by_kind(
        quantised_cpu.quantised_linear_accumulate, fp8_products.multiply_in_8_bits
    ),
    "CPU",
)


@torch.library.register_fake("graft::decode", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _decode_shape(
    stored: Sequence[Tensor], kind: str, block: int, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    return stored[0].new_empty((rows, columns), dtype=dtype)


@torch.library.register_fake("graft::quantised_linear", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _linear_shape(
    x: Tensor,
    stored: Sequence[Tensor],
    kind: str,
    block: int,
    rows: int,
    columns: int,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape[0], rows)


@torch.library.register_fake("graft::quantised_linear_backward", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _backward_shape(
    grad: Tensor, stored: Sequence[Tensor], kind: str, block: int, rows: int, columns: int
) -> Tensor:
    return grad.new_empty(grad.shape[0], columns)


@torch.library.register_fake("graft::quantised_linear_accumulate", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _accumulate_shape(
    out: Tensor, grad: Tensor, stored: Sequence[Tensor], kind: str, block: int, rows: int, columns: int
) -> None:
    return None


def _forward(
    x: Tensor, stored: Sequence[Tensor], kind: str, block: int, rows: int, columns: int, bias: Tensor | None
) -> Tensor:
    flat = x.reshape(-1, columns)
    out = torch.ops.graft.quantised_linear(flat, list(stored), kind, block, rows, columns, bias)
    result: Tensor = torch.ops.aten._unsafe_view(out, (*x.shape[:-1], rows))
    return result


class _QuantisedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        kind: str,
        block: int,
        rows: int,
        columns: int,
        *stored: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.layout = (kind, block, rows, columns)
        return _forward(x, stored, kind, block, rows, columns, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        stored = ctx.saved_tensors  # once: activation checkpointing allows no second look
        kind, block, rows, columns = ctx.layout
        need_x, need_bias = ctx.needs_input_grad[:2]
        flat = grad.reshape(-1, rows)
        dx = None
        if need_x:
            dx = torch.ops.graft.quantised_linear_backward(
                flat, list(stored), kind, block, rows, columns
            ).view(*grad.shape[:-1], columns)
        return dx, flat.sum(0) if need_bias else None, *([None] * (4 + len(stored)))


def decode(
    stored: Sequence[Tensor], kind: str, block: int, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight [rows, columns] of the tensors `stored` (`decoding.PARTS`), rounded once."""
    result: Tensor = torch.ops.graft.decode(list(stored), kind, block, rows, columns, dtype)
    return result


def quantised_linear(
    x: Tensor, stored: Sequence[Tensor], kind: str, block: int, rows: int, columns: int, bias: Tensor | None
) -> Tensor:
    """`x W^T + bias` with a packed W; the gradient flows to `x` and `bias`.

    Shapes: x [..., columns], bias [rows] or None -> [..., rows], in the dtype of x; inside autocast in the
    dtype that it asks for, as every linear layer.
    """
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    needs_gradient = x.requires_grad or (bias is not None and bias.requires_grad)
    if not (needs_gradient and torch.is_grad_enabled()):
        return _forward(x, stored, kind, block, rows, columns, bias)
    result: Tensor = _QuantisedLinear.apply(x, bias, kind, block, rows, columns, *stored)  # type: ignore[no-untyped-call]
    return result
