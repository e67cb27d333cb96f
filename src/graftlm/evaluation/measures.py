"""What tasks are judged by: each measure is a function of evaluated rows, found by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from graftlm.evaluation.label_scores import (
    HITS,
    LABELS,
    VALUES,
    macro_f1,
    matthews,
    micro_f1,
    pearson,
    spearman,
    squared_error,
)
from graftlm.evaluation.mark_scores import MARKS, good_above_bad, mark_margin
from graftlm.evaluation.runner import EvaluatedRow
from graftlm.evaluation.text_scores import NEEDED, bleu, chrf, rate

Rows = Sequence[EvaluatedRow]
Unit = Literal["share", "nats", "tokens", "points", "plain"]
"""How a value is shown: 0.93 as 93 %, with its unit, or as it is."""
Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Measure:
    """One figure of a set of rows.

    `value` gets rows that have all of `figures`, at least one; NaN where it is not defined on them (one class
    alone has no correlation). A first measure that is "neither" better high nor low judges nothing.
    """

    name: str
    title: str
    value: Callable[[Rows], float]
    better: Better
    unit: Unit = "plain"
    figures: tuple[str, ...] = ()
    """Names of the rows' figures that it is computed from; a mean needs not say it."""

    def covers(self, row: EvaluatedRow) -> bool:
        """Whether the row has what the measure is computed from."""
        needed = (self.value.name,) if isinstance(self.value, MeanOf) else self.figures
        return all(name in row.figures for name in needed)


@dataclass(frozen=True)
class MeanOf:
    """The mean of a figure over rows that all have it; resampled as one array."""

    name: str

    def __call__(self, rows: Rows) -> float:
        return fmean(row.figures[self.name] for row in rows)


def mean_of(name: str) -> MeanOf:
    """The mean of a figure.

    >>> mean_of("margin")([EvaluatedRow(1, "", 0.0, 1, figures={"margin": 2.0})])
    2.0
    """
    return MeanOf(name)


MEASURES: Mapping[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("accuracy", "Accuracy", mean_of("accuracy"), "higher", "share"),
        Measure("macro_f1", "Macro-F1", macro_f1, "higher", "share", LABELS),
        Measure("mcc", "Matthews correlation", matthews, "higher", "plain", LABELS),
        Measure("micro_f1", "Micro-F1", micro_f1, "higher", "share", HITS),
        Measure("span_f1", "F1 of spans", micro_f1, "higher", "share", HITS),
        Measure(
            "token_accuracy",
            "Accuracy of words",
            rate("right_words", "words_told"),
            "higher",
            "share",
            ("right_words", "words_told"),
        ),
        Measure("pearson", "Pearson correlation", pearson, "higher", "plain", VALUES),
        Measure("spearman", "Spearman correlation", spearman, "higher", "plain", VALUES),
        Measure("mse", "Mean squared error", squared_error, "lower", "plain", VALUES),
        Measure("reward_accuracy", "Reward accuracy", mean_of("reward_accuracy"), "higher", "share"),
        Measure("reward_margin", "Reward margin", mean_of("reward_margin"), "higher"),
        Measure("good_above_bad", "Good answers above bad ones", good_above_bad, "higher", "share", MARKS),
        Measure("mark_margin", "Reward of good minus bad answers", mark_margin, "higher", "plain", MARKS),
        Measure("chrf", "chrF", chrf, "higher", "points", NEEDED["chrf"]),
        Measure("bleu", "BLEU", bleu, "higher", "points", NEEDED["bleu"]),
        Measure("rouge1", "ROUGE-1", mean_of("rouge1"), "higher", "share"),
        Measure("rouge2", "ROUGE-2", mean_of("rouge2"), "higher", "share"),
        Measure("rougeL", "ROUGE-L", mean_of("rougeL"), "higher", "share"),
        Measure(
            "character_error_rate",
            "Character error rate",
            rate("character_edits", "characters"),
            "lower",
            "share",
            NEEDED["character_error_rate"],
        ),
        Measure(
            "word_error_rate",
            "Word error rate",
            rate("word_edits", "words"),
            "lower",
            "share",
            NEEDED["word_error_rate"],
        ),
        Measure("reward", "Reward", mean_of("reward"), "higher"),
        Measure("answer_tokens", "Length of answers", mean_of("answer_tokens"), "neither", "tokens"),
        Measure("kl", "KL to the base", mean_of("kl"), "neither", "nats"),
    )
}
"""Name -> measure. A task names those that it has in `Evaluation.measures`."""
