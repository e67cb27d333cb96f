"""Cross-entropy through a frozen output head, with its gradient, in one pass over pieces of the vocabulary.

The gradient of a hidden state is the mean of the head's rows under the model's own distribution, minus the
row of the label. So it can be gathered piece by piece, as attention gathers values: sums are rescaled
whenever a larger logit turns up. A piece of the weight is read once and multiplied twice, and its logits are
used while they are in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm.kernels.buffers import borrowed
from graftlm.kernels.few_shapes import missing_rows
from graftlm.kernels.native import pointwise_call as native
from graftlm.kernels.reference import pieces

ROWS = 2048
"""Hidden states that pass over the vocabulary together."""
LOGITS = 2**23
"""Logits that exist at a time, at most: 16 MiB of 16 bits."""


@dataclass(frozen=True)
class FrozenHead:
    """An output head [V, K] (`shape`) that is not trained, however it is stored."""

    shape: tuple[int, int]
    lines: Callable[[int, int], Tensor]
    """Rows from the first number to before the second, in the dtype of the hidden states."""
    rows: Callable[[Tensor], Tensor]
    """The rows of these labels [n] -> [n, K]."""
    most_lines: int
    """Rows that may be asked for together: fewer where they have to be decoded."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk_rows: int, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of `hidden @ weight^T + bias`, and its gradient for `hidden`.

    Shapes: hidden [T, K], weight [V, K], bias [V] or None, labels [T] -> scalar, [T, K] (empty unless
    `need_grad`). The loss is float32 (float64 for float64). Rows with a negative label count nothing. At most
    `chunk_rows` x V logits exist at a time, and never more than `LOGITS`.
    """
    return head_cross_entropy(hidden, dense_head(weight), bias, labels, chunk_rows * len(weight), need_grad)


def dense_head(weight: Tensor) -> FrozenHead:
    """The head of a weight [V, K] in 16 bits or more."""
    vocabulary, width = weight.shape
    return FrozenHead(
        (vocabulary, width), lambda *span: weight[slice(*span)], lambda index: weight[index], vocabulary
    )


def head_cross_entropy(
    hidden: Tensor, head: FrozenHead, bias: Tensor | None, labels: Tensor, logits: int, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """As `linear_cross_entropy`, with at most `logits` logits at a time."""
    loss = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    grad = hidden.new_empty(hidden.shape if need_grad else 0)
    for start in range(0, len(hidden), ROWS):
        rows = slice(start, start + ROWS)
        ignored, own = labels[rows] < 0, labels[rows].clamp_min(0)
        passed = pass_over(hidden[rows], head, bias, own, min(logits, LOGITS), gather=need_grad)
        loss += passed.losses().masked_fill(ignored, 0).sum()
        if passed.gathered is not None:
            grad[rows] = passed.gradient(passed.gathered, head.rows(own))
            if ignored.any():
                grad[rows].masked_fill_(ignored.unsqueeze(1), 0)
    return loss, grad


class Passed:
    """What is carried from piece to piece, for each row. The label's own column is kept apart: p - 1 would
    cancel where p is near 1."""

    def __init__(self, hidden: Tensor, labels: Tensor) -> None:
        self.labels = labels.contiguous()
        precise = torch.promote_types(hidden.dtype, torch.float32)
        self.largest = torch.full_like(self.labels, -torch.inf, dtype=precise)
        self.others, self.of_label = torch.zeros_like(self.largest), torch.zeros_like(self.largest)
        """Sum of e^(logit - largest) over all but the label, and the logit of the label."""
        self.gathered: Tensor | None = None
        """Rows of the head, weighed by those exponentials and summed."""
        self.weights, self.weighed = torch.zeros_like(self.largest), torch.zeros_like(self.largest)
        """Sums of those exponentials as they were rounded, and of them times the logits, where wanted."""

    def take(self, logits: Tensor, first: int) -> Tensor:
        """The logits [T, n] of columns `first` and on become exponentials, with a zero at the label. Returns
        what earlier exponentials shrink by [T]."""
        if native.is_native(logits):
            sums = (self.largest, self.others, self.of_label)
            return native.softmax_piece(logits, self.labels, first, *sums)
        wide = logits.to(self.largest.dtype)
        here = ((self.labels >= first) & (self.labels < first + logits.shape[1])).nonzero().flatten()
        column = self.labels[here] - first
        self.of_label[here] = wide[here, column]
        now = torch.maximum(self.largest, wide.amax(dim=1))
        shrink = (self.largest - now).exp_()
        wide.sub_(now.unsqueeze(1)).exp_()
        wide[here, column] = 0.0
        self.others.mul_(shrink).add_(wide.sum(dim=1))
        self.largest = now
        if wide is not logits:
            logits.copy_(wide)
        return shrink

    def gather(self, part: Tensor, shrink: Tensor) -> None:
        """Add the share [T, K] of a piece to what came before it."""
        if self.gathered is None:
            self.gathered = part.to(self.largest.dtype, copy=True)
        elif native.is_native(part):
            native.shrink_and_add(self.gathered, shrink, part)
        else:
            self.gathered.mul_(shrink.unsqueeze(1)).add_(part)

    def weigh(self, exponentials: Tensor, logits: Tensor, shrink: Tensor) -> None:
        """Add a piece's share to what the entropy needs. Shapes: [T, n] both."""
        for total in (self.weights, self.weighed):
            total.mul_(shrink)
        for rows in pieces(logits):
            weights, values = (x[rows].to(self.largest.dtype) for x in (exponentials, logits))
            self.weights[rows] += weights.sum(1)
            self.weighed[rows] += values.mul_(weights).sum(1)

    def keep(self, count: int) -> None:
        """Forget all but the first rows."""
        for name, values in vars(self).items():
            if values is not None:
                setattr(self, name, values[:count])

    def losses(self) -> Tensor:
        """-log p(label) of each row. Shape: [T]."""
        return self.largest + self._total().log() - self.of_label

    def gradient(self, gathered: Tensor, of_labels: Tensor) -> Tensor:
        """Of the losses. Shapes: gathered [T, K], which is overwritten, the head's rows of labels [T, K]."""
        pulled = of_labels.to(gathered.dtype).mul_(self.others.unsqueeze(1))
        return gathered.sub_(pulled).div_(self._total().unsqueeze(1))

    def entropies(self, losses: Tensor) -> Tensor:
        """Mean of -log p over the vocabulary, in which no large numbers cancel. Shapes: [T] both."""
        log_total = losses + self.of_label
        of_others = (log_total * self.weights - self.weighed) / self._total()
        return of_others + losses * torch.exp(-losses)

    def _total(self) -> Tensor:
        return self.others + (self.of_label - self.largest).exp()


