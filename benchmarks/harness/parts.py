"""The parts of a training step, and which of them an operator of a profile belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.case import Case
from harness.flops import ATTENTION, FORWARD_AND_INPUT, WITH_WEIGHT, attention_flops
from harness.machine import Rates

BASE = "base matrix products"
ADAPTER = "adapter products"
ATTENTION_PART = "attention"
HEAD = "head and cross-entropy"
POINTWISE = "norms, activations, rotary"
OPTIMIZER = "optimizer and clip"
COPIES = "copies and sums"
OTHER = "other operators"
GAPS = "host gaps"
PARTS = (BASE, ADAPTER, ATTENTION_PART, HEAD, POINTWISE, OPTIMIZER, COPIES, OTHER, GAPS)

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "_linear_pointwise", "_scaled_mm")
COPYING = (
    *("copy_", "_to_copy", "clone", "contiguous", "add", "add_", "sum", "zero_", "fill_", "zeros", "cat"),
    *("stack", "index_select", "empty", "empty_like", "slice_backward", "constant_pad_nd"),
)
POINTS = (
    *("mul", "mul_", "div", "div_", "neg", "pow", "mean", "rsqrt", "rsqrt_", "cos", "sin", "sigmoid"),
    *("silu", "silu_", "silu_backward", "gelu", "native_dropout", "rms_norm", "gated_silu", "rope"),
)


@dataclass(frozen=True)
class Operator:
    """One call in a profile: its name without namespace, the shapes it got, the names it was called from."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    within: tuple[str, ...] = ()


def part_of(call: Operator, case: Case) -> str:
    """Which part of the step a call belongs to.

    >>> tokens_by_rank = Operator("mm", ((2048, 1024), (1024, 16)))
    >>> part_of(tokens_by_rank, Case("a", rank=16))
    'adapter products'
    """
    names = (call.name, *call.within)
    if _any(names, ("optimizer", "adamw", "linalg_vector_norm", "_foreach_", "clip_grad")):
        return OPTIMIZER
    if _any(names, ("cross_entropy", "nll_loss", "log_softmax", "logsumexp")):
        return HEAD
    if _any(names, ("attention", "flash", "_softmax")):
        return ATTENTION_PART
    if (
        case.model.vocabulary in {size for shape in call.shapes for size in shape}
        and call.name != "embedding"
    ):
        return HEAD
    if call.name in PRODUCTS:
        return ADAPTER if _is_skinny(call.shapes, case) else BASE
    if _any((call.name,), ("low_rank", "thin_", "dropped")):
        return ADAPTER
    if call.name in POINTS or _any(names, ("rms_norm", "gated_silu", "rope", "rotary")):
        return POINTWISE
    if "engine" in call.name or call.name.lstrip("_")[:1].isupper():
        return GAPS  # autograd's nodes: what they take themselves is Python and the engine between operators
    return COPIES if call.name in COPYING else OTHER


def floors(case: Case, rates: Rates, documents: Sequence[int], targets: int) -> dict[str, float]:
    """Least seconds of each part: its arithmetic at the matrix rate, or its bytes at the copy rate.

    Of the adapter's products the bytes are what counts: a rank is too few sums for a value that is read.
    """
    shape, tokens = case.model, sum(documents)
    trained = shape.adapter(case.rank) if case.method in ("lora", "dora") else 0
    flops = {
        BASE: FORWARD_AND_INPUT * tokens * shape.linear,
        ADAPTER: WITH_WEIGHT * tokens * trained,
        ATTENTION_PART: ATTENTION * attention_flops(case, documents),
        HEAD: FORWARD_AND_INPUT * targets * shape.head,
    }
    found = {part: operations / rates.matrix for part, operations in flops.items()}
    if trained:
        found[ADAPTER] = max(found[ADAPTER], adapter_bytes(case, tokens) / rates.copy)
    found[POINTWISE] = pointwise_bytes(case, tokens) / rates.copy
    found[OPTIMIZER] = OPTIMIZER_BYTES * trained / rates.copy
    return found | dict.fromkeys((COPIES, OTHER, GAPS), 0.0)


OPTIMIZER_BYTES = 32
"""A parameter in float32: AdamW reads four values and writes three; the norm reads the gradient once more."""


def pointwise_bytes(case: Case, tokens: int) -> int:
    """Traffic in 16 bits, forward and backward, where each elementwise part is one operator.

    A residual sum with its norm reads two and writes two vectors; its backward reads three and writes one.
    Rotary embedding reads and writes queries and keys. SwiGLU reads two and writes one; its backward reads
    three and writes two.
    """
    shape = case.model
    norms = 2 * (4 + 4) * shape.hidden
    rotary = 2 * 2 * (shape.heads + shape.key_heads) * shape.head_dim
    gating = (3 + 5) * shape.inner
    return 2 * tokens * shape.layers * (norms + rotary + gating)


def adapter_bytes(case: Case, tokens: int) -> int:
    """Traffic of a low-rank change in 16 bits, forward and backward, beside the layer's own product.

    Forward reads x once for the layers that share it, and reads and writes the output; backward reads x and
    the gradient once, and reads and writes the gradient of x.
    """
    shapes = case.model.matrices()
    outputs = sum(rows for rows, _ in shapes.values())
    inputs = sum(
        shapes[name][1] for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    )
    return 2 * tokens * case.model.layers * (3 * outputs + 4 * inputs)


def _is_skinny(shapes: Iterable[tuple[int, ...]], case: Case) -> bool:
    """Whether a matrix of the product has the rank, or that of a few stacked adapters, as a side."""
    ranks = {case.rank * stacked for stacked in (1, 2, 3)}
    widths = {size for pair in case.model.matrices().values() for size in pair}
    sides = {size for shape in shapes if len(shape) >= 2 for size in shape[-2:]}
    return bool(sides & ranks - widths)


def _any(names: Iterable[str], parts: Sequence[str]) -> bool:
    return any(part in name.lower() for name in names for part in parts)
