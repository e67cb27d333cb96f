"""D18: labels that are all masked, or not masked at all, or at the wrong place."""

from __future__ import annotations

from graftlm.diagnosis.confidence import confidence
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.facts.data import Masks
from graftlm.diagnosis.finding import Finding, Plot
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.shown import again, bars, of_rows, percent
from graftlm.diagnosis.symptoms import Symptom, finding_of

NEARLY_ALL = 0.95
"""Share of the tokens with a loss from which on prompts are among them."""
PROMPTED = 0.5
"""Share of the rows that must have a prompt for that to say anything."""
EMPTY, USELESS = 0.05, 0.5
WRONG = 0.01


def check(evidence: Evidence) -> Finding | None:
    """A loss curve looks normal in each of these cases."""
    return finding_of(RULE.id, RULE.title, (_nothing, _everything, _elsewhere), evidence)


def _nothing(evidence: Evidence) -> Symptom | None:
    masks = _masks(evidence)
    if masks is None or masks.untrained <= EMPTY * masks.rows:
        return None
    share = masks.untrained / masks.rows
    return Symptom(
        "error" if share > USELESS else "warning",
        confidence(share, EMPTY, USELESS),
        f"Nothing is learnt from {of_rows(masks.untrained, masks.rows, masks.examples)}: every label is "
        "masked.",
        "The mark before the answers was not found, as its tokens are others inside of a text, or the chat "
        "template does not say where answers are.",
        "Mask by what is rendered before each answer, not by a mark. Graft finds every answer in the text, "
        "or refuses the row.",
        again(evidence, "masked"),
        {"untrained_rows": share, "threshold": EMPTY},
        _plot(masks),
    )


def _everything(evidence: Evidence) -> Symptom | None:
    masks = _masks(evidence)
    if masks is None or masks.prompted < PROMPTED * masks.rows or masks.trained <= NEARLY_ALL * masks.tokens:
        return None
    share = masks.trained / masks.tokens
    return Symptom(
        "warning",
        confidence(masks.prompted / masks.rows, PROMPTED, 1.0),
        f"{percent(share)} of the tokens are learnt, prompts and all, although "
        f"{of_rows(masks.prompted, masks.rows)} have a prompt.",
        "The adapter learns to write questions as well as answers, and where prompts are long that is most "
        "of what it learns.",
        "Learn the answers only.",
        again(evidence, "answers", data__train_on="completion"),
        {"trained_share": share, "threshold": NEARLY_ALL},
        _plot(masks),
    )


def _elsewhere(evidence: Evidence) -> Symptom | None:
    masks = _masks(evidence)
    if masks is None or masks.wrong <= WRONG * masks.compared:
        return None
    share = masks.wrong / masks.compared
    return Symptom(
        "error",
        confidence(share, WRONG, USELESS),
        f"What is learnt from {of_rows(masks.wrong, masks.compared, masks.examples)} that were compared is "
        "not their answer.",
        "The labels lie at the wrong place: the template rewrites answers, or they were counted in another "
        "rendering.",
        "See what is trained on with graft check, and correct the chat template.",
        again(evidence, "corrected", model__name="BASE-CORRECTED"),
        {"wrong_spans": share, "threshold": WRONG},
        _plot(masks),
    )


def _masks(evidence: Evidence) -> Masks | None:
    found = None if evidence.data is None else evidence.data.masks
    return found if found is not None and found.rows else None


def _plot(masks: Masks) -> Plot:
    values = {
        "tokens learnt": masks.trained / max(1, masks.tokens),
        "rows without a label": masks.untrained / masks.rows,
        "answers elsewhere": masks.wrong / max(1, masks.compared),
    }
    return bars("What of the rows is learnt", "share", values)


RULE = Rule(
    "D18",
    "Labels masked wrongly",
    check,
    "Trained on zero tokens with a normal loss curve, as seen with other trainers; thresholds ours",
    is_live=True,
)
