"""Adapted linear layers that read the same input, in one node of autograd.

y_i = gain_i * (x W_i^T + s_i drop_i(x) A_i^T B_i^T) + bias_i + shift_i        W_i frozen; the gain is DoRA's

The change of a layer is added into its product, where that lies, and the gradients that all layers have for
their input are added up in one tensor. The thin products of layers without dropout are one, so that x is read
once for all of them. Kept for backward are x (once, or what it can be made from again: `sources`), the rank-r
products, and with a trained gain the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graftlm.kernels.adapted_products import (
    Packing,
    Term,
    Used,
    flattened,
    gradients,
    in_dtype,
    output,
    parted,
    thin_products,
)
from graftlm.kernels.dropout import new_seed
from graftlm.kernels.sources import Producer, source_of


@dataclass(frozen=True)
class Frozen:
    """A linear layer of which nothing is trained.

    Shapes: `stored` is the dense weight [N, K] of any layout, or the tensors of a packed one that `packing`
    describes; bias [N] or None.
    """

    stored: tuple[Tensor, ...]
    bias: Tensor | None = None
    packing: Packing | None = None


@dataclass(frozen=True)
class Given:
    """A layer that was called already, whatever it is: its output [..., N], to which a gradient flows.

    `bias` [N] is what the layer added to it; only a gain asks.
    """

    output: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Adapted:
    """A layer and its low-rank change. Gradients flow to a, b, gain and shift.

    Shapes: a [r, K], b [N, r], gain [N] in float32 or better, shift [N]; beside a gain there is no shift.
    `dropout` is that of the change's input.
    """

    layer: Frozen | Given
    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0
    gain: Tensor | None = None
    shift: Tensor | None = None


def adapted_linears(x: Tensor, linears: Sequence[Adapted]) -> tuple[Tensor, ...]:
    """What these layers give for one input. Shapes: x [..., K] -> [..., N_i] each, in the dtype of x.

    Dense weights and given outputs must have that dtype too. An output with a gain must not be changed in
    place.

    >>> layer = Frozen((torch.eye(2),))
    >>> adapted_linears(torch.ones(1, 2), [Adapted(layer, torch.ones(1, 2), torch.ones(2, 1), scale=0.5)])
    (tensor([[2., 2.]]),)
    """
    terms: list[Term] = []
    flat: list[Tensor | None] = []
    for one in linears:
        layer, given, packing = one.layer, None, None
        stored: tuple[Tensor, ...] = ()
        if isinstance(layer, Given):
            given = layer.output
        else:
            stored, packing = layer.stored, layer.packing
        seed = new_seed() if one.dropout > 0.0 else None
        terms.append(Term(one.scale, one.dropout, one.b.dtype, packing, len(stored)))
        flat += [given, one.a, one.b, one.gain, one.shift, layer.bias, seed, *stored]
    source = source_of(x)
    producer, inputs = (None, (x,)) if source is None else (source.producer, source.inputs)
    outputs: tuple[Tensor, ...] = _Adapted.apply(tuple(terms), producer, inputs, x, *flat)  # type: ignore[no-untyped-call]
    return outputs


class _Adapted(torch.autograd.Function):
    """Its arguments after x are those of `Parts`, layer by layer. `producer` makes x from `inputs`; without
    one, they are x itself."""

    @staticmethod
    def forward(
        ctx: Any,
        terms: tuple[Term, ...],
        producer: Producer | None,
        inputs: Sequence[Tensor],
        x: Tensor,
        *flat: Any,
    ) -> tuple[Tensor, ...]:
        rows, kept = x.reshape(-1, x.shape[-1]), parted(terms, flat)
        parts = in_dtype(x.dtype, kept)
        thin = thin_products(rows, terms, parts)
        outputs = []
        for term, part, s in zip(terms, parts, thin.split([len(part.a) for part in parts], 1), strict=True):
            y = output(rows, s, term, part)
            whole: Tensor = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1]))
            outputs.append(whole)  # a view could not be changed in place
        needs = parted(terms, ctx.needs_input_grad[4:])
        with_gain = [y for y, need in zip(outputs, needs, strict=True) if need.gain]
        kept = [part._replace(given=None, shift=None) for part in kept]
        ctx.save_for_backward(*inputs, thin, *with_gain, *flattened(kept))
        ctx.terms, ctx.producer, ctx.counts = terms, producer, (len(inputs), len(with_gain))
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing allows no second look
        first, second = ctx.counts[0], sum(ctx.counts) + 1
        inputs, thin, with_gain = saved[:first], saved[first], iter(saved[first + 1 : second])
        parts = in_dtype(thin.dtype, parted(ctx.terms, saved[second:]))
        x: Tensor = inputs[0] if ctx.producer is None else ctx.producer(*inputs)
        need_x, *rest = ctx.needs_input_grad[3:]
        needs = parted(ctx.terms, rest)
        layers = [
            Used(term, part, need, grad, next(with_gain) if need.gain else None)
            for term, part, need, grad in zip(ctx.terms, parts, needs, grads, strict=True)
        ]
        dx, found = gradients(x.reshape(-1, x.shape[-1]), thin, layers, need_x)
        return None, None, None, None if dx is None else dx.view(x.shape), *flattened(found)
