"""Products with a base in FP8 where both sides are 8 bits: e4m3 numbers, a float32 scale for each row.

Forward: x is rounded to 8 bits row by row, W is stored so. Backward: in `grad W` the scales of W lie along
the dimension that is summed, so they are multiplied into the gradient before it is rounded: no scale is lost.
Nothing but these two roundings differs from reading W into 16 bits; sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from graftlm.kernels.encoding import FLOAT8, encode_rows_fp8
from graftlm.kernels.triton.forms import triton_form

FP8_PRODUCTS = "fp8_products"
"""The kind under which operators take a weight stored in `fp8` that is multiplied in 8 bits too."""
STEP = 16
"""Both sides of a weight must be multiples of this for tensor cores."""

Multiply = Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]


def linear(x: Tensor, stored: Sequence[Tensor], bias: Tensor | None, multiply: Multiply) -> Tensor:
    """`x W^T + bias`. Shapes: x [T, K], codes [N, K], scales [N], bias [N] -> [T, N], in the dtype of x."""
    codes, scales = stored
    left, factors = _rounded_rows(x, None)
    out = multiply(left, factors, codes.t(), scales.unsqueeze(0), x.dtype)
    return out if bias is None else out.add_(bias.to(x.dtype))


def linear_backward(grad: Tensor, stored: Sequence[Tensor], multiply: Multiply) -> Tensor:
    """`grad W`. Shapes: grad [T, N], codes [N, K], scales [N] -> [T, K], in the dtype of grad."""
    codes, scales = stored
    left, factors = _rounded_rows(grad, scales)
    ones = torch.ones((1, codes.shape[1]), dtype=torch.float32, device=codes.device)
    return multiply(left, factors, codes.t().contiguous().t(), ones, grad.dtype)


def multiply_as_defined(
    left: Tensor, left_scales: Tensor, right: Tensor, right_scales: Tensor, dtype: torch.dtype
) -> Tensor:
    """The product in float32, scaled, rounded once. Shapes: [T, K], [T, 1], [K, N], [1, N] -> [T, N]."""
    return ((left.float() @ right.float()) * left_scales * right_scales).to(dtype)


def multiply_in_8_bits(
    left: Tensor, left_scales: Tensor, right: Tensor, right_scales: Tensor, dtype: torch.dtype
) -> Tensor:
    """`multiply_as_defined` on tensor cores, rounded to bfloat16 first; `right` lies column by column."""
    out = torch._scaled_mm(
        *(left, right), scale_a=left_scales, scale_b=right_scales.contiguous(), out_dtype=torch.bfloat16
    )
    return out.to(dtype)


@cache
def why_not(device: torch.device) -> str | None:
    """Why this device cannot multiply in 8 bits with a scale for each row; None if it can: it is tried."""
    left = torch.ones((STEP, 2 * STEP), device=device).to(FLOAT8)
    scales = torch.full((STEP, 1), 0.5, device=device)
    try:
        found = multiply_in_8_bits(left, scales, left.t(), scales.t(), torch.float32)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return str(error).strip().splitlines()[0]
    return None if bool((found == 0.25 * 2 * STEP).all()) else "a product of known numbers came out wrong"


def by_kind(linear_of_16_bits: Callable[..., Tensor], multiply: Multiply) -> Callable[..., Tensor]:
    """The operator `quantised_linear` that knows this kind besides those of `linear_of_16_bits`."""

    @wraps(linear_of_16_bits)
    def run(x: Tensor, stored: Sequence[Tensor], kind: str, *rest: Any) -> Tensor:
        if kind == FP8_PRODUCTS:
            return linear(x, stored, rest[-1], multiply)
        return linear_of_16_bits(x, stored, kind, *rest)

    return run


def backward_by_kind(backward_of_16_bits: Callable[..., Tensor], multiply: Multiply) -> Callable[..., Tensor]:
    """The operator `quantised_linear_backward` likewise."""

    @wraps(backward_of_16_bits)
    def run(grad: Tensor, stored: Sequence[Tensor], kind: str, *rest: Any) -> Tensor:
        if kind == FP8_PRODUCTS:
            return linear_backward(grad, stored, multiply)
        return backward_of_16_bits(grad, stored, kind, *rest)

    return run


def accumulate_by_kind(accumulate_16_bits: Callable[..., None], multiply: Multiply) -> Callable[..., None]:
    """The operator `quantised_linear_accumulate` likewise."""

    @wraps(accumulate_16_bits)
    def run(out: Tensor, grad: Tensor, stored: Sequence[Tensor], kind: str, *rest: Any) -> None:
        if kind == FP8_PRODUCTS:
            out.add_(linear_backward(grad, stored, multiply))
        else:
            accumulate_16_bits(out, grad, stored, kind, *rest)

    return run


def _rounded_rows(values: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes e4m3 and the scale of each row of `values * factors`. Shapes: [T, K], [K] -> [T, K], [T, 1]."""
    form = triton_form("rows_in_fp8", values) if values.is_cuda else None
    if form is None:
        codes, scales = encode_rows_fp8(values if factors is None else values.float() * factors)
    else:
        codes, scales = form(values.contiguous(), factors)
    return codes, scales.unsqueeze(1)
