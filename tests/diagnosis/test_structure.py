"""Rules about files, bases and loops, on facts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.facts.structure import BaseShape, FileFacts, LoopState, StructureFacts
from graftlm.diagnosis.finding import Finding
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.rules import (
    evaluation_mode,
    missing_head,
    mlp_targets,
    optimizer_weights,
    saved_head,
    tied_embeddings,
    untrained_adapter,
)

FILES = FileFacts(
    attention=4, feed_forward=4, adapted_ends=(), copied={}, copied_ends=(), ends_are_equal=True,
    adapter_bytes=1_000_000, rows=0, outputs=8, still=0,
)  # fmt: skip
TIED = BaseShape(ties=True, vocabulary=32_000, has_head=False)
LOOP = LoopState(16, unknown=0, stale=0, active=("default",), optimised=("default",), dropouts=0)
CLEAN = StructureFacts(type="LORA", files=FILES, base=TIED, loop=LOOP)
RULES = (
    evaluation_mode.RULE, missing_head.RULE, mlp_targets.RULE, optimizer_weights.RULE, saved_head.RULE,
    tied_embeddings.RULE, untrained_adapter.RULE,
)  # fmt: skip


def asked(rule: Rule, **changes: Any) -> Finding | None:
    """Of a clean adapter with some facts changed: of its files, its loop, or the whole."""
    inner = {
        "files": {key: value for key, value in changes.items() if hasattr(FILES, key)},
        "loop": {key: value for key, value in changes.items() if hasattr(LOOP, key)},
    }
    rest = {
        key: value for key, value in changes.items() if not hasattr(FILES, key) and not hasattr(LOOP, key)
    }
    facts = replace(CLEAN, files=replace(FILES, **inner["files"]), loop=replace(LOOP, **inner["loop"]))
    return rule.check(Evidence(structure=replace(facts, **rest)))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
@pytest.mark.parametrize("facts", [None, StructureFacts(), CLEAN], ids=["none", "unknown", "clean"])
def test_silent(rule: Rule, facts: StructureFacts | None) -> None:
    assert rule.check(Evidence(structure=facts)) is None


COPIED = {"copied": {"lm_head": 9_000_000}, "copied_ends": ("lm_head",), "rows": 32_000}


@pytest.mark.parametrize("rule", [saved_head.RULE, tied_embeddings.RULE], ids=lambda rule: rule.id)
def test_who_trains_all_weights_saves_them_all(rule: Rule) -> None:
    structure = replace(CLEAN, files=replace(FILES, **COPIED))
    assert rule.check(Evidence(structure=structure)) is not None
    assert rule.check(Evidence({"method": {"type": "full"}}, structure=structure)) is None


@pytest.mark.parametrize(
    ("rule", "changes", "words"),
    [
        (mlp_targets.RULE, {"feed_forward": 0}, "4 layers of attention"),
        (tied_embeddings.RULE, COPIED, "a copy of lm_head"),
        (tied_embeddings.RULE, {"adapted_ends": ("lm_head",)}, "changes lm_head"),
        (tied_embeddings.RULE, {"split_tie": True}, "two that differ"),
        (saved_head.RULE, COPIED, "9.0 MB: 10 times"),
        (missing_head.RULE, {"labels": "SEQ_CLS"}, "no head"),
        (untrained_adapter.RULE, {"still": 8, "siblings": {"other": 1.0}}, "other was trained"),
        (untrained_adapter.RULE, {"active": ("a",), "optimised": ("b",)}, "Active: a. In the optimizer: b."),
        (optimizer_weights.RULE, {"still": 8, "logged_steps": 30}, "after 30 steps"),
        (optimizer_weights.RULE, {"unknown": 16, "stale": 4, "examples": ("x",)}, "It holds 4"),
        (evaluation_mode.RULE, {"dropouts": 3, "repeat_difference": 0.5}, "differ by 0.5"),
        (evaluation_mode.RULE, {"irregular": ("merged_adapters",)}, "what is merged"),
    ],
)
def test_found(rule: Rule, changes: dict[str, Any], words: str) -> None:
    seen = asked(rule, **changes)
    assert seen is not None and words in seen.seen
    assert seen.meaning and seen.fix and seen.plot is not None


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        (mlp_targets.RULE, {"feed_forward": 0, "labels": "SEQ_CLS"}),
        (mlp_targets.RULE, {"feed_forward": 0, "type": "IA3"}),
        (tied_embeddings.RULE, {**COPIED, "base": replace(TIED, ties=False)}),
        (tied_embeddings.RULE, {**COPIED, "base": None}),
        (tied_embeddings.RULE, {**COPIED, "ensures_tying": True}),
        (tied_embeddings.RULE, {**COPIED, "copied_ends": ("embed_tokens", "lm_head")}),
        (saved_head.RULE, {**COPIED, "rows": 32_064}),  # new tokens
        (saved_head.RULE, {**COPIED, "labels": "SEQ_CLS"}),
        (saved_head.RULE, {**COPIED, "copied": {"lm_head": 2_000_000}}),
        (missing_head.RULE, {"labels": "SEQ_CLS", "head_saved": True}),
        (missing_head.RULE, {"labels": "SEQ_CLS", "base": replace(TIED, has_head=True)}),
        (untrained_adapter.RULE, {"still": 8}),  # D29
        (untrained_adapter.RULE, {"siblings": {"other": 1.0}}),
        (optimizer_weights.RULE, {"still": 7}),  # D12
        (optimizer_weights.RULE, {"still": 8, "siblings": {"other": 1.0}}),  # D23
        (optimizer_weights.RULE, {"still": 8, "logged_steps": 0}),
    ],
)
def test_not_found(rule: Rule, changes: dict[str, Any]) -> None:
    assert asked(rule, **changes) is None


def test_what_is_guessed_is_less_sure() -> None:
    known = asked(missing_head.RULE, labels="SEQ_CLS")
    guessed = asked(missing_head.RULE, labels="SEQ_CLS", base=None)
    assert known is not None and guessed is not None and guessed.confidence < known.confidence
