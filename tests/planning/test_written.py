"""What was written of a recipe comes back as it was; what a plan sets is as if somebody had written it."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from graftlm.core.errors import ConfigError
from graftlm.planning.durations import parse_seconds
from graftlm.planning.requirements import Requirements
from graftlm.planning.written import changed, is_written, recipe_text, written
from graftlm.training.recipe import Recipe, make_recipe

CASES: list[dict[str, Any]] = [
    {"model": {"name": "sprout"}, "data": {"path": "rows.jsonl"}},
    {"model": {"name": "m", "quantization": "nf4"}, "data": {"path": "d", "max_length": 64}},
    {"model": {"name": "m"}, "data": {"path": "d"}, "method": {"type": "lora", "r": 4}},
    {"model": {"name": "m"}, "data": {"path": "d"}, "method": {"type": "prefix", "num_virtual_tokens": 5}},
    {"model": {"name": "m"}, "data": {"path": "d"}, "task": {"type": "dpo", "beta": 0.2}},
    {"model": {"name": "m"}, "data": {"path": "d"}, "train": {"learning_rate": 1e-4, "seed": 3}},
]


@pytest.mark.parametrize("sections", CASES, ids=lambda case: ",".join(case))
def test_a_recipe_of_what_was_written_is_the_same_recipe(sections: dict[str, Any]) -> None:
    recipe = make_recipe(sections)
    again = make_recipe(yaml.safe_load(recipe_text(recipe)))
    assert again == recipe and again.model_fields_set == recipe.model_fields_set
    assert again.train.model_fields_set == recipe.train.model_fields_set


def test_short_and_long_forms_say_the_same() -> None:
    assert written(make_recipe({"model": "m", "data": "d", "method": "lora"})) == {
        "model": {"name": "m"}, "data": {"path": "d"}, "method": {"type": "lora"}
    }  # fmt: skip


def test_qlora_says_how_its_base_is_stored() -> None:
    recipe = make_recipe({"model": "m", "data": "d", "method": "qlora"})
    assert is_written(recipe, "model.quantization") and is_written(recipe, "method")


def test_a_change_leaves_everything_else_and_is_checked() -> None:
    recipe = make_recipe({"model": "m", "data": "d", "train": {"seed": 3}, "method": {"type": "ia3"}})
    new = changed(recipe, {"train": {"max_steps": 9}, "method": {"type": "lora", "r": 2}})
    assert (new.train.seed, new.train.max_steps, new.method.summary) == (3, 9, "lora r=2 alpha=32")
    assert "num_train_epochs" not in new.train.model_fields_set
    with pytest.raises(ConfigError, match="1 problem"):
        changed(recipe, {"train": {"max_steps": -1}})
    assert isinstance(new, Recipe)


@pytest.mark.parametrize("wrong", ["", "soon", "2", "2 weeks", "-3h", "0m", "h", "3 h soon", 0, -1.0])
def test_spans_of_time_that_are_none(wrong: str | float) -> None:
    with pytest.raises(ConfigError, match="no span of time"):
        parse_seconds(wrong)


def test_requirements_list_every_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        Requirements(deadline_seconds=0, budget=-1, tasks=0)
    assert len(caught.value.problems) == 3
