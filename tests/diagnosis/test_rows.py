"""Rules about rows, on facts: thresholds, words, and silence where nobody looked."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.facts.combined import combined
from graftlm.diagnosis.facts.data import Begins, Cuts, DataFacts, Ends, Masks, Overlap, Rendering
from graftlm.diagnosis.finding import Finding
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.rules import begin_token, end_token, leaks, masks, mlp_targets, template, truncation

RECIPE = {"task": {"type": "sft"}, "method": {"type": "lora", "r": 8}}
CLEAN = DataFacts(
    ends=Ends(rows=100, without=0, masked=0, token="</s>", pad_is_end=False),
    begins=Begins(rows=100, doubled=0, without=0, token="<s>", is_expected=True),
    rendering=Rendering("chat", "a" * 64, 100, 0, "", 50, 0, 100, has_own=True, digest_now="a" * 64),
    masks=Masks(rows=100, untrained=0, tokens=9000, trained=3000, prompted=100, compared=50, wrong=0),
    cuts=Cuts(100, 0, 0, 1024, 300, 400, lengths=tuple(range(101))),
    overlap=Overlap(train=100, held_out=30, repeated=0, leaked=0, touched=0),
)
RULES = (
    begin_token.RULE,
    end_token.RULE,
    leaks.RULE,
    masks.RULE,
    mlp_targets.RULE,
    template.RULE,
    truncation.RULE,
)


def found(rule: Rule, group: str, **changes: Any) -> Finding | None:
    facts = replace(CLEAN, **{group: replace(getattr(CLEAN, group), **changes)})
    return rule.check(Evidence(recipe=RECIPE, data=facts))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
@pytest.mark.parametrize("facts", [None, DataFacts(), CLEAN], ids=["no data", "no group", "clean"])
def test_silent(rule: Rule, facts: DataFacts | None) -> None:
    assert rule.check(Evidence(recipe=RECIPE, data=facts)) is None
    assert rule.check(Evidence(data=facts)) is None


@pytest.mark.parametrize(
    ("rule", "group", "at_threshold", "warning", "error"),
    [
        (end_token.RULE, "ends", {"without": 1}, {"without": 2}, {"without": 51}),
        (end_token.RULE, "ends", {"without": 1, "masked": 1}, {"without": 2, "masked": 2},
         {"without": 100, "masked": 100}),
        (begin_token.RULE, "begins", {"doubled": 0}, {"doubled": 1}, {"doubled": 2}),
        (begin_token.RULE, "begins", {"without": 1}, {"without": 2}, {"without": 51}),
        (template.RULE, "rendering", {"refused": 9}, {"refused": 10}, {"refused": 51}),
        (template.RULE, "rendering", {"differing": 0}, {"differing": 1}, {"differing": 6}),
        (masks.RULE, "masks", {"untrained": 5}, {"untrained": 6}, {"untrained": 51}),
        (truncation.RULE, "cuts", {"answers": 5}, {"answers": 6}, {"answers": 21}),
        (leaks.RULE, "overlap", {"leaked": 0}, {"leaked": 1}, {"leaked": 4}),
    ],
)  # fmt: skip
def test_thresholds(
    rule: Rule, group: str, at_threshold: dict[str, int], warning: dict[str, int], error: dict[str, int]
) -> None:
    assert found(rule, group, **at_threshold) is None
    severities = [seen.severity for case in (warning, error) if (seen := found(rule, group, **case))]
    assert severities == ["warning", "error"]


@pytest.mark.parametrize(
    ("rule", "group", "changes", "words", "command"),
    [
        (end_token.RULE, "ends", {"token": "", "without": 100}, "no end token", "RUN-ended"),
        (end_token.RULE, "ends", {"without": 100, "masked": 100, "pad_is_end": True}, "padding token as well",
         "RUN-ended"),
        (begin_token.RULE, "begins", {"doubled": 3, "examples": (4, 7, 9)}, "(rows 4, 7, 9)", "RUN-once"),
        (template.RULE, "rendering", {"digest_now": "b" * 64}, "bbbbbbbbbbbb now", "RUN-retrained"),
        (template.RULE, "rendering", {"refused": 40, "reason": "turns alternate"}, "turns alternate",
         "RUN-corrected"),
        (template.RULE, "rendering", {"name": "plain"}, "100 % of the rows are conversations",
         "--set data.template=chat"),
        (masks.RULE, "masks", {"trained": 9000}, "100 % of the tokens are learnt",
         "--set data.train_on=completion"),
        (masks.RULE, "masks", {"wrong": 2}, "not their answer", "RUN-corrected"),
        (truncation.RULE, "cuts", {"answers": 30, "limit": 64, "wanted": 390}, "lose the end",
         "--set data.max_length=448"),
        (truncation.RULE, "cuts", {"answers": 30, "limit": 64, "wanted": 390, "context": 256}, "lose",
         "--set data.max_length=256"),
        (truncation.RULE, "cuts", {"answers": 30, "limit": 256, "wanted": 390, "context": 256}, "lose",
         "--set data.path=ROWS-SHORTENED"),
        (leaks.RULE, "overlap", {"leaked": 2, "pairs": ("3 = 9", "4 = 1")}, "3 = 9, 4 = 1",
         "recipe.yaml --set data.hold_out=passages --out"),
        (leaks.RULE, "overlap", {"repeated": 6}, "repeat an earlier one", "RUN-once"),
    ],
)  # fmt: skip
def test_what_is_said(rule: Rule, group: str, changes: dict[str, Any], words: str, command: str) -> None:
    seen = found(rule, group, **changes)
    assert seen is not None and words in seen.seen and command in seen.command
    assert seen.command.startswith("graft ") and seen.plot is not None and seen.plot.lines


def test_what_is_no_fault() -> None:
    assert found(masks.RULE, "masks", trained=9000, prompted=10) is None  # texts without prompts
    assert found(begin_token.RULE, "begins", without=100, is_expected=False) is None
    assert found(template.RULE, "rendering", name="plain", has_own=False) is None
    assert found(template.RULE, "rendering", digest_now="") is None  # nobody looked
    assert found(truncation.RULE, "cuts", others=90) is None  # prompts may be shortened


def test_several_symptoms_are_one_finding() -> None:
    seen = found(leaks.RULE, "overlap", leaked=20, repeated=50, pairs=("3 = 9",))
    assert seen is not None and seen.severity == "error"
    assert "held-out rows" in seen.seen and "repeat an earlier one" in seen.seen


def test_a_held_out_file_is_given_up() -> None:
    recipe = {**RECIPE, "data": {"eval_path": "held-out.jsonl"}}
    facts = DataFacts(overlap=Overlap(100, 30, 0, leaked=9, touched=9))
    seen = leaks.RULE.check(Evidence(recipe=recipe, data=facts))
    assert seen is not None and "--set data.eval_path=null --set data.hold_out=passages" in seen.command


def test_a_target_that_is_cut_has_a_length_of_its_own() -> None:
    facts = DataFacts(cuts=Cuts(100, 30, 0, limit=128, percentile_95=300, wanted=400))
    seen = truncation.RULE.check(Evidence(recipe={"task": {"type": "seq2seq"}}, data=facts))
    assert seen is not None and "task.max_target_length" in seen.command


PLAN = {"train_tokens": 100_000, "sites": [{"modules": "self_attn.q_proj", "count": 4}]}
MLP = {"modules": "mlp.up_proj", "count": 4}


@pytest.mark.parametrize(
    ("recipe", "plan", "is_found"),
    [
        (RECIPE, PLAN, True),
        (RECIPE, {**PLAN, "sites": [*PLAN["sites"], MLP]}, False),  # type: ignore[misc]
        (RECIPE, {}, False),
        (RECIPE, {"sites": [{}]}, False),
        ({**RECIPE, "task": {"type": "classification"}}, PLAN, False),
        ({**RECIPE, "method": {"type": "ia3"}}, PLAN, False),
    ],
)
def test_targets(recipe: dict[str, Any], plan: dict[str, Any], is_found: bool) -> None:
    seen = mlp_targets.RULE.check(Evidence(recipe=recipe, plan=plan))
    assert (seen is not None) == is_found
    if seen is not None:
        assert "--set method.target_modules=all-linear --set method.r=4" in seen.command


counts = st.integers(0, 50)


@given(rows=counts, without=counts, masked=counts)
def test_confidence_is_a_probability(rows: int, without: int, masked: int) -> None:
    rows = max(rows, without + masked)
    seen = found(end_token.RULE, "ends", rows=rows, without=without + masked, masked=masked)
    assert seen is None or 0.5 <= seen.confidence <= 0.99


def test_facts_are_kept_as_json() -> None:
    kept = json.loads(json.dumps(CLEAN.as_dict()))
    assert DataFacts.from_dict(kept) == CLEAN
    assert DataFacts.from_dict({**kept, "later": {}, "ends": {**kept["ends"], "later": 1}}) == CLEAN


def test_facts_of_several_tasks_add_up() -> None:
    both = combined([CLEAN, replace(CLEAN, overlap=None, cuts=Cuts(50, 5, 1, 512, 600, 700))])
    assert both.cuts == replace(
        CLEAN.cuts or Cuts(0, 0, 0, 0, 0, 0), rows=150, answers=5, others=1, percentile_95=600, wanted=700
    )
    assert both.overlap == CLEAN.overlap
    assert combined([]) == DataFacts()
