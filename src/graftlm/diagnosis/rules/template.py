"""D17: conversations that are rendered otherwise than in use, or not at all."""

from __future__ import annotations

from graftlm.diagnosis.confidence import MOST, confidence
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.facts.data import Rendering
from graftlm.diagnosis.finding import Finding, Plot
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.shown import again, bars, of_rows, percent
from graftlm.diagnosis.symptoms import Symptom, finding_of

REFUSED, MANY = 0.10, 0.5
DIFFERING = 0.01


def check(evidence: Evidence) -> Finding | None:
    """All the ways in which training and use can see other texts."""
    return finding_of(RULE.id, RULE.title, (_changed, _refused, _differing, _forced), evidence)


def _changed(evidence: Evidence) -> Symptom | None:
    found = _rendering(evidence)
    if found is None or found.digest_now in ("", found.digest):
        return None
    return Symptom(
        "error",
        MOST,
        f"The base renders conversations by the template {found.digest_now[:12]} now; the adapter was "
        f"trained with {found.digest[:12]}.",
        "The tokenizer of the base was changed since: prompts look otherwise than all that was learnt.",
        "Put the tokenizer back as it was, or train again with the one that is served.",
        again(evidence, "retrained"),
        {"is_other_template": 1.0},
        bars("Template", "is the same", {"in training": 1.0, "now": 0.0}),
    )


def _refused(evidence: Evidence) -> Symptom | None:
    found = _rendering(evidence)
    if found is None or found.refused < REFUSED * found.rows:
        return None
    share = found.refused / found.rows
    return Symptom(
        "error" if share > MANY else "warning",
        confidence(share, REFUSED, MANY),
        f"The chat template could not render {of_rows(found.refused, found.rows, found.examples)}: "
        f"{found.reason}.",
        "They were left out of the training: roles that the template does not know, or turns in an order "
        "that it does not take.",
        "Correct the turns of these rows; graft check lists them all.",
        again(evidence, "corrected", data__path="ROWS-CORRECTED"),
        {"refused": share, "threshold": REFUSED},
        _plot(found),
    )


def _differing(evidence: Evidence) -> Symptom | None:
    found = _rendering(evidence)
    if found is None or found.differing <= DIFFERING * found.compared:
        return None
    share = found.differing / found.compared
    return Symptom(
        "error" if share > REFUSED else "warning",
        confidence(share, DIFFERING, REFUSED),
        f"{of_rows(found.differing, found.compared, found.examples)} that were compared do not begin with "
        "the ids of the prompt as it is asked in use.",
        "The template renders a question otherwise when its answer is known, or a token joins both.",
        "Correct the chat template, or end prompts with a line break.",
        again(evidence, "corrected", model__name="BASE-CORRECTED"),
        {"differing": share, "threshold": DIFFERING},
        _plot(found),
    )


def _forced(evidence: Evidence) -> Symptom | None:
    """The plain form by force, of a base that has a template, for rows that are conversations."""
    found = _rendering(evidence)
    if found is None or found.name != "plain" or not found.has_own or not found.conversations:
        return None
    share = found.conversations / found.rows
    return Symptom(
        "warning",
        confidence(share, 0.0, 1.0),
        f"{percent(share)} of the rows are conversations, and they were rendered plainly, although the "
        "tokenizer has a chat template.",
        "Whoever serves the adapter sends conversations through that template: prompts look otherwise than "
        "all that was learnt.",
        "Train with the template of the tokenizer.",
        again(evidence, "chat", data__template="chat"),
        {"plain_conversations": share},
        _plot(found),
    )


def _rendering(evidence: Evidence) -> Rendering | None:
    found = None if evidence.data is None else evidence.data.rendering
    return found if found is not None and found.rows else None


def _plot(found: Rendering) -> Plot:
    values = {
        "refused": found.refused / found.rows,
        "other prompt in use": found.differing / max(1, found.compared),
        "conversations": found.conversations / found.rows,
    }
    return bars("What the template made of the rows", "share of rows", values, REFUSED)


RULE = Rule(
    "D17",
    "Chat template wrong or absent",
    check,
    "Adapters are bound to the template that they were trained with; thresholds ours",
    is_live=True,
)
