"""Log-probabilities of answers, token by token: what losses over preferences and policies are made of.

A prompt is computed once for all its answers, where the model's attention can be told so; only the tokens
that an answer's token is predicted from reach the output head, whose logits never exist all at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graftlm.data.batches import WIDTH_STEP
from graftlm.data.branches import BranchBatch, Branched, apart, branch_batch, sources
from graftlm.data.encode import IGNORED
from graftlm.data.filled import filled
from graftlm.data.forms import DOCUMENTS, for_attention
from graftlm.kernels.log_probs import linear_log_probs
from graftlm.models.generate import evaluation_mode
from graftlm.objectives.packed_head import packed_log_probs
from graftlm.objectives.sft import (
    attention_of,
    choose_path,
    require_causal,
    rows_per_chunk,
    take_rows,
    vocabulary_of,
    wanted_states,
)
from graftlm.quant.embedding import packed_head
from graftlm.quant.facts import device_of, dtype_of

NEAR = {torch.float64: 1e-6, torch.float32: 1e-3}
"""How far hidden states behind a shared prompt may be from others, relative to their size; in 16 bits:"""
NEAR_IN_16_BITS = 0.05
PROBED = 12
"""Tokens of a probe, about."""

Scored = tuple[Tensor, Tensor]
"""Log-probabilities [N], and entropies [N] or none."""


@dataclass(frozen=True)
class Answers:
    """What a model says of the answers in a batch.

    log_probs: [N], of each token of each answer in order, float32 or better, with gradient.
    lengths: tokens of each of the A answers, in the order of the batch.
    entropy: [N], of the distribution that each token was drawn from, in nats and without gradient, if wanted.
    hidden: [N, H], the last hidden states that the tokens are predicted from, with gradient, if wanted.
    """

    log_probs: Tensor
    lengths: tuple[int, ...]
    entropy: Tensor | None = None
    hidden: Tensor | None = None

    def sums(self) -> Tensor:
        """Of each answer: the logarithm of its probability. Shape: [A]. An empty answer has 0."""
        parts = self.log_probs.split(self.lengths)
        return torch.stack([part.sum() for part in parts]) if parts else self.log_probs.new_zeros(0)

    def means(self) -> Tensor:
        """Of each answer, per token. Shape: [A]. An empty answer has 0."""
        sums = self.sums()
        lengths = torch.tensor(self.lengths, dtype=sums.dtype).clamp_min_(1)
        return sums / lengths.to(sums.device, non_blocking=True)


class AnswerLogProbs:
    """Log-probabilities of the answers of a batch under a causal model.

    The way there is chosen once per run and said: `path` and `why`.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Raises:
            ModelError: it is an encoder-decoder model.
        """
        require_causal(model)
        self.path, why = choose_path(model)
        self._shares: dict[str, bool] = {}
        shares = self._shares_prompts(model, attention_of(model))
        self.why = f"{why}; {'prompts are shared' if shares else 'a prompt is computed for each answer'}"

    def __call__(
        self,
        model: nn.Module,
        batch: BranchBatch,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
        with_hidden: bool = False,
        tokens: int = 0,
    ) -> Answers:
        """Of logits divided by `temperature`. `inputs` are on the model's device, all else on the host.

        Args:
            tokens: what flat batches are filled up to at least, as `Objective.tokens` has it.
        """
        lengths = tuple(_answer_lengths(batch))
        ready = self._form(model, batch)
        # A matrix product of a new shape is prepared anew: lengths are multiples of `WIDTH_STEP`.
        whole_steps = -(-ready.labels.shape[1] // WIDTH_STEP) * WIDTH_STEP
        ready = filled(ready, max(tokens, whole_steps))
        labels = ready.labels[ready.labels != IGNORED]
        scale = 1 / temperature
        if self.path == "full logits":
            logits, hidden = _logits(model, ready, with_hidden)
            labels = labels.to(logits.device, non_blocking=True)
            scored = _chunked(lambda part, t: _of_logits(part, t, scale, with_entropy), logits, labels)
        else:
            hidden = _states(model, ready)
            labels = labels.to(hidden.device, non_blocking=True)
            scored = self._of_hidden(model, hidden, labels, scale, with_entropy)
        entropy = scored[1] if with_entropy else None
        return Answers(scored[0], lengths, entropy, hidden if with_hidden else None)

    def _form(self, model: nn.Module, batch: BranchBatch) -> BranchBatch:
        """The batch as the model can read it now: its attention may be another while it is trained."""
        implementation = attention_of(model)
        is_shared = self._shares_prompts(model, implementation) and (
            implementation == DOCUMENTS or _within_window(model, batch)
        )
        return for_attention(batch if is_shared else apart(batch), implementation, dtype_of(model))

    def _shares_prompts(self, model: nn.Module, implementation: str) -> bool:
        """Whether answers can see one prompt through this attention; it is tried once."""
        if implementation not in self._shares:
            self._shares[implementation] = _shares_prompts(model, implementation)
        return self._shares[implementation]

    def _of_hidden(
        self, model: Any, hidden: Tensor, labels: Tensor, scale: float, with_entropy: bool
    ) -> Scored:
        head = model.get_output_embeddings()
        vocabulary, packed = vocabulary_of(head), packed_head(head)
        if self.path == "frozen head":
            return linear_log_probs(
                hidden, head.weight, labels, bias=head.bias, scale=scale,
                chunk_rows=rows_per_chunk(vocabulary), with_entropy=with_entropy,
            )  # fmt: skip
        if self.path == "packed head" and packed is not None:
            return packed_log_probs(hidden, packed, labels, head.bias, scale=scale, with_entropy=with_entropy)
        return _chunked(
            lambda part, t: _of_logits(head(part), t, scale, with_entropy), hidden, labels, vocabulary
        )


def _answer_lengths(batch: BranchBatch) -> list[int]:
    """Labelled tokens of each document that continues another, in order."""
    lengths = []
    for labels, documents, parents in zip(batch.labels, batch.documents, batch.parents, strict=True):
        parts = labels[: sum(documents)].split(documents)
        answers = [part for part, parent in zip(parts, parents, strict=True) if parent >= 0]
        lengths += [int((part != IGNORED).sum()) for part in answers]
    return lengths


def _states(model: nn.Module, batch: BranchBatch) -> Tensor:
    """For each labelled token the hidden state that it is predicted from. Shape: [N, H]."""
    rows, order = _rows(batch)
    return _repeated(wanted_states(model, batch.inputs, rows), order)


def _logits(model: nn.Module, batch: BranchBatch, with_hidden: bool) -> tuple[Tensor, Tensor | None]:
    """The logits [N, V], and the hidden states if wanted."""
    rows, order = _rows(batch)
    out = model(**batch.inputs, use_cache=False, output_hidden_states=with_hidden)
    hidden = _repeated(take_rows(out.hidden_states[-1], rows), order) if with_hidden else None
    return _repeated(take_rows(out.logits, rows), order), hidden


def _rows(batch: BranchBatch) -> tuple[Tensor, Tensor]:
    """Which tokens something is predicted from, boolean [B, T], and for each label which one of them [N]."""
    index = sources(batch)
    rows = torch.zeros(batch.labels.numel(), dtype=torch.bool).index_fill_(0, index, True)
    return rows.view_as(batch.labels), rows.cumsum(0)[index] - 1


def _repeated(rows: Tensor, order: Tensor) -> Tensor:
    """`rows[order]`, whose gradient is summed in one order on every device. Shapes: [R, H], [N] -> [N, H].

    `order` counts up but where an answer begins: its first token is predicted from the end of its prompt.
    """
    jumps = [0, *(order.diff() != 1).nonzero().flatten().add(1).tolist(), len(order)]
    runs = [(int(order[start]), int(order[stop - 1]) + 1) for start, stop in pairwise(jumps) if start < stop]
    if len(runs) <= 1:
        return rows
    cuts = sorted({cut for run in runs for cut in run})
    spans = list(pairwise(cuts))
    pieces = zip(spans, rows.split([stop - start for start, stop in spans]), strict=True)
    by_start = {first: (last, piece) for (first, last), piece in pieces}
    parts = []
    for start, stop in runs:
        while start < stop:
            start, piece = by_start[start]
            parts.append(piece)
    return torch.cat(parts)


def _chunked(
    score: Callable[[Tensor, Tensor], Scored], rows: Tensor, labels: Tensor, vocabulary: int | None = None
) -> Scored:
    """Over chunks; each chunk's logits are formed again in backward instead of being kept."""
    size = rows_per_chunk(vocabulary or rows.shape[-1])
    parts = zip(rows.split(size), labels.split(size), strict=True)
    scored = [checkpoint(score, *part, use_reentrant=False) for part in parts]
    log_probs, entropies = zip(*scored, strict=True)
    return torch.cat(log_probs), torch.cat(entropies)


