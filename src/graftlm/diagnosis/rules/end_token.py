"""D15: answers whose end is not learnt: the model writes on until a limit stops it."""

from __future__ import annotations

from graftlm.diagnosis.confidence import MOST, confidence
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.facts.data import Ends
from graftlm.diagnosis.finding import Finding, Severity
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.shown import again, bars, of_rows
from graftlm.diagnosis.symptoms import Symptom, finding_of

DOUBTFUL, USELESS = 0.01, 0.5
"""Shares of rows without a learnt end from which on this is a warning, and an error."""


def check(evidence: Evidence) -> Finding | None:
    """Of rows that were not cut: those are told by D19."""
    return finding_of(RULE.id, RULE.title, (_no_token, _masked, _missing), evidence)


def _no_token(evidence: Evidence) -> Symptom | None:
    ends = _ends(evidence)
    if ends is None or ends.token:
        return None
    return _symptom(
        ends, ends.rows, evidence, MOST,
        "The tokenizer of the base has no end token, and its chat template writes none.",
        "Nothing in the rows says where an answer stops, so the model cannot learn to stop.",
        "Name the end token in the base's tokenizer_config.json (eos_token), and train again.",
    )  # fmt: skip


def _masked(evidence: Evidence) -> Symptom | None:
    ends = _ends(evidence)
    if ends is None or not ends.token or ends.masked <= DOUBTFUL * ends.rows:
        return None
    pads = " It is the padding token as well." if ends.pad_is_end else ""
    return _symptom(
        ends, ends.masked, evidence, _sure(ends.masked, ends),
        f"{of_rows(ends.masked, ends.rows, ends.examples)} end with {ends.token}, and nothing is learnt from "
        f"it.{pads}",
        "A collator that masks by the id of the padding token masks the end of every answer where both are "
        "one token: the model never learns to stop.",
        "Give the tokenizer a padding token of its own, or mask padding by the attention mask. Graft masks "
        "by position.",
    )  # fmt: skip


def _missing(evidence: Evidence) -> Symptom | None:
    ends = _ends(evidence)
    if ends is None or not ends.token:
        return None
    count = ends.without - ends.masked
    if count <= DOUBTFUL * ends.rows:
        return None
    return _symptom(
        ends, count, evidence, _sure(count, ends),
        f"The answers of {of_rows(count, ends.rows, ends.examples)} do not end with {ends.token}.",
        "The model does not learn to stop there, and writes on until a limit stops it.",
        "Let every answer end with the end token: by the chat template, or in the rows.",
    )  # fmt: skip


def _ends(evidence: Evidence) -> Ends | None:
    found = None if evidence.data is None else evidence.data.ends
    return found if found is not None and found.rows else None


def _sure(count: int, ends: Ends) -> float:
    return confidence(count / ends.rows, DOUBTFUL, USELESS)


def _symptom(
    ends: Ends, count: int, evidence: Evidence, sure: float, seen: str, meaning: str, fix: str
) -> Symptom:
    share = count / ends.rows
    severity: Severity = "error" if share > USELESS else "warning"
    figures = {"rows_without_learnt_end": share, "threshold": DOUBTFUL}
    kinds = {
        "end token learnt": ends.rows - ends.without,
        "end token masked": ends.masked,
        "no end token": ends.without - ends.masked,
    }
    plot = bars("How answers end", "rows", kinds)
    return Symptom(severity, sure, seen, meaning, fix, again(evidence, "ended"), figures, plot)


RULE = Rule(
    "D15",
    "The end of answers is not learnt",
    check,
    "Collators that mask the padding token, open in transformers since 2023; thresholds ours",
    is_live=True,
)
