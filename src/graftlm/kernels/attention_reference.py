"""What attention over documents means: plain torch, a block of queries at a time, in float32 or better."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from graftlm.core.errors import TrainingError

ROWS = 256
"""Queries whose scores exist at a time."""


class Document(NamedTuple):
    """First and last token of a document, and of the one that it continues (none: 0, 0)."""

    first: int
    last: int
    above_first: int
    above_last: int


@dataclass(frozen=True)
class _Block:
    """Queries `rows` of a document and what some of them see behind the shared keys: all of the document
    `above`, and the tokens `keys` of their own.
    """

    document: Document
    rows: slice
    keys: slice

    @property
    def above(self) -> slice:
        return slice(self.document.above_first, self.document.above_last)

    def select(self, x: Tensor, shared: int) -> Tensor:
        """Of keys or values [P + T, H, D]: those of the block, in float32 or better."""
        own = x[shared:]
        return _precise(torch.cat([x[:shared], own[self.above], own[self.keys]]))

    def add(self, total: Tensor, part: Tensor, shared: int) -> None:
        """Adds what `select` took to where it came from."""
        own, count = total[shared:], self.above.stop - self.above.start
        total[:shared] += part[:shared]
        own[self.above] += part[shared : shared + count]
        own[self.keys] += part[shared + count :]

    def hidden(self, shared: int, window: int | None, device: torch.device) -> Tensor:
        """Whether a query does not see a key. Shape: [queries, P + above + keys]."""
        rows = torch.arange(self.rows.start, self.rows.stop, device=device).unsqueeze(1)
        first, count = self.document.first, self.above.stop - self.above.start
        above = torch.arange(first - count, first, device=device)  # counted as if it stood right before
        keys = torch.cat([above, torch.arange(self.keys.start, self.keys.stop, device=device)])
        hidden = keys > rows
        if window is not None:
            hidden |= keys <= rows - window
        return torch.nn.functional.pad(hidden, (shared, 0))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    parents: Tensor | None,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Shapes: as `attention.attention` -> [T, Hq, D] and the logarithm of each sum of weights [Hq, T]."""
    shared, heads = len(k) - len(q), k.shape[1]
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], len(q)), dtype=_precise(q[:0]).dtype)
    for block in _blocks(documents_of(starts, parents, len(q)), window):
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
    parents: Tensor | None,
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
    for block in _blocks(documents_of(starts, parents, len(q)), window):
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


def documents_of(starts: Tensor, parents: Tensor | None, tokens: int) -> list[Document]:
    """The documents, in their order.

    Raises:
        TrainingError: starts do not rise from 0 to the number of tokens, or a parent is not a document in
            front that has no parent itself.
    """
    bounds: list[int] = starts.tolist()
    above: list[int] = [-1] * (len(bounds) - 1) if parents is None else parents.tolist()
    if bounds[:1] != [0] or bounds[-1] != tokens or bounds != sorted(bounds):
        raise TrainingError(
            f"Documents start at {bounds[:5]} ... {bounds[-2:]}, of {tokens} tokens.",
            meaning="Documents and tokens do not fit together: starts rise from 0 to the number of tokens.",
            fix="Give the cumulative lengths of the documents, 0 first.",
        )
    if len(above) != len(bounds) - 1 or any(
        not -1 <= parent < number or (parent >= 0 and above[parent] >= 0)
        for number, parent in enumerate(above)
    ):
        raise TrainingError(
            f"{len(bounds) - 1} documents continue {above[:8]}.",
            meaning="Documents and parents do not fit together: a parent stands in front, and has none.",
            fix="Give the number of the document that each one continues, or -1.",
        )
    spans = [*pairwise(bounds), (0, 0)]  # the last one stands for no parent
    return [Document(*spans[number], *spans[parent]) for number, parent in enumerate(above)]


def _blocks(documents: list[Document], window: int | None) -> Iterator[_Block]:
    for document in documents:
        for start in range(document.first, document.last, ROWS):
            stop = min(start + ROWS, document.last)
            oldest = document.first if window is None else max(document.first, start - window + 1)
            yield _Block(document, slice(start, stop), slice(oldest, stop))


def _scores(q: Tensor, k: Tensor, block: _Block, scale: float, window: int | None) -> Tensor:
    """Scaled scores of a block. Shape: [Hkv, Hq / Hkv, queries, P + above + keys]."""
    shared = len(k) - len(q)
    rows = _precise(q[block.rows]).unflatten(1, (k.shape[1], -1))
    scores = scale * torch.einsum("nhgd,mhd->hgnm", rows, block.select(k, shared))
    return scores.masked_fill_(block.hidden(shared, window, q.device), -torch.inf)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
