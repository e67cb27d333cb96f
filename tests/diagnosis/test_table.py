"""What holds for every rule, whatever it looks for."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import measured, run, steps, updates

from graftlm.diagnosis.confidence import confidence
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.table import RULES, diagnose

EVENTS = [
    {"kind": "start", "run": "a", "total_steps": 100, "start_step": 0, "trainable": 1000},
    *steps(),
    *measured([2.0, 1.5, 1.6, 1.7]),
    *updates([0.1, 0.5, 1.5, 4.0]),
    {"kind": "skipped", "step": 9, "why": "not finite: loss nan", "rows": [1], "parameters": []},
    {"kind": "checkpoint", "step": 50, "path": "checkpoints/step-000050"},
    {"kind": "end", "step": 100, "seconds": 3.0, "why": "failed", "phase": "backward",
     "error": {"error": "TrainingError", "seen": "Out of memory on cpu: too much", "meaning": "", "fix": ""}},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of nested mappings."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from places(inner, (*path, key))


def test_ids_are_those_of_the_table() -> None:
    assert list(RULES) == [f"D{number:02}" for number in range(1, 31)]
    assert all(rule.id == name and rule.title and rule.source for name, rule in RULES.items())


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.id)
def test_a_rule_that_knows_nothing_says_nothing(rule: Rule) -> None:
    assert rule.check(Evidence()) is None
    assert rule.check(Evidence(is_over=True)) is None


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_rule_fails_on_a_log_or_a_recipe_that_it_does_not_know(data: st.DataObject) -> None:
    """Of another version, edited by hand, or cut short: a rule that raised would end a training run."""
    whole = run(EVENTS, is_over=data.draw(st.booleans()))
    recipe, plan = copy.deepcopy(dict(whole.recipe)), copy.deepcopy(dict(whole.plan))
    for mapping in (recipe, plan):
        for path in data.draw(st.lists(st.sampled_from(sorted(places(mapping))), max_size=4)):
            inner = mapping
            for key in path[:-1]:
                inner = inner.get(key, {}) if isinstance(inner, dict) else {}
            if isinstance(inner, dict) and path[-1] in inner:
                if data.draw(st.booleans()):
                    del inner[path[-1]]
                else:
                    inner[path[-1]] = None
    kept = data.draw(st.lists(st.sampled_from(range(len(EVENTS))), unique=True))
    events = [whole.events[place] for place in sorted(kept)]
    found = diagnose(replace(whole, recipe=recipe, plan=plan, events=events))
    for finding in found:
        assert 0 <= finding.confidence <= 1
        assert finding.seen and finding.meaning and finding.fix
        assert finding.as_dict()["rule"] in RULES


def test_the_worst_comes_first() -> None:
    found = diagnose(run(EVENTS))
    ranks = [("error", "warning", "note").index(finding.severity) for finding in found]
    assert ranks == sorted(ranks) and len(found) > 2


def test_the_same_evidence_gives_the_same_findings() -> None:
    assert diagnose(run(EVENTS)) == diagnose(run(copy.deepcopy(EVENTS)))


def test_commands_name_the_run_and_a_new_folder() -> None:
    for finding in diagnose(run(EVENTS)):
        if finding.command.startswith("graft tune"):
            assert re.search(r"\bRUN/recipe\.yaml\b", finding.command)
            assert re.search(r"--out RUN-\w+$", finding.command)


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_confidence_grows_from_the_threshold_on(value: float, threshold: float, certain: float) -> None:
    assert 0.5 <= confidence(value, threshold, certain) <= 0.99
    assert confidence(certain, threshold, certain) == 0.99
