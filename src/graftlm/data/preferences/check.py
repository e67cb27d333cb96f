"""What is wrong with preferences as a whole: lengths that give the better answer away, lopsided marks."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from graftlm.data.branches import Branched
from graftlm.data.duplicates import as_ranges
from graftlm.data.preferences.records import Marked, Preference
from graftlm.data.records import Problem

LONGER_SHARE = 0.7
"""Share of pairs in which the same side is longer, from which on length alone tells the better answer."""
LONGER_RATIO = 1.5
FEW_ROWS = 30
"""Pairs from which on shares say something."""
FAIREST, UNFAIR = 1.0, 4 / 3
"""The ratio of good to bad answers that KTO's paper asks for, weights included, lies between these."""


def pair_findings(pairs: Sequence[Preference]) -> list[Problem]:
    """Doubts about pairs: which side is longer, and pairs that contradict another one."""
    found = []
    sizes = [(len(pair.chosen.text), len(pair.rejected.text)) for pair in pairs]
    share, ratio = _longer(sizes)
    if len(pairs) >= FEW_ROWS and (max(share, 1 - share) > LONGER_SHARE or not _is_fair(ratio)):
        which = "longer" if ratio > 1 else "shorter"
        what = (
            f"length gives the better answer away: the chosen one is longer in {100 * share:.0f} % of the "
            f"pairs, and {ratio:.2f} times as long as the other on average"
        )
        fix = f"The model will learn to write {which} answers too: balance the lengths, or use simpo or ipo."
        found.append(Problem(None, "warning", "length_bias", what, fix))
    turned = _contradictions(pairs)
    if turned:
        what = f"{len(turned)} pairs prefer the answer that another pair rejects (rows {as_ranges(turned)})"
        found.append(Problem(None, "warning", "contradiction", what, "Keep one of each, if one is right."))
    return found


def mark_findings(
    records: Sequence[Marked], desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> list[Problem]:
    """Doubts about marks: all the same, or far more of one kind than the weights make up for."""
    marks = [is_good for record in records for _, is_good in record.answers]
    good, bad = sum(marks), len(marks) - sum(marks)
    if not good or not bad:
        what = f"all {len(marks):,} answers are marked {'good' if good else 'bad'}"
        fix = "KTO learns from both kinds; to imitate good answers alone use --task sft."
        return [Problem(None, "warning", "one_mark", what, fix)]
    ratio = good * desirable_weight / (bad * undesirable_weight)
    if FAIREST / 2 <= ratio <= 2 * UNFAIR:
        return []
    what = f"{good:,} answers are marked good and {bad:,} bad, with their weights {ratio:.2f} to 1"
    name, value = ("undesirable_weight", ratio) if ratio > 1 else ("desirable_weight", 1 / ratio)
    fix = f"Weigh the rarer kind more: --set task.{name}={value:.2g}"
    return [Problem(None, "warning", "lopsided_marks", what, fix)]


def length_facts(rows: Sequence[Branched]) -> list[tuple[str, str]]:
    """For the report: how long chosen and rejected answers are, in tokens."""
    sizes = [(len(row.answers[0]), len(row.answers[1])) for row in rows]
    if not sizes:
        return []
    share, ratio = _longer(sizes)
    chosen, rejected = (fmean(side) for side in zip(*sizes, strict=True))
    return [
        ("Answers, tokens on average", f"{chosen:.0f} chosen, {rejected:.0f} rejected"),
        ("Chosen is the longer answer", f"{100 * share:.0f} % of pairs ({ratio:.2f} times as long)"),
    ]


def _longer(sizes: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Share of pairs with the longer answer chosen (equal ones count half), and the ratio of mean lengths."""
    if not sizes:
        return 0.5, 1.0
    share = fmean((chosen > rejected) + (chosen == rejected) / 2 for chosen, rejected in sizes)
    return share, sum(chosen for chosen, _ in sizes) / max(1, sum(rejected for _, rejected in sizes))


def _is_fair(ratio: float) -> bool:
    return 1 / LONGER_RATIO <= ratio <= LONGER_RATIO


def _contradictions(pairs: Sequence[Preference]) -> list[int]:
    """Rows whose pair is another one's, turned round."""

    def side(pair: Preference, *answers: str) -> str:
        prompt = [" ".join(turn.text.casefold().split()) for turn in pair.prompt]
        return "\x1e".join([*prompt, *(" ".join(answer.casefold().split()) for answer in answers)])

    known = {side(pair, pair.chosen.text, pair.rejected.text) for pair in pairs}
    return [pair.row for pair in pairs if side(pair, pair.rejected.text, pair.chosen.text) in known]
