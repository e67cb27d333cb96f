"""D16: rows that begin with two begin tokens, or with none where prompts have one."""

from __future__ import annotations

from graftlm.diagnosis.confidence import confidence
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.facts.data import Begins
from graftlm.diagnosis.finding import Finding, Plot
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.shown import again, bars, of_rows
from graftlm.diagnosis.symptoms import Symptom, finding_of

FEW, MOST_ROWS = 0.01, 0.5


def check(evidence: Evidence) -> Finding | None:
    """A single row with two is one too many: no prompt ever begins so."""
    return finding_of(RULE.id, RULE.title, (_doubled, _missing), evidence)


def _doubled(evidence: Evidence) -> Symptom | None:
    begins = _begins(evidence)
    if begins is None or not begins.doubled:
        return None
    share = begins.doubled / begins.rows
    return Symptom(
        "error" if share > FEW else "warning",
        confidence(share, 0.0, FEW),
        f"{of_rows(begins.doubled, begins.rows, begins.examples)} begin with {begins.token} twice.",
        "The texts hold the begin token already, and the tokenizer or the template writes another: a chat "
        "template was applied before, as a rule. In use prompts begin with one, which the adapter never saw.",
        f"Remove {begins.token} from the texts, or give the rows as conversations and let the template of "
        "the base write them.",
        again(evidence, "once", data__path=f"ROWS-WITHOUT-{begins.token.strip('<>')}"),
        {"doubled": share, "threshold": 0.0},
        _plot(begins),
    )


def _missing(evidence: Evidence) -> Symptom | None:
    begins = _begins(evidence)
    if begins is None or not begins.is_expected or begins.without <= FEW * begins.rows:
        return None
    share = begins.without / begins.rows
    return Symptom(
        "error" if share > MOST_ROWS else "warning",
        confidence(share, FEW, MOST_ROWS),
        f"{of_rows(begins.without, begins.rows, begins.examples)} do not begin with {begins.token}, with "
        "which every prompt begins in use.",
        "The adapter is trained on other ids than it is used with.",
        "Encode the rows as prompts are encoded: with the tokenizer's special tokens, or by its chat "
        "template. Graft does.",
        again(evidence, "begun"),
        {"without_begin": share, "threshold": FEW},
        _plot(begins),
    )


def _begins(evidence: Evidence) -> Begins | None:
    found = None if evidence.data is None else evidence.data.begins
    return found if found is not None and found.rows else None


def _plot(begins: Begins) -> Plot:
    one = begins.rows - begins.doubled - begins.without
    values = {"one begin token": one, "two": begins.doubled, "none": begins.without}
    return bars("How rows begin", "rows", values)


RULE = Rule(
    "D16",
    "Begin tokens doubled or missing",
    check,
    "Texts rendered by a chat template and tokenised once more; thresholds ours",
    is_live=True,
)
