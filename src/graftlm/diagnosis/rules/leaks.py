"""D26: held-out rows that were trained on, and training rows that repeat each other."""

from __future__ import annotations

from collections.abc import Mapping

from graftlm.diagnosis.confidence import confidence
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.facts.data import Overlap
from graftlm.diagnosis.finding import Finding, Plot
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.shown import again, bars, percent
from graftlm.diagnosis.symptoms import Symptom, finding_of

LEAKED, MANY = 0.01, 0.10
REPEATED, MOSTLY = 0.05, 0.5


def check(evidence: Evidence) -> Finding | None:
    """Sequences of 13 words tell, as is the custom since arXiv 2005.14165."""
    return finding_of(RULE.id, RULE.title, (_leaked, _repeated), evidence)


def _leaked(evidence: Evidence) -> Symptom | None:
    found = _overlap(evidence)
    if found is None or found.leaked <= LEAKED * found.held_out:
        return None
    share = found.leaked / found.held_out
    pairs = ", ".join(found.pairs)
    return Symptom(
        "error" if share > MANY else "warning",
        confidence(share, LEAKED, MANY),
        f"{found.leaked:,} of {found.held_out:,} held-out rows ({percent(share)}) stand in the training rows "
        f"(held-out row = training row: {pairs}{' ...' if found.leaked > len(found.pairs) else ''}).",
        "Scores on them measure memory: the adapter looks better than it is.",
        "Let Graft hold rows out of the training file so that no row shares a passage with the other side.",
        again(evidence, "apart", **_held_out_apart(evidence)),
        {"leaked": share, "threshold": LEAKED, "touched": found.touched / found.held_out},
        _plot(found),
    )


def _held_out_apart(evidence: Evidence) -> dict[str, object]:
    """Settings that hold rows out of the training file, by passages."""
    data = evidence.recipe.get("data", {})
    is_own_file = isinstance(data, Mapping) and data.get("eval_path") is not None
    return {**({"data__eval_path": "null"} if is_own_file else {}), "data__hold_out": "passages"}


def _repeated(evidence: Evidence) -> Symptom | None:
    found = _overlap(evidence)
    if found is None or found.repeated <= REPEATED * found.train:
        return None
    share = found.repeated / found.train
    return Symptom(
        "warning",
        confidence(share, REPEATED, MOSTLY),
        f"{found.repeated:,} of {found.train:,} training rows ({percent(share)}) repeat an earlier one.",
        "They count several times in the loss, and are the first to be learnt by heart.",
        "Keep each row once.",
        again(evidence, "once", data__path="ROWS-ONCE"),
        {"repeated": share, "repeated_threshold": REPEATED},
        _plot(found),
    )


def _overlap(evidence: Evidence) -> Overlap | None:
    found = None if evidence.data is None else evidence.data.overlap
    return found if found is not None and found.train and found.held_out else None


def _plot(found: Overlap) -> Plot:
    values = {
        "held out: leaked": found.leaked / found.held_out,
        "held out: touched": found.touched / found.held_out,
        "training: repeated": found.repeated / found.train,
    }
    return bars("Rows that are there more than once", "share of rows", values, LEAKED)


RULE = Rule(
    "D26",
    "Held-out rows leak, or rows repeat",
    check,
    "13-word sequences: Brown et al. 2020 (arXiv 2005.14165); thresholds ours",
    is_live=True,
)
