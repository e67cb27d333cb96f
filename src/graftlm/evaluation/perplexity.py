"""Loss of a model on encoded rows, row by row: the measurement under every comparison."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from graftlm.core.errors import DataError, ModelError
from graftlm.data.batches import Batch
from graftlm.data.forms import DOCUMENTS, flat
from graftlm.data.longest_first import longest_first
from graftlm.evaluation.rows import IGNORED, TokenRow, target_count
from graftlm.models.generate import Progress, StopFlag, context_length, evaluation_mode, input_device
from graftlm.objectives.sft import attention_of

R = TypeVar("R")

_LOGIT_BYTES = 64 * 2**20  # fp32 logits alive at a time
_FULL_LOGIT_BYTES = 256 * 2**20  # where a model gives only full logits: of how many rows at a time


@dataclass(frozen=True)
class RowLoss:
    """Sum of the losses (nats) over the `tokens` targets of row `index` of what was given."""

    index: int
    loss_sum: float
    tokens: int


@dataclass(frozen=True)
class RowLosses:
    """One `RowLoss` per row, in the order given; `complete` is False when the stop flag ended it early.

    `path` says how the logits were formed: "head in chunks", or "full logits" and why.
    """

    rows: tuple[RowLoss, ...]
    complete: bool
    path: str


def row_losses(
    model: nn.Module,
    rows: Sequence[TokenRow],
    *,
    rows_per_batch: int = 16,
    tokens_per_batch: int = 8192,
    progress: Progress | None = None,
    should_stop: StopFlag | None = None,
) -> RowLosses:
    """Loss sums of `model` as it stands (active adapters included) on `rows`.

    Rows are batched by length, longest first, so that memory peaks at the start; a batch that does not
    fit the device is halved. Logits exist for target tokens only and in fp32 for one chunk at a time;
    sums are float64.

    Raises:
        DataError: no rows, or a row without a target token.
        ModelError: a row longer than the model's context, or an encoder-decoder model.
    """
    _require_usable(model, rows)
    measure = _Measure(model)
    found: dict[int, RowLoss] = {}
    lengths = [len(row.input_ids) for row in rows]
    with evaluation_mode(model):
        for batch in longest_first(lengths, tokens=tokens_per_batch, rows=rows_per_batch):
            if should_stop is not None and should_stop():
                break
            sums = halving(measure, [rows[i] for i in batch])
            found.update({i: RowLoss(i, s, target_count(rows[i])) for i, s in zip(batch, sums, strict=True)})
            if progress is not None:
                progress(len(found), len(rows))
    ordered = tuple(found[i] for i in sorted(found))
    return RowLosses(ordered, len(found) == len(rows), measure.path)


def _require_usable(model: nn.Module, rows: Sequence[TokenRow]) -> None:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder model.",
            meaning="This measures the next-token loss of causal models.",
            fix="Load a causal model.",
        )
    if not rows:
        raise DataError("No rows to evaluate.", fix="Give held-out rows.")
    empty = [f"row {row.row}: no target token" for row in rows if target_count(row) == 0]
    if empty:
        raise DataError(
            f"{len(empty)} of {len(rows)} rows have nothing to predict.",
            problems=empty[:20],
            meaning="The answer is empty, or was cut off by max_length.",
            fix="Leave these rows out, or raise max_length.",
        )
    limit = context_length(model)
    longest = max(rows, key=lambda row: len(row.input_ids))
    if limit is not None and len(longest.input_ids) > limit:
        raise ModelError(
            f"Row {longest.row} has {len(longest.input_ids)} tokens; the model's context is {limit}.",
            fix=f"Encode with max_length={limit} or less.",
        )


def halving(measure: Callable[[Sequence[R]], list[float]], rows: Sequence[R]) -> list[float]:
    """Measure `rows`; when the accelerator is out of memory, in two halves."""
    try:
        return measure(rows)
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
    torch.cuda.empty_cache()  # does nothing where CUDA was never used
    half = len(rows) // 2
    return halving(measure, rows[:half]) + halving(measure, rows[half:])


class _Measure:
    """Loss sums of one batch, by the head in chunks where that provably gives the model's own logits."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.why_full = self._refusal()

    @property
    def path(self) -> str:
        return f"full logits: {self.why_full}" if self.why_full else "head in chunks"

    def __call__(self, rows: Sequence[TokenRow]) -> list[float]:
        ids, mask, labels = _pad(rows, input_device(self.model))
        targets = labels[:, 1:]
        if not self.why_full:
            hidden = self._hidden(ids, mask, [len(row.input_ids) for row in rows])
            if hidden is not None:
                return _sums(self._head, hidden[:, :-1], targets)
        return self._from_full_logits(ids, mask, targets)

    def _refusal(self) -> str:
        if "logits_to_keep" not in inspect.signature(self.model.forward).parameters:
            return "the model takes no logits_to_keep"
        if self.model.get_output_embeddings() is None:
            return "the model names no output embeddings"
        if self.model.base_model is self.model:
            return "the model has no separate backbone"
        return ""

    def _head(self, hidden: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()
        logits: Tensor = head(hidden)
        return logits

    def _hidden(self, ids: Tensor, mask: Tensor, lengths: list[int]) -> Tensor | None:
        """The head's inputs [rows, length, width]; None once the logits turn out not to be `head(hidden)`.

        The model itself is called, for the last position's logits only, and every batch compares them
        with the head applied by hand: logit scaling, soft caps and the like cannot slip through. Where its
        attention takes documents, it reads the rows without their padding.
        """
        inputs = {"input_ids": ids, "attention_mask": mask}
        is_flat = attention_of(self.model) == DOCUMENTS
        if is_flat:
            inputs = flat(Batch(inputs, ids, 0, 0, (), tuple((length,) for length in lengths))).inputs
        seen: list[Any] = []
        handle = self.model.base_model.register_forward_hook(
            lambda _module, _inputs, output: seen.append(output)
        )
        try:
            output = self.model(**inputs, use_cache=False, logits_to_keep=1)
        finally:
            handle.remove()
        tokens = inputs["input_ids"].shape[1]
        hidden: Tensor = seen[-1][0][:, -tokens:]  # virtual tokens, if any, stand before
        by_hand = self._head(hidden[:, -1:])
        expected = output.logits[:, -1:]
        if by_hand.shape == expected.shape and torch.allclose(by_hand, expected, rtol=1e-3, atol=1e-3):
            return pad_sequence(list(hidden[0].split(lengths)), batch_first=True) if is_flat else hidden
        self.why_full = "its logits are not the output embeddings of its last hidden state"
        return None

    def _from_full_logits(self, ids: Tensor, mask: Tensor, targets: Tensor) -> list[float]:
        vocabulary = int(self.model.get_input_embeddings().weight.shape[0])
        step = max(1, _FULL_LOGIT_BYTES // (4 * ids.shape[1] * vocabulary))
        sums: list[float] = []
        for start in range(0, len(ids), step):
            part = slice(start, start + step)
            logits = self.model(input_ids=ids[part], attention_mask=mask[part], use_cache=False).logits
            sums += _sums(lambda kept: kept, logits[:, -ids.shape[1] : -1], targets[part])
        return sums


def _pad(rows: Sequence[TokenRow], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids, mask and labels [rows, longest]."""
    width = max(len(row.input_ids) for row in rows)
    gaps = [width - len(row.input_ids) for row in rows]
    pairs = list(zip(rows, gaps, strict=True))
    ids = torch.tensor([[*row.input_ids, *[0] * gap] for row, gap in pairs], device=device)
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * gap for row, gap in pairs], device=device)
    labels = torch.tensor([[*row.labels, *[IGNORED] * gap] for row, gap in pairs], device=device)
    return ids, mask, labels


def _sums(head: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor) -> list[float]:
    """Loss sum of every row; `states` [rows, length, width] are turned into logits for the targets only."""
    targets = targets.to(states.device)
    where = targets != IGNORED
    owner = where.nonzero()[:, 0]
    kept, wanted = states[where], targets[where]
    sums = torch.zeros(len(states), dtype=torch.float64, device="cpu")
    step, start = 1, 0  # one token first: its logits tell the size of the vocabulary
    while start < len(kept):
        part = slice(start, start + step)
        logits = head(kept[part].unsqueeze(0))[0]
        losses = F.cross_entropy(logits.float(), wanted[part].to(logits.device), reduction="none")
        sums.index_add_(0, owner[part].cpu(), losses.double().cpu())
        start += step
        step = max(1, _LOGIT_BYTES // (8 * logits.shape[-1]))  # the fp32 copy and its log-softmax
    return [float(value) for value in sums]
