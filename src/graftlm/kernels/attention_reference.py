"""What attention over documents means: plain torch, a block of queries at a time, in float32 or better."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from graftlm.core.errors import TrainingError

ROWS = 256
"""Queries whose scores exist at a time."""


@dataclass(frozen=True)
class _Block:
    """Queries `rows` of one document and the tokens `keys` that some of them see, behind the shared ones."""

    rows: slice
    keys: slice

    def select(self, x: Tensor, shared: int) -> Tensor:
        """Of keys or values [P + T, H, D]: those of the block, in float32 or better."""
        own = x[shared + self.keys.start : shared + self.keys.stop]
        return _precise(own if shared == 0 else torch.cat([x[:shared], own]))

    def add(self, total: Tensor, part: Tensor, shared: int) -> None:
        """Adds what `select` took to where it came from."""
        total[:shared] += part[:shared]
        total[shared + self.keys.start : shared + self.keys.stop] += part[shared:]

    def hidden(self, shared: int, window: int | None, device: torch.device) -> Tensor:
        """Whether a query does not see a key. Shape: [queries, P + keys]."""
        rows = torch.arange(self.rows.start, self.rows.stop, device=device).unsqueeze(1)
        keys = torch.arange(self.keys.start, self.keys.stop, device=device)
        hidden = keys > rows
        if window is not None:
            hidden |= keys <= rows - window
        return torch.nn.functional.pad(hidden, (shared, 0))


def attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Shapes: as `attention.attention` -> [T, Hq, D] and the logarithm of each sum of weights [Hq, T]."""
    shared, heads = len(k) - len(q), k.shape[1]
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], len(q)), dtype=_precise(q[:0]).dtype)
    for block in _blocks(bounds_of(starts, len(q)), window):
        scores = _scores(q, k, block, scale, window)
        sums = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - sums.unsqueeze(-1))
        result = torch.einsum("hgnm,mhd->nhgd", weights, block.select(v, shared))
        out[block.rows] = result.flatten(1, 2).to(out.dtype)
        lse.unflatten(0, (heads, -1))[..., block.rows] = sums
    return out, lse


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """With weights P and D = rowsum(grad out): dS = P (grad v^T - D), as in arXiv 2205.14135.

    Shapes: as q, k, v.
    """
    shared, heads = len(k) - len(q), k.shape[1]
    dq = q.new_empty(q.shape)
    dk, dv = (x.new_zeros(x.shape, dtype=lse.dtype) for x in (k, v))
    grouped = lse.unflatten(0, (heads, -1))
    for block in _blocks(bounds_of(starts, len(q)), window):
        weights = torch.exp(_scores(q, k, block, scale, window) - grouped[..., block.rows].unsqueeze(-1))
        wide = _precise(grad[block.rows]).unflatten(1, (heads, -1))
        means = (wide * out[block.rows].unflatten(1, (heads, -1))).sum(-1).permute(1, 2, 0)
        block.add(dv, torch.einsum("hgnm,nhgd->mhd", weights, wide), shared)
        of_weights = torch.einsum("nhgd,mhd->hgnm", wide, block.select(v, shared))
        of_scores = scale * weights * (of_weights - means.unsqueeze(-1))
        of_rows = torch.einsum("hgnm,mhd->nhgd", of_scores, block.select(k, shared))
        dq[block.rows] = of_rows.flatten(1, 2).to(dq.dtype)
        rows = _precise(q[block.rows]).unflatten(1, (heads, -1))
        block.add(dk, torch.einsum("hgnm,nhgd->mhd", of_scores, rows), shared)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def bounds_of(starts: Tensor, tokens: int) -> list[int]:
    """Where documents start and the last one ends.

    Raises:
        TrainingError: they do not rise from 0 to the number of tokens.
    """
    bounds: list[int] = starts.tolist()
    if bounds[:1] != [0] or bounds[-1] != tokens or bounds != sorted(bounds):
        raise TrainingError(
            f"Documents start at {bounds[:5]} ... {bounds[-2:]}, of {tokens} tokens.",
            meaning="Documents and tokens do not fit together: starts rise from 0 to the number of tokens.",
            fix="Give the cumulative lengths of the documents, 0 first.",
        )
    return bounds


def _blocks(bounds: list[int], window: int | None) -> Iterator[_Block]:
    for first, last in pairwise(bounds):
        for start in range(first, last, ROWS):
            stop = min(start + ROWS, last)
            oldest = first if window is None else max(first, start - window + 1)
            yield _Block(slice(start, stop), slice(oldest, stop))


def _scores(q: Tensor, k: Tensor, block: _Block, scale: float, window: int | None) -> Tensor:
    """Scaled scores of a block. Shape: [Hkv, Hq / Hkv, queries, P + keys]."""
    shared = len(k) - len(q)
    rows = _precise(q[block.rows]).unflatten(1, (k.shape[1], -1))
    scores = scale * torch.einsum("nhgd,mhd->hgnm", rows, block.select(k, shared))
    return scores.masked_fill_(block.hidden(shared, window, q.device), -torch.inf)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
