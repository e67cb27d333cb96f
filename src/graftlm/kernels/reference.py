"""Plain torch definitions of every operator: the oracle, and what runs where nothing faster is registered.

Legend of shapes: T tokens (all leading dimensions), K input width, N output width, r rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def keep_mask(shape: torch.Size, p: float, seed: Tensor, device: torch.device) -> Tensor:
    """Boolean mask with keep probability 1 - p, a pure function of `seed` (int64 scalar on CPU).

    The mask is drawn again in backward instead of being stored: 8 bytes in place of one byte per element.
    """
    generator = torch.Generator(device=device).manual_seed(int(seed.item()))
    return torch.rand(shape, generator=generator, device=device) >= p


def dropped(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """`x` with zeros where the mask drops it; `x` itself when p is 0.

    The factor 1 / (1 - p) of inverted dropout is left to `scale`, where 16-bit rounding does not shift it.
    """
    return x if p == 0.0 else x * keep_mask(x.shape, p, seed, x.device)


def low_rank_add(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, p: float, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """`y + scale * (drop(x) A^T) B^T` and the rank-r tensor `(1 - p) drop(x) A^T`.

    Shapes: y [T, N], x [T, K], a [r, K], b [N, r] -> [T, N], [T, r]. Everything is computed in `y.dtype`.
    """
    s = dropped(x, p, seed) @ a.to(x.dtype).t()
    return torch.addmm(y, s, b.to(y.dtype).t(), alpha=scale / (1.0 - p)), s


def low_rank_backward(
    grad: Tensor,
    x: Tensor,
    s: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float,
    seed: Tensor,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `low_rank_add` for x, a and b; the first is empty unless `need_x`."""
    scale = scale / (1.0 - p)
    ds = (grad @ b.to(grad.dtype)).mul_(scale)
    db = (grad.t() @ s).to(b.dtype).mul_(scale)
    da = (ds.t() @ dropped(x, p, seed)).to(a.dtype)
    if not need_x:
        return x.new_empty(0), da, db
    return dropped(ds @ a.to(ds.dtype), p, seed), da, db


def dora_add(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    gain: Tensor,
    bias: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    """`gain * (y - bias + scale * (drop(x) A^T) B^T) + bias` and the rank-r tensor of `low_rank_add`.

    Shapes: y [T, N], x [T, K], a [r, K], b [N, r], gain [N] in float32 or better, bias [N] -> [T, N], [T, r].
    The change `gain - 1` is what is rounded to `y.dtype`: a gain near 1 keeps its digits in 16 bits.
    """
    y, s = y.contiguous(), dropped(x, p, seed) @ a.to(x.dtype).t()
    if bias is None:
        out = torch.addcmul(y, y, (gain - 1).to(y.dtype))
    else:
        out = torch.lerp(y, bias.expand_as(y), (1 - gain).to(y.dtype))
    return out.addmm_(s, (b * gain.unsqueeze(1)).to(y.dtype).t(), alpha=scale / (1.0 - p)), s


def dora_backward(
    grad: Tensor, out: Tensor, gain: Tensor, bias: Tensor | None, need_y: bool, need_gain: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `dora_add` for y (empty unless `need_y`) and for gain (empty unless `need_gain`).

    Shapes: grad, out [T, N], gain, bias [N] -> [T, N], [N]. What `gain` multiplies is recovered from the
    output, (out - bias) / gain, so that no other tensor of that size is kept; where gain is 0 the gradient is
    0 too.
    """
    dy = grad.new_empty(grad.shape if need_y else 0)
    sums = gain.new_zeros(gain.shape if need_gain else 0)
    change = (gain - 1).to(grad.dtype)
    for rows in pieces(grad):
        part = grad[rows]
        if need_gain:
            scaled = out[rows] if bias is None else out[rows] - bias
            if grad.dtype == torch.float16:  # products of its numbers overflow
                sums += (part.float() * scaled.float()).sum(0)
            else:  # dy is the scratch space: new memory for every piece costs more than the products
                sums += torch.mul(part, scaled, out=dy[rows] if need_y else None).sum(0)
        if need_y:
            torch.addcmul(part, part, change, out=dy[rows])
    return dy, torch.where(gain == 0, 0.0, sums / gain) if need_gain else sums


def row_products(weight: Tensor, a: Tensor, need_squares: bool) -> tuple[Tensor, Tensor]:
    """Squared norms of the rows of `weight` (empty unless `need_squares`), and `weight A^T`.

    Shapes: weight [N, K] of any layout, a [r, K] -> [N], [N, r], in float32 or better. The product is
    computed in the weight's dtype, as the layer's own is; `out` keeps autocast from choosing another.
    """
    precise = torch.promote_types(weight.dtype, torch.float32)
    products = weight.new_empty(weight.shape[0], a.shape[0])
    torch.mm(weight, a.to(weight.dtype).t(), out=products)
    squares = weight.new_zeros(weight.shape[0] if need_squares else 0, dtype=precise)
    is_transposed = weight.stride(0) < weight.stride(1)
    stored = weight.t() if is_transposed else weight
    for rows in pieces(stored) if need_squares else ():
        part = stored[rows].to(precise)
        if is_transposed:
            squares += part.square().sum(0)
        else:
            squares[rows] = torch.linalg.vecdot(part, part)
    return squares, products.to(precise)


def pieces(tensor: Tensor) -> Iterator[slice]:
    """Rows that stay in a CPU's cache between two operations; on an accelerator, few large pieces."""
    elements = 2**17 if tensor.device.type == "cpu" else 2**24
    step = max(1, elements // max(1, tensor.shape[1]))
    step -= step % 32 if step > 32 else 0  # whole vectors, so that no piece ends in scalar code
    for start in range(0, tensor.shape[0], step):
        yield slice(start, start + step)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk_rows: int, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of `hidden @ weight^T + bias`, and its gradient for `hidden`.

    Shapes: hidden [T, K], weight [V, K], bias [V] or None, labels [T] -> scalar, [T, K] (empty unless
    `need_grad`). The loss is float32 (float64 for float64). Only `chunk_rows` x V logits exist at a time; the
    gradient is formed while they do.
    """
    precise = torch.promote_types(hidden.dtype, torch.float32)
    loss = torch.zeros((), dtype=precise, device=hidden.device)
    grad = hidden.new_empty(hidden.shape if need_grad else 0)
    for start in range(0, hidden.shape[0], chunk_rows):
        rows = slice(start, start + chunk_rows)
        logits = torch.nn.functional.linear(hidden[rows], weight, bias)
        target = labels[rows].unsqueeze(1)
        for some in pieces(logits):  # elementwise work on pieces that stay in the cache: half the time
            value = torch.log_softmax(logits[some], dim=1, dtype=precise)
            loss -= value.gather(1, target[some]).sum()
            if need_grad:
                value.exp_().scatter_add_(1, target[some], value.new_full(target[some].shape, -1.0))
                logits[some].copy_(value)
        if need_grad:
            torch.mm(logits, weight, out=grad[rows])
    return loss, grad
