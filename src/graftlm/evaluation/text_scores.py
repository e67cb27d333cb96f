"""How near a written text is to its reference: edits, n-grams (chrF, BLEU) and ROUGE.

Each row gives counts, and a figure of many rows is a function of their sums, so that any set of rows has one.
Case and punctuation count; white space is first made even, as in `metrics.normalise`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any

from graftlm.core.errors import MissingDependency
from graftlm.evaluation.metrics import normalise
from graftlm.evaluation.runner import EvaluatedRow, Evaluation

Rows = Sequence[EvaluatedRow]
Figures = dict[str, float]

BLEU_ORDER, CHRF_ORDER, CHRF_BETA = 4, 6, 2.0
ROUGE = ("rouge1", "rouge2", "rougeL")
PACKAGES = {"bleu": "sacrebleu", **dict.fromkeys(ROUGE, "rouge_score")}
"""Measure -> the package that it needs; the others need none."""


def require_packages(names: Sequence[str]) -> None:
    """What these measures need is installed.

    Raises:
        MissingDependency: it is not.
    """
    for package in {PACKAGES[name] for name in names if name in PACKAGES}:
        if find_spec(package) is None:
            raise MissingDependency(package, extra="metrics")


def with_scores(evaluation: Evaluation, names: Sequence[str]) -> Evaluation:
    """The evaluation judged by these measures: rows with an answer get the figures that they rest on.

    >>> row = EvaluatedRow(1, "", 0.5, 2, "in", "a cat", "a hat")
    >>> found = with_scores(Evaluation("base", (row,), 0.0, True, ""), ["character_error_rate"])
    >>> found.measures, found.rows[0].figures
    (('character_error_rate',), {'character_edits': 1.0, 'characters': 5.0})
    """
    known = [name for name in names if name in SCORES]
    rows = tuple(_scored(row, known) for row in evaluation.rows)
    return replace(evaluation, rows=rows, measures=(*evaluation.measures, *known))


def _scored(row: EvaluatedRow, names: Sequence[str]) -> EvaluatedRow:
    if row.prediction is None or row.reference is None:
        return row
    texts = normalise(row.prediction), normalise(row.reference)
    figures = dict(row.figures)
    for name in names:
        figures.update(SCORES[name](*texts))
    return replace(row, figures=figures)


def character_edits(prediction: str, reference: str) -> Figures:
    """Insertions, deletions and substitutions between two texts, and the reference's length, in characters.

    >>> character_edits("kitten", "sitting")
    {'character_edits': 3.0, 'characters': 7.0}
    """
    return {"character_edits": float(edits(prediction, reference)), "characters": float(len(reference))}


def word_edits(prediction: str, reference: str) -> Figures:
    """The same in words, which are what spaces part."""
    words = prediction.split(), reference.split()
    return {"word_edits": float(edits(*words)), "words": float(len(words[1]))}


def edits(first: Sequence[str], second: Sequence[str]) -> int:
    """Levenshtein distance of two sequences.

    Columns of the table are bits of whole numbers (Myers 1999, with Hyyrö's correction), so that a row of it
    costs a few additions.

    >>> edits("kitten", "sitting"), edits(["a"], [])
    (3, 1)
    """
    if not first:
        return len(second)
    places: dict[str, int] = {}
    for place, item in enumerate(first):
        places[item] = places.get(item, 0) | 1 << place
    whole, last = (1 << len(first)) - 1, 1 << (len(first) - 1)
    up, down, distance = whole, 0, len(first)
    for item in second:
        same = places.get(item, 0)
        diagonal = (((same & up) + up) ^ up) | same | down
        right, left = down | (~(diagonal | up) & whole), up & diagonal
        distance += bool(right & last) - bool(left & last)
        right, left = (right << 1 | 1) & whole, (left << 1) & whole
        up, down = left | (~(diagonal | right) & whole), right & diagonal
    return distance


def chrf_counts(prediction: str, reference: str) -> Figures:
    """Character n-grams up to 6 without spaces: those written, those wanted, and those in both."""
    figures: Figures = {}
    written, wanted = ("".join(text.split()) for text in (prediction, reference))
    for order in range(1, CHRF_ORDER + 1):
        ours, theirs = _grams(written, order), _grams(wanted, order)
        both = sum((ours & theirs).values())
        # As sacreBLEU: what is longer than the reference has nothing to be counted against.
        figures[f"chrf_written_{order}"] = float(sum(ours.values()) if theirs else 0)
        figures[f"chrf_wanted_{order}"] = float(sum(theirs.values()))
        figures[f"chrf_both_{order}"] = float(both)
    return figures


def _grams(text: str, order: int) -> Counter[str]:
    return Counter(text[place : place + order] for place in range(len(text) - order + 1))


def chrf(rows: Rows) -> float:
    """chrF2 of a corpus, 0 to 100 (Popović 2015), as sacreBLEU computes it."""
    precision = recall = 0.0
    orders = 0
    for order in range(1, CHRF_ORDER + 1):
        parts = ("written", "wanted", "both")
        written, wanted, both = (_sum(rows, f"chrf_{part}_{order}") for part in parts)
        if written and wanted:
            precision, recall, orders = precision + both / written, recall + both / wanted, orders + 1
    if not precision or not recall:
        return 0.0
    weight = CHRF_BETA**2
    return 100 / orders * (1 + weight) * precision * recall / (weight * precision + recall)


def bleu_counts(prediction: str, reference: str) -> Figures:
    """What sacreBLEU counts of one row: n-grams up to 4 in its standard tokens (13a), and lengths."""
    score = _bleu().corpus_score([prediction], [[reference]])
    figures = {"bleu_written": float(score.sys_len), "bleu_wanted": float(score.ref_len)}
    for order in range(BLEU_ORDER):
        figures[f"bleu_right_{order + 1}"] = float(score.counts[order])
        figures[f"bleu_all_{order + 1}"] = float(score.totals[order])
    return figures


def bleu(rows: Rows) -> float:
    """BLEU of a corpus, 0 to 100 (Papineni et al. 2002), as sacreBLEU computes it."""
    orders = range(1, BLEU_ORDER + 1)
    found = _bleu().compute_bleu(
        [int(_sum(rows, f"bleu_right_{order}")) for order in orders],
        [int(_sum(rows, f"bleu_all_{order}")) for order in orders],
        int(_sum(rows, "bleu_written")),
        int(_sum(rows, "bleu_wanted")),
        smooth_method="exp",  # its own default for a corpus
    )
    return float(found.score)


@cache
def _bleu() -> Any:
    require_packages(["bleu"])
    from sacrebleu.metrics.bleu import BLEU

    return BLEU()


def rouge(name: str) -> Callable[[str, str], Figures]:
    """F1 of one ROUGE measure (Lin 2004), 0 to 1, without stemming, by the reference implementation."""

    def figures(prediction: str, reference: str) -> Figures:
        return {name: float(_rouge(name).score(reference, prediction)[name].fmeasure)}

    return figures


@cache
def _rouge(name: str) -> Any:
    require_packages([name])
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([name])


def rate(edited: str, whole: str) -> Callable[[Rows], float]:
    """Edits of all rows as a share of what they hold."""
    return lambda rows: _sum(rows, edited) / max(1.0, _sum(rows, whole))


def _sum(rows: Rows, name: str) -> float:
    return sum(row.figures[name] for row in rows)


SCORES: Mapping[str, Callable[[str, str], Figures]] = {
    "chrf": chrf_counts,
    "character_error_rate": character_edits,
    "word_error_rate": word_edits,
    "bleu": bleu_counts,
    **{name: rouge(name) for name in ROUGE},
}
"""Measure -> a row's figures, from what was written and what was wanted."""
NEEDED: Mapping[str, tuple[str, ...]] = {
    "chrf": tuple(
        f"chrf_{part}_{order}" for order in range(1, CHRF_ORDER + 1) for part in ("written", "wanted", "both")
    ),
    "character_error_rate": ("character_edits", "characters"),
    "word_error_rate": ("word_edits", "words"),
    "bleu": (
        "bleu_written",
        "bleu_wanted",
        *(f"bleu_{part}_{order}" for order in range(1, BLEU_ORDER + 1) for part in ("right", "all")),
    ),
}
"""Measure -> the figures that it is computed from."""
