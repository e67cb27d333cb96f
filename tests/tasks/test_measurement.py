"""What is measured before and after: on which text, how much of it, and kept whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graftlm.core.errors import DataError
from graftlm.data.encode import Encoded
from graftlm.evaluation.runner import evaluate
from graftlm.models.load import load_model
from graftlm.tasks.measurement import (
    MOST_ANSWERS,
    Measurement,
    answers_wanted,
    known_from_base,
    known_from_file,
    measure_known,
)
from graftlm.tasks.sft import HeldOutLoss
from graftlm.training.recipe import Recipe, make_recipe

KNOWN = Path(__file__).parents[1] / "verbs/known.txt"
ROWS = [
    Encoded((5, 6, 7, 8, 9 + row), (-100, -100, 7, 8, 9 + row), row, truncated=False) for row in range(40)
]


def recipe(*overrides: str) -> Recipe:
    return make_recipe({"model": {"name": "sprout"}, "data": {"path": "rows.jsonl"}}, overrides)


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    return load_model("sprout", dtype="float32")


def test_text_from_a_file(base: tuple[Any, Any], tmp_path: Path) -> None:
    found = known_from_file(recipe(f"eval.known_path={KNOWN}"), base[1])
    assert found is not None
    assert found.source == "known.txt"
    assert len(found.rows) >= 1
    embedded = known_from_file(recipe(), base[1])
    assert embedded is not None and len(embedded.rows) >= 100
    assert known_from_file(make_recipe({"model": "other", "data": "x"}), base[1]) is None
    (tmp_path / "none.jsonl").write_text('{"text": null}\n')
    with pytest.raises(DataError, match="no column 'text'"):
        known_from_file(recipe(f"eval.known_path={tmp_path / 'none.jsonl'}"), base[1])


def test_text_that_the_base_writes_is_whole_or_not_there(base: tuple[Any, Any], tmp_path: Path) -> None:
    cache = tmp_path / "known-rows.json"
    polls: list[int] = []

    def stop() -> bool:
        polls.append(1)
        if len(polls) == 2:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        known_from_base(recipe(), *base, ROWS, cache, stop)
    assert not cache.exists()
    written = known_from_base(recipe(), *base, ROWS, cache, lambda: False)
    read = known_from_base(recipe(), *base, ROWS, cache, lambda: False)
    assert read == written
    assert len(written.rows) == 64
    assert len(json.loads(cache.read_text())) == 64


def test_kept_and_read_back(base: tuple[Any, Any], tmp_path: Path) -> None:
    known = known_from_file(recipe(f"eval.known_path={KNOWN}"), base[1])
    assert known is not None
    held_out = evaluate(*base, ROWS[:4], name="base", most_answers=0)
    on_known = measure_known(*base, known, name="base", stop=lambda: False)
    found = Measurement(held_out, on_known)
    assert held_out.complete and on_known.complete
    found.save(tmp_path)
    assert Measurement.load(tmp_path, "base", with_known=True) == found
    (tmp_path / "base-known.json").unlink()
    assert Measurement.load(tmp_path, "base", with_known=True) is None, "half a measurement is none"


def test_how_many_answers() -> None:
    long = [Encoded(tuple(range(90)), (-100, *range(1, 90)), 1, truncated=False)]
    assert answers_wanted(recipe(), ROWS) == MOST_ANSWERS
    assert answers_wanted(recipe(), long) == 0
    assert answers_wanted(recipe("eval.metrics=[exact_match]"), long) is None
    assert answers_wanted(recipe("eval.metrics=[loss]"), ROWS) == 0


def test_the_loss_while_training(base: tuple[Any, Any]) -> None:
    loss = HeldOutLoss(base[0], ROWS)
    found = loss(lambda: False)
    assert found is not None
    assert (found.rows, found.tokens) == (40, 120)
    assert loss(lambda: True) is None
