"""D03: only attention is adapted; what lies in the feed-forward layers stays as it was.

At an equal number of parameters adapters of attention alone learn less than adapters of all layers, and most
of the difference lies in the feed-forward part ("LoRA Without Regret", 2025; arXiv 2405.09673, section 4).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from graftlm.diagnosis.confidence import confidence
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.finding import Finding
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.shown import again, bars

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
WRITING = ("sft", "seq2seq", "dpo", "ipo", "simpo", "orpo", "kto")
"""Tasks that change what is written. A class can be told, and a reward raised, by attention alone."""
LITTLE, MUCH = 1_000, 1_000_000
"""Tokens to learn: the more there are, the surer is it that they need the room."""


def check(evidence: Evidence) -> Finding | None:
    """Of LoRA and its kin, on tasks that write."""
    counts = _counts(evidence)
    if counts is None or not counts[0] or counts[1]:
        return None
    tokens = float(evidence.plan.get("train_tokens", LITTLE))
    rank = evidence.recipe.get("method", {}).get("r")
    settings: dict[str, object] = {"method__target_modules": "all-linear"}
    if isinstance(rank, int):
        settings["method__r"] = max(1, rank // 2)
    return Finding(
        RULE.id,
        RULE.title,
        "warning",
        confidence(tokens, LITTLE, MUCH),
        f"The adapter changes {counts[0]:,} layers of attention and none of the feed-forward layers.",
        "Styles and facts are stored in the feed-forward layers for the most part: at the same number of "
        "parameters such an adapter learns less.",
        "Adapt all linear layers; half the rank keeps the number of parameters about the same.",
        again(evidence, "all-linear", **settings),
        {"attention_layers": counts[0], "feed_forward_layers": counts[1]},
        bars("Adapted layers", "layers", {"attention": counts[0], "feed-forward": counts[1]}),
    )


def _counts(evidence: Evidence) -> tuple[int, int] | None:
    """Adapted layers inside and outside of attention; None where that says nothing."""
    found = evidence.structure
    if evidence.recipe:
        if evidence.method not in ("lora", "qlora", "dora") or evidence.task not in WRITING:
            return None
        sites = [(str(site.get("modules", "")), int(site.get("count", 0))) for site in _sites(evidence)]
        inside = sum(count for name, count in sites if ATTENTION.search(name))
        return inside, sum(count for _, count in sites) - inside
    if found is None or found.files is None or found.type != "LORA" or found.labels:
        return None
    return found.files.attention, found.files.feed_forward


def _sites(evidence: Evidence) -> Sequence[Mapping[str, Any]]:
    """Groups of adapted modules, by the plan; a run of several tasks has none of its own."""
    found: Sequence[Mapping[str, Any]] = evidence.plan.get("sites", ())
    return found


RULE = Rule(
    "D03",
    "Feed-forward layers are not adapted",
    check,
    "LoRA Without Regret (2025); LoRA Learns Less and Forgets Less (arXiv 2405.09673)",
    is_live=True,
)
