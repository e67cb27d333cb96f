"""Two evaluations of the same rows, compared row by row."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from graftlm.core.errors import DataError
from graftlm.evaluation.label_table import LabelTable, label_table
from graftlm.evaluation.measure_change import MeasureChange, measure_changes
from graftlm.evaluation.metrics import LossChange, Share, exact_match, mcnemar, paired_bootstrap, share_of
from graftlm.evaluation.runner import EvaluatedRow, Evaluation


@dataclass(frozen=True)
class ShareChange:
    """Exact match before and after on the same rows.

    `gained` rows were wrong before and are right now, `lost` the other way round; `p_value` is McNemar's,
    exact.
    """

    before: Share
    after: Share
    gained: int
    lost: int
    p_value: float


@dataclass(frozen=True)
class SampleChange:
    """One row side by side: losses in nats per token, texts where answers were asked for."""

    row: int
    loss_before: float
    loss_after: float
    prompt: str | None
    reference: str | None
    answer_before: str | None
    answer_after: str | None

    @property
    def change(self) -> float:
        """Negative when the adapter is better on this row."""
        return self.loss_after - self.loss_before

    @property
    def is_right(self) -> bool | None:
        """Whether the adapter's answer is the reference; None where no answer was asked for."""
        if self.answer_after is None or self.reference is None:
            return None
        return exact_match(self.answer_after, self.reference)


@dataclass(frozen=True)
class Comparison:
    """What the adapter did to the held-out rows. Samples: largest gains, largest losses, random others.

    `measures` are what the task is judged by, the first before all others; none where the loss alone counts.
    """

    before: str
    after: str
    loss: LossChange
    exact_match: ShareChange | None
    gains: tuple[SampleChange, ...]
    losses: tuple[SampleChange, ...]
    others: tuple[SampleChange, ...]
    measures: tuple[MeasureChange, ...] = ()
    labels: LabelTable | None = None
    loss_title: str = "Held-out loss"


@dataclass(frozen=True)
class Forgetting:
    """What the adapter did to text that the base already knew; `source` says which text that is."""

    source: str
    loss: LossChange


def compare(before: Evaluation, after: Evaluation, *, samples: int = 3, seed: int = 0) -> Comparison:
    """Compare `after` with `before`, paired by row.

    `samples` rows of each kind are picked among the answered rows (among all where none was answered):
    those whose loss fell most, those that went worst (wrong answers first, then the rows whose loss rose
    most), and random others; no row is shown twice.

    Raises:
        DataError: the evaluations are incomplete or of different rows.
    """
    _require_paired(before, after)
    pairs = list(zip(before.rows, after.rows, strict=True))
    gains, losses, others = _pick(pairs, samples, seed)
    return Comparison(
        before=before.name,
        after=after.name,
        loss=_loss_change(before, after, seed),
        exact_match=_share_change(pairs),
        gains=gains,
        losses=losses,
        others=others,
        measures=measure_changes(before, after, seed=seed),
        labels=label_table(before, after),
        loss_title=after.loss_title,
    )


def forgetting(before: Evaluation, after: Evaluation, *, source: str, seed: int = 0) -> Forgetting:
    """The change of the loss on known text (see `known_text`), paired by row.

    Raises:
        DataError: the evaluations are incomplete or of different rows.
    """
    _require_paired(before, after)
    return Forgetting(source, _loss_change(before, after, seed))


def _require_paired(before: Evaluation, after: Evaluation) -> None:
    for evaluation in (before, after):
        if not evaluation.complete or not evaluation.rows:
            raise DataError(
                f"The evaluation {evaluation.name!r} is not complete.",
                meaning="It was stopped before its last row.",
                fix="Evaluate again.",
            )
    problems = [
        f"row {old.row}: {old.digest} before, row {new.row}: {new.digest} after"
        for old, new in zip(before.rows, after.rows, strict=False)
        if (old.digest, old.tokens) != (new.digest, new.tokens)
    ]
    if problems or len(before.rows) != len(after.rows):
        raise DataError(
            f"{before.name!r} and {after.name!r} were measured on different rows "
            f"({len(before.rows)} and {len(after.rows)} rows, {len(problems)} pairs differ).",
            problems=problems[:10],
            meaning="Another file, another order, or another template, tokenizer or max_length.",
            fix="Evaluate both on the same encoded rows.",
        )


def _loss_change(before: Evaluation, after: Evaluation, seed: int) -> LossChange:
    return paired_bootstrap(
        [row.loss_sum for row in before.rows],
        [row.loss_sum for row in after.rows],
        [row.tokens for row in before.rows],
        seed=seed,
    )


def _share_change(pairs: Sequence[tuple[EvaluatedRow, EvaluatedRow]]) -> ShareChange | None:
    flags = [
        (old.matches, new.matches)
        for old, new in pairs
        if old.matches is not None and new.matches is not None
    ]
    if not flags:
        return None
    gained = sum(new and not old for old, new in flags)
    lost = sum(old and not new for old, new in flags)
    return ShareChange(
        before=share_of([old for old, _ in flags]),
        after=share_of([new for _, new in flags]),
        gained=gained,
        lost=lost,
        p_value=mcnemar(gained, lost),
    )


def _pick(
    pairs: Sequence[tuple[EvaluatedRow, EvaluatedRow]], count: int, seed: int
) -> tuple[tuple[SampleChange, ...], tuple[SampleChange, ...], tuple[SampleChange, ...]]:
    changes = [_sample(old, new) for old, new in pairs]
    answered = [sample for sample in changes if sample.answer_after is not None]
    ranked = sorted(answered or changes, key=lambda sample: (sample.change, sample.row))
    count = min(count, len(ranked) // 3) or min(1, len(ranked))
    gains = ranked[:count]
    # A wrong answer is worse than any loss: those first, then the rows whose loss rose most.
    losses = sorted(reversed(ranked[count:]), key=lambda sample: sample.is_right is not False)[:count]
    rest = [sample for sample in ranked[count:] if sample not in losses]
    others = random.Random(seed).sample(rest, min(count, len(rest)))
    return tuple(gains), tuple(losses), tuple(others)


def _sample(old: EvaluatedRow, new: EvaluatedRow) -> SampleChange:
    return SampleChange(
        row=old.row,
        loss_before=old.loss,
        loss_after=new.loss,
        prompt=old.prompt,
        reference=old.reference,
        answer_before=old.prediction,
        answer_after=new.prediction,
    )
