"""D11: prefix and prompt tuning that depend on their luck."""

from __future__ import annotations

from statistics import fmean, stdev

from graftlm.diagnosis.confidence import confidence
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.finding import Finding, Plot
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.symptoms import learning_rate

SPREAD = 0.10
"""Standard deviation of the held-out loss over seeds, as part of the loss. Steady ones of ours: 0 to 7 %."""
METHODS = ("prefix", "prompt")


def check(evidence: Evidence) -> Finding | None:
    """Short trainings from several seeds end apart, or the run itself ended above its base."""
    if evidence.method not in METHODS:
        return None
    return _of_seeds(evidence) or _above_base(evidence)


def _of_seeds(evidence: Evidence) -> Finding | None:
    probe = evidence.behaviour.seeds if evidence.behaviour else None
    if probe is None or len(probe.losses) < 2:
        return None
    spread = stdev(probe.losses) / abs(fmean(probe.losses))
    if spread <= SPREAD:
        return None
    told = ", ".join(f"{loss:.3f}" for loss in probe.losses)
    return _finding(
        evidence,
        confidence(spread, SPREAD, 3 * SPREAD),
        f"After {probe.steps} steps from {len(probe.losses)} seeds the held-out loss is {told}: "
        f"{100 * spread:.0f} % apart.",
        {"spread": spread, "threshold": SPREAD},
        Plot(
            "Held-out loss from several seeds",
            "",
            "loss",
            {"loss": tuple((float(place), loss) for place, loss in enumerate(probe.losses))},
            threshold=fmean(probe.losses),
            kind="bars",
            names=tuple(f"seed {number}" for number in range(1, len(probe.losses) + 1)),
        ),
    )


def _above_base(evidence: Evidence) -> Finding | None:
    """Virtual tokens that leave the model worse than without them."""
    loss = ((evidence.report or {}).get("comparison") or {}).get("loss")
    if not loss or loss["difference"]["low"] <= 0:
        return None
    before, after = loss["before"]["value"], loss["after"]["value"]
    return _finding(
        evidence,
        confidence(after / before, 1.0, 1.5),
        f"The held-out loss ended at {after:.3f}; without the tokens it is {before:.3f}.",
        {"before": before, "after": after},
        Plot(
            "Held-out loss",
            "step",
            "loss",
            {"held out": evidence.series("evaluate", "loss")},
            threshold=before,
        ),
    )


def _finding(evidence: Evidence, sure: float, seen: str, figures: dict[str, float], plot: Plot) -> Finding:
    meaning, fix, setting = _remedy(evidence)
    return Finding(
        rule=RULE.id,
        title=RULE.title,
        severity="warning",
        confidence=sure,
        seen=seen,
        meaning=meaning,
        fix=fix,
        command=f"graft tune RUN/recipe.yaml --set {setting} --out RUN-steady",
        figures=figures,
        plot=plot,
    )


def _remedy(evidence: Evidence) -> tuple[str, str, str]:
    """What it means, what helps, and the setting that does it."""
    method = evidence.recipe.get("method", {})
    random_start = (
        "Virtual tokens that begin as random numbers disturb every row; where they end depends on it."
    )
    if evidence.method == "prefix" and not method.get("prefix_projection"):
        fix = (
            "Let a small network compute the prefix (prefix_projection), or begin with zeros (init_weights)."
        )
        return random_start, fix, "method.prefix_projection=true"
    if evidence.method == "prompt" and method.get("prompt_tuning_init") == "RANDOM":
        fix = "Begin with the embeddings of real tokens, or of a text."
        return random_start, fix, "method.prompt_tuning_init=SAMPLE_VOCAB"
    rate = learning_rate(evidence, 1 / 3)
    meaning = "The steps are too large for tokens that every row reads: each seed is thrown somewhere else."
    return meaning, "A third of the learning rate.", f"train.learning_rate={rate}"


RULE = Rule(
    "D11",
    "Prefix or prompt tuning is unstable",
    check,
    "Li and Liang (arXiv 2101.00190): direct optimisation is unstable, a reparametrisation helps; the spread "
    "over seeds is that of short runs of ours.",
)
