"""D09: an adapter that belongs to another base or another task, or that changes nothing."""

from __future__ import annotations

from shlex import quote

from graftlm.diagnosis.confidence import confidence
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.facts.behaviour import Change, Fit
from graftlm.diagnosis.finding import Finding, Plot, Severity
from graftlm.diagnosis.rule import Rule

INERT = 1e-4
"""Mean change of a logit below which an adapter does nothing."""
HARM = 0.05
"""Growth of the loss on the task's own rows, as part of itself, from which an adapter is another task's."""


def check(evidence: Evidence) -> Finding | None:
    """Wrong base first: of an adapter that does not fit, nothing else can be said."""
    facts = evidence.behaviour
    if facts is None:
        return None
    return _misfit(facts.fit) or _inert(evidence) or _other_task(evidence)


def _misfit(fit: Fit | None) -> Finding | None:
    if fit is None or not (fit.problems or fit.other_base):
        return None
    lost = len(fit.problems)
    if fit.other_base and fit.other_base == fit.base:
        seen = f"The adapter was trained on other weights than {fit.base} has today."
    elif fit.other_base:
        seen = f"The adapter was trained on another base: {fit.other_base}."
    else:
        shown = "; ".join(fit.problems[:3]) + (f"; and {lost - 3} more" if lost > 3 else "")
        seen = f"{lost} of {lost + fit.applied} tensors do not fit this base: {shown}."
    return _finding(
        "error",
        1.0,
        seen,
        "What does not fit is not applied: other tools leave it out without a word, and the model answers "
        "as its base, or half adapted.",
        "Load it on the base that it was trained on, in the version of that day; where only names differ, "
        "rename the tensors as that base has them.",
        f"graft diagnose RUN --deep --base {quote(fit.other_base)}"
        if fit.other_base not in ("", fit.base)
        else "",
        {"misfits": float(lost), "applied": float(fit.applied)},
        _bars("Tensors of the adapter", "tensors", {"applied": fit.applied, "do not fit": lost}, None),
    )


def _inert(evidence: Evidence) -> Finding | None:
    effect = evidence.behaviour.effect if evidence.behaviour else None
    if effect is None or effect.mean_logit_change >= INERT:
        return None
    return _finding(
        "error",
        confidence(effect.mean_logit_change, INERT, 0.0),
        f"With the adapter a logit changes by {effect.mean_logit_change:.1g} on average, over "
        f"{effect.tokens:,} tokens: the adapter does nothing.",
        "It was saved before its first step, its tensors went to places that nothing reads, or it was "
        "trained with a learning rate that moves nothing.",
        "Train it, with the usual learning rate.",
        _anew(evidence, str(evidence.recipe.get("data", {}).get("path", "DATA"))),
        {"mean_logit_change": effect.mean_logit_change, "mean_kl": effect.mean_kl, "threshold": INERT},
        _bars("Mean change of a logit", "change", {"adapter": effect.mean_logit_change}, INERT),
    )


def _other_task(evidence: Evidence) -> Finding | None:
    facts = evidence.behaviour
    loss = facts.task_loss if facts else None
    if facts is None or loss is None or loss.before <= 0 or loss.low <= HARM * loss.before:
        return None
    return _finding(
        "error",
        confidence(loss.difference / loss.before, HARM, 3 * HARM),
        f"On {loss.items:,} rows of this task the adapter's loss is {loss.after:.3f}, the base's alone "
        f"{loss.before:.3f}.",
        "An adapter that makes its task worse was trained for another one, or on rows that were encoded in "
        "another way: another template, another tokenizer.",
        "Train an adapter of its own for these data.",
        _anew(evidence, facts.task_data),
        {
            "before": loss.before,
            "after": loss.after,
            "harm": loss.difference / loss.before,
            "threshold": HARM,
        },
        _losses(loss),
    )


def _anew(evidence: Evidence, data: str) -> str:
    """A run of its own, with the settings that Graft finds by itself."""
    model = evidence.recipe.get("model", {}).get("name", "MODEL")
    method, task = evidence.method or "lora", evidence.task or "sft"
    return (
        f"graft tune {quote(data)} --model {quote(str(model))} --method {method} --task {task} --out RUN-anew"
    )


def _losses(loss: Change) -> Plot:
    return _bars(
        "Loss on the rows of this task",
        "nats per token",
        {"base": loss.before, "adapter": loss.after},
        (1 + HARM) * loss.before,
    )


def _bars(title: str, y: str, bars: dict[str, float], threshold: float | None) -> Plot:
    points = tuple((float(place), float(value)) for place, value in enumerate(bars.values()))
    return Plot(title, "", y, {y: points}, threshold=threshold, kind="bars", names=tuple(bars))


def _finding(
    severity: Severity,
    sure: float,
    seen: str,
    meaning: str,
    fix: str,
    command: str,
    figures: dict[str, float],
    plot: Plot,
) -> Finding:
    return Finding(RULE.id, RULE.title, severity, sure, seen, meaning, fix, command, figures, plot)


RULE = Rule(
    "D09",
    "Wrong, inert or shared adapter",
    check,
    "Adapters that loaders ignored because of a stray segment in their keys (vLLM 34186, 48019); thresholds "
    "from our own runs: trained adapters change a logit by 0.05 and more.",
)
