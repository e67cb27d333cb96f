"""D19: rows that are too long lose the end of their answers."""

from __future__ import annotations

from graftlm.diagnosis.confidence import confidence
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.facts.data import Cuts
from graftlm.diagnosis.finding import Finding, Plot
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.shown import again, of_rows, percent

SOME, MANY = 0.05, 0.20
STEP = 64
"""Lengths are rounded up to multiples of this."""


def check(evidence: Evidence) -> Finding | None:
    """Only lost ends of answers count: a prompt may be shortened, and a conversation may end early."""
    cuts = None if evidence.data is None else evidence.data.cuts
    if cuts is None or not cuts.rows or cuts.answers <= SOME * cuts.rows:
        return None
    share = cuts.answers / cuts.rows
    above = (
        f"; 5 % of all rows are longer than {cuts.percentile_95:,}" if cuts.percentile_95 > cuts.limit else ""
    )
    fix, command = _fix(evidence, cuts)
    return Finding(
        RULE.id,
        RULE.title,
        "error" if share > MANY else "warning",
        confidence(share, SOME, MANY),
        f"{of_rows(cuts.answers, cuts.rows, cuts.examples)} lose the end of their answer at {cuts.limit:,} "
        f"tokens: {percent(share)}{above}.",
        "An answer that is cut off teaches no end, and what it was to say is not learnt.",
        fix,
        command,
        {"cut_answers": share, "threshold": SOME, "limit": cuts.limit, "percentile_95": cuts.percentile_95},
        _plot(cuts),
    )


def _fix(evidence: Evidence, cuts: Cuts) -> tuple[str, str]:
    """A longer limit where the base takes one; else other rows."""
    wanted = STEP * -(-max(1, cuts.wanted) // STEP)
    length = min(wanted, cuts.context or wanted)
    if length <= cuts.limit:
        said = f"Longer rows than {cuts.limit:,} tokens the base does not take: split them, or shorten them."
        return said, again(evidence, "shorter", data__path="ROWS-SHORTENED")
    field = "task__max_target_length" if evidence.task == "seq2seq" else "data__max_length"
    fitting = f"99 of 100 rows fit into {wanted:,} tokens" + (
        f", of which the base takes {length:,}." if length < wanted else "."
    )
    return f"Raise the limit: {fitting}", again(evidence, "longer", **{field: length})


def _plot(cuts: Cuts) -> Plot:
    last = max(1, len(cuts.lengths) - 1)
    points = tuple((100 * place / last, float(length)) for place, length in enumerate(cuts.lengths))
    return Plot("Length of the rows", "% of rows", "tokens", {"tokens": points}, threshold=cuts.limit)


RULE = Rule("D19", "Answers are cut off", check, "Thresholds ours: 5 % and 20 % of the rows", is_live=True)