def pass_over(
    hidden: Tensor,
    head: FrozenHead,
    bias: Tensor | None,
    labels: Tensor,
    logits: int,
    *,
    gather: bool,
    weigh: bool = False,
    scale: float = 1.0,
) -> Passed:
    """Rows [T, K] over the whole vocabulary, at most `logits` logits at a time, which `scale` multiplies."""
    count, extra = len(hidden), missing_rows(len(hidden), hidden.device)
    if extra:
        hidden, labels = F.pad(hidden, (0, 0, 0, extra)), F.pad(labels, (0, extra))
    passed, vocabulary = Passed(hidden, labels), head.shape[0]
    step = max(1, min(logits // len(hidden), head.most_lines, vocabulary))
    step -= step % 64 if step < vocabulary and step > 64 else 0  # whole tiles of a matrix product
    room, part = _room(len(hidden) * step, hidden), hidden.new_empty(hidden.shape if gather else 0)
    for start in range(0, vocabulary, step):
        stop = min(start + step, vocabulary)
        weight, piece = head.lines(start, stop), room[: len(hidden) * (stop - start)].view(len(hidden), -1)
        if bias is None:
            torch.mm(hidden, weight.t(), out=piece)
        else:
            torch.addmm(bias[start:stop], hidden, weight.t(), out=piece)
        if scale != 1:
            piece.mul_(scale)
        values = piece.clone() if weigh else piece
        shrink = passed.take(piece, start)
        if weigh:
            passed.weigh(piece, values, shrink)
        if gather:
            passed.gather(torch.mm(piece, weight, out=part), shrink)
    passed.keep(count)
    return passed


def _room(count: int, like: Tensor) -> Tensor:
    """Memory for so many logits. New memory at every call would cost as much as the passes over it."""
    return borrowed(count, like.dtype) if like.is_cpu else like.new_empty(count)