def _of_logits(logits: Tensor, labels: Tensor, scale: float, with_entropy: bool) -> Scored:
    logits = scale * logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = logits.logsumexp(-1)
    log_probs = logits.gather(1, labels.unsqueeze(1)).squeeze(1) - total
    with torch.no_grad():
        known = (logits - total.unsqueeze(1)) if with_entropy else logits[:0]
        return log_probs, -torch.linalg.vecdot(known.exp(), known)


def _within_window(model: Any, batch: BranchBatch) -> bool:
    """Whether every token sees all before it: a mask from outside replaces the model's sliding window."""
    text = model.config.get_text_config()
    window = getattr(text, "sliding_window", None)
    if not window or getattr(text, "use_sliding_window", True) is False:
        return True
    longest = max(
        length + (documents[parent] if parent >= 0 else 0)
        for documents, parents in zip(batch.documents, batch.parents, strict=True)
        for length, parent in zip(documents, parents, strict=True)
    )
    return longest <= int(window)


def _shares_prompts(model: Any, implementation: str) -> bool:
    """Whether an answer that sees a prompt further in front gives what it gives right behind it.

    With recurrent layers, or positions that come from a 2-D mask, it does not.
    """
    if implementation not in ("sdpa", "eager", DOCUMENTS):
        return False
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", PROBED)
    ids = tuple(number % vocabulary for number in range(1, PROBED))
    row = Branched(ids[:3], (ids[3:5], ids[5:9], ids[9:]), 1, truncated=False)
    batch = branch_batch([row], 0)
    batch = replace(batch, inputs={name: x.to(device_of(model)) for name, x in batch.inputs.items()})
    forms = [for_attention(form, implementation, dtype_of(model)) for form in (batch, apart(batch))]
    try:
        with evaluation_mode(model):
            found, expected = (_probe(model, form) for form in forms)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):
        return False
    difference, size = (found - expected).float().norm(dim=-1), expected.float().norm(dim=-1)
    near = NEAR.get(expected.dtype, NEAR_IN_16_BITS)
    return bool((difference <= near * size).all())


def _probe(model: Any, batch: BranchBatch) -> Tensor:
    """What the answers are predicted from: hidden states, or logits where a model has no stack of its own."""
    stack = getattr(model, "base_model", model)
    return _logits(model, batch, with_hidden=False)[0] if stack is model else _states(model, batch)
