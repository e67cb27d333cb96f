"""Log-probabilities through a frozen output head, row by row, with their gradients, in one pass.

Losses over preferences and policies weigh each token differently, so the gradient of each row is kept, as
large as the hidden states themselves, and multiplied in backward with what comes from above.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graftlm.core.errors import TrainingError
from graftlm.kernels.cross_entropy import LOGITS, ROWS, FrozenHead, dense_head, pass_over
from graftlm.kernels.ops import LIBRARY
from graftlm.kernels.triton.forms import triton_form

ROWS_ON_CUDA = 512
"""Rows of logits that exist at a time, at least: fewer would leave a GPU half idle."""
ENTROPIES_ON_CUDA = 64
"""Rows of logits that exist in float32."""


class RowLogProbs(NamedTuple):
    """Of T rows: log p(label) [T] and the entropy [T] in at least float32, the gradient of the former [T, K].

    What was not asked for is empty.
    """

    log_probs: Tensor
    entropy: Tensor
    gradient: Tensor


LIBRARY.define(
    "linear_log_probs(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float scale, int chunk_rows,"
    " bool need_grad, bool need_entropy) -> (Tensor, Tensor, Tensor)"
)


def head_log_probs(
    hidden: Tensor,
    head: FrozenHead,
    bias: Tensor | None,
    labels: Tensor,
    *,
    scale: float,
    logits: int = LOGITS,
    need_grad: bool,
    need_entropy: bool,
) -> RowLogProbs:
    """Of `scale` times the logits of `hidden` [T, K], with at most `logits` of them at a time.

    The label's own logit is computed in at least float32: all others are averaged, but its rounding would be
    that of the result.
    """
    made = _empty(hidden, need_grad, need_entropy)
    for start in range(0, len(hidden), ROWS):
        rows = slice(start, start + ROWS)
        x, of_rows = hidden[rows], labels[rows]
        passed = pass_over(
            x, head, bias, of_rows, min(logits, LOGITS), scale=scale,
            gather=need_grad, weigh=need_entropy,
        )  # fmt: skip
        precise = passed.largest.dtype
        of_labels = head.rows(of_rows).to(precise)
        passed.of_label = torch.linalg.vecdot(x.to(precise), of_labels).mul_(scale)
        if bias is not None:
            passed.of_label += scale * bias[of_rows]
        losses = passed.losses()
        made.log_probs[rows] = -losses
        if need_entropy:
            made.entropy[rows] = passed.entropies(losses)
        if passed.gathered is not None:
            made.gradient[rows] = passed.gradient(passed.gathered, of_labels).mul_(-scale)
    return made


def _on_any_device(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    chunk_rows: int,
    need_grad: bool,
    need_entropy: bool,
) -> RowLogProbs:
    return head_log_probs(
        hidden, dense_head(weight), bias, labels, scale=scale, logits=chunk_rows * len(weight),
        need_grad=need_grad, need_entropy=need_entropy,
    )  # fmt: skip


def on_cuda(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    chunk_rows: int,
    need_grad: bool,
    need_entropy: bool,
) -> RowLogProbs:
    """The same; the logits of a chunk become their gradient where they lie."""
    losses_of = triton_form("losses_and_gradient_", hidden, weight)
    if losses_of is None:
        return _on_any_device(hidden, weight, bias, labels, scale, chunk_rows, need_grad, need_entropy)
    made = _empty(hidden, need_grad, need_entropy)
    step = max(chunk_rows, ROWS_ON_CUDA)
    for start in range(0, len(hidden), step):
        rows = slice(start, start + step)
        logits = torch.nn.functional.linear(hidden[rows], weight, bias).mul_(scale)
        if need_entropy:
            made.entropy[rows] = torch.cat([_entropies(part) for part in logits.split(ENTROPIES_ON_CUDA)])
        made.log_probs[rows] = -losses_of(logits, labels[rows], need_grad)
        if need_grad:
            made.gradient[rows] = torch.mm(logits, weight).mul_(-scale)
    return made


def _entropies(logits: Tensor) -> Tensor:
    known = logits.float().log_softmax(-1)
    entropies: Tensor = -torch.linalg.vecdot(known.exp(), known)
    return entropies


LIBRARY.impl("linear_log_probs", _on_any_device, "CompositeExplicitAutograd")
LIBRARY.impl("linear_log_probs", on_cuda, "CUDA")


@torch.library.register_fake("graft::linear_log_probs", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _shapes(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    chunk_rows: int,
    need_grad: bool,
    need_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(hidden, need_grad, need_entropy)


def _empty(hidden: Tensor, need_grad: bool, need_entropy: bool) -> RowLogProbs:
    precise = torch.promote_types(hidden.dtype, torch.float32)
    log_probs = hidden.new_empty(len(hidden), dtype=precise)
    entropy = hidden.new_empty(len(hidden) if need_entropy else 0, dtype=precise)
    return RowLogProbs(log_probs, entropy, hidden.new_empty(hidden.shape if need_grad else 0))


class _WithGradient(torch.autograd.Function):
    """Rows whose gradients are known in forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, compute: Callable[[Tensor, bool], RowLogProbs]
    ) -> tuple[Tensor, Tensor]:
        log_probs, entropy, gradient = compute(hidden, ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype).unsqueeze(1), None


def with_gradient(hidden: Tensor, compute: Callable[[Tensor, bool], RowLogProbs]) -> tuple[Tensor, Tensor]:
    """Log-probabilities [T], differentiable for `hidden` [T, K], and entropies [T], which are not.

    compute: from hidden states, and whether their gradient is needed, to both.
    """
    log_probs, entropy = _WithGradient.apply(hidden, compute)  # type: ignore[no-untyped-call]
    return log_probs, entropy


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    chunk_rows: int = 2048,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """log p(label) of each row by a **frozen** linear head, whose logits never exist all at once.

    Shapes: hidden [T, K], weight [V, K], labels [T] -> [T], and the entropies [T] in nats (empty unless
    asked for, and constants for autograd), in float32 (float64 for float64). The gradient flows to `hidden`.

    Args:
        scale: what logits are multiplied with, 1 / temperature.

    Raises:
        TrainingError: the head is trained; its gradient would be missing.

    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.eye(2)
    >>> log_probs, entropy = linear_log_probs(hidden, weight, torch.tensor([0]), with_entropy=True)
    >>> round(float(log_probs), 4), round(float(entropy), 4)
    (-0.3133, 0.5822)
    """
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise TrainingError(
            "The output head requires gradients, which these log-probabilities do not compute.",
            meaning="The head is trained as a whole, for instance by full fine-tuning.",
            fix="Compute logits with the head itself and use torch.log_softmax.",
        )

    def compute(x: Tensor, need_grad: bool) -> RowLogProbs:
        found = torch.ops.graft.linear_log_probs(
            x, weight, bias, labels, scale, chunk_rows, need_grad, with_entropy
        )
        return RowLogProbs(*found)

    return with_gradient(hidden, compute)
