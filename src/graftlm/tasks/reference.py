"""What the base says of answers: computed once, before the first step, and kept in the run's folder."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from graftlm.core.files import write_atomic
from graftlm.core.progress import progress, say
from graftlm.data.batches import Batch
from graftlm.data.branches import Branched, branch_batch
from graftlm.data.longest_first import longest_first
from graftlm.data.row_batches import RowBatches, SizedRow
from graftlm.evaluation.divergence import without_adapters
from graftlm.models.generate import Progress, StopFlag, evaluation_mode
from graftlm.objectives.log_probs import AnswerLogProbs
from graftlm.quant.facts import device_of
from graftlm.training.step import to_device
from graftlm.training.timeline import Timeline
from graftlm.training.train_section import TrainSection

FILE = "reference.safetensors"
SUMS = "sums"
TOKENS_PER_BATCH = 8192
SAVED_EVERY = 64
"""Batches between two writings of the file: what an interruption costs."""

R = TypeVar("R", bound=SizedRow)
B = TypeVar("B", bound=Batch)


class Reference:
    """Log-probabilities of the answers of known rows, looked up by the rows themselves."""

    def __init__(self, rows: Sequence[Branched], sums: Tensor) -> None:
        self._places = {row: place for place, row in enumerate(rows)}
        self._sums = sums

    def of(self, rows: Sequence[Branched]) -> Tensor:
        """Shape: [rows, answers]."""
        return self._sums[[self._places[row] for row in rows]]


def reference_of(
    model: nn.Module, log_probs: AnswerLogProbs, rows: Sequence[Branched], run: Path, stop: StopFlag
) -> Reference:
    """Of the model without its adapters, for all rows; an interrupted run goes on where it stopped.

    Args:
        rows: each with the same number of answers.
        run: the run's folder; `reference.safetensors` in it keeps the values.
        stop: raises where somebody asked to stop.
    """
    path, fingerprint = run / FILE, fingerprint_of(rows)
    found = _kept(path, fingerprint)
    if found is None:
        found = torch.full((len(rows), len(rows[0].answers)), torch.nan)
    if found.isnan().any():
        say(f"Base   log-probabilities of {found.numel():,} answers, computed once")

        def keep(sums: Tensor) -> None:
            write_atomic(path, save({SUMS: sums}, {"fingerprint": fingerprint}))

        with without_adapters(model), progress("the base on the answers") as tick:
            answer_sums(model, log_probs, rows, found, progress=tick, stop=stop, keep=keep)
        keep(found)
    return Reference(rows, found)


def rows_to_come(batches: RowBatches[R, B], train: TrainSection) -> list[R]:
    """The rows that a run will see, in the order of the data: not all where `max_steps` end it early.

    Of one task among several (`multi`) a run sees no more than it would see of that task alone.
    """
    if train.max_steps is None:
        return list(batches.known)
    timeline = Timeline(batches, train.gradient_accumulation_steps)
    seen = set[R]()
    for step in range(timeline.total_steps(train)):
        window = timeline.at(step)
        seen.update(row for index in window.indices for row in batches.rows(window.epoch, index))
        if len(seen) == len(batches.known):
            break
    return [row for row in batches.known if row in seen]


def answer_sums(
    model: nn.Module,
    log_probs: AnswerLogProbs,
    rows: Sequence[Branched],
    found: Tensor | None = None,
    *,
    progress: Progress,
    stop: StopFlag,
    keep: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Log-probabilities of the answers under the model as it stands. Shape: [rows, answers], float32.

    Args:
        found: values that are known already, NaN where not; it is filled in.
        stop: raises where somebody asked to stop, or says so; then NaN is left.
        keep: called with what is found so far, now and then and when somebody asks to stop.
    """
    if found is None:
        found = torch.full((len(rows), len(rows[0].answers)), torch.nan)
    device = device_of(model)
    done = 0
    with evaluation_mode(model):
        for number, places in enumerate(longest_first([row.tokens for row in rows], tokens=TOKENS_PER_BATCH)):
            done += len(places)
            if not found[places].isnan().any():
                continue
            try:
                if stop():
                    break
            except KeyboardInterrupt:
                if keep is not None:
                    keep(found)
                raise
            batch = to_device(branch_batch([rows[place] for place in places], pad=0), device)
            sums = log_probs(model, batch).sums()
            found[places] = sums.float().cpu().view(len(places), -1)
            progress(done, len(rows))
            if keep is not None and (number + 1) % SAVED_EVERY == 0:
                keep(found)
    return found


def fingerprint_of(rows: Sequence[Branched]) -> str:
    """SHA-256 over prompts and answers."""
    digest = hashlib.sha256()
    for row in rows:
        for part in (row.prompt, *row.answers):
            digest.update(len(part).to_bytes(8, "little") + array("q", part).tobytes())
    return digest.hexdigest()


def _kept(path: Path, fingerprint: str) -> Tensor | None:
    """The values in the file, if they are of these rows."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        if (file.metadata() or {}).get("fingerprint") != fingerprint:
            return None
        return torch.as_tensor(file.get_tensor(SUMS))
