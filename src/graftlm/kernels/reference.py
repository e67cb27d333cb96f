"""Plain torch definitions of every operator: the oracle, and what runs where nothing faster is registered.

Legend of shapes: T tokens (all leading dimensions), K input width, N output width, r rank, V vocabulary.
"""

from __future__ import annotations

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
        logits = torch.nn.functional.linear(hidden[rows], weight, bias).to(precise)
        target = labels[rows].unsqueeze(1)
        lse = torch.logsumexp(logits, dim=1, keepdim=True)
        loss += (lse - logits.gather(1, target)).sum()
        if need_grad:
            probability = torch.exp(logits.sub_(lse))
            probability.scatter_add_(1, target, torch.full_like(lse, -1.0))
            torch.mm(probability.to(weight.dtype), weight, out=grad[rows])
    return loss, grad
