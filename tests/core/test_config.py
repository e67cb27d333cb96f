from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from graftlm.core.config import Config, build, dump_yaml, override, read_yaml, suggest
from graftlm.core.errors import ConfigError


class Train(Config):
    learning_rate: float = 1e-4
    steps: int = 10
    schedule: Literal["cosine", "linear"] = "cosine"


class Recipe(Config):
    model: str
    train: Train = Train()


def problems(mapping: dict[str, object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build(Recipe, mapping, source="recipe.yaml")
    assert caught.value.seen.startswith("recipe.yaml has ")
    assert caught.value.exit_code == 2
    return list(caught.value.problems)


def test_every_problem_at_once_with_its_place() -> None:
    found = problems({"train": {"learning_rat": 1, "steps": "many", "schedule": "sine"}, "modle": "x"})
    assert len(found) == 5
    text = "\n".join(found)
    assert "train.learning_rat: unknown key; did you mean 'learning_rate'?" in text
    assert "modle: unknown key; did you mean 'model'?" in text
    assert "train.steps" in text and "'many'" in text
    assert "train.schedule" in text and "'sine'" in text
    assert "model: Field required" in text


def test_a_key_that_resembles_nothing_gets_no_suggestion() -> None:
    assert problems({"model": "x", "zorp": 1}) == ["zorp: unknown key"]


def test_constructors_refuse_in_the_same_words() -> None:
    with pytest.raises(ConfigError, match="Train has 1 problem"):
        Train(step=1)  # type: ignore[call-arg]


def test_configs_are_frozen() -> None:
    config = Train()
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 3  # type: ignore[misc]


def test_replace_validates_again() -> None:
    assert Train().replace(steps=3) == Train(steps=3)
    with pytest.raises(ConfigError, match="steps"):
        Train().replace(steps="many")


def test_round_trip_through_yaml() -> None:
    recipe = Recipe(model="sprout", train=Train(learning_rate=3e-5))
    assert build(Recipe, yaml.safe_load(dump_yaml(recipe)), source="again") == recipe


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.text(min_size=1))
def test_any_value_survives_yaml(rate: float, steps: int, name: str) -> None:
    recipe = Recipe(model=name, train=Train(learning_rate=rate, steps=steps))
    assert build(Recipe, yaml.safe_load(dump_yaml(recipe)), source="again") == recipe


@pytest.mark.parametrize(
    ("text", "seen"),
    [("a: [1", "is not valid YAML"), ("- 1\n- 2\n", "holds list"), ("", "holds NoneType")],
)
def test_read_yaml_refuses(text: str, seen: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=seen):
        read_yaml(path)
    with pytest.raises(ConfigError, match="No file"):
        read_yaml(tmp_path / "nowhere.yaml")


def test_yaml_never_builds_objects(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("a: !!python/object/apply:os.getcwd []")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(path)


def test_overrides_nest_and_leave_the_original_alone() -> None:
    before = {"train": {"steps": 1}}
    after = override(before, ["train.steps=2", "train.learning_rate=1e-4", "model=x", "eval.metrics=[a, b]"])
    assert after == {
        "train": {"steps": 2, "learning_rate": 1e-4},
        "model": "x",
        "eval": {"metrics": ["a", "b"]},
    }
    assert before == {"train": {"steps": 1}}


def test_a_value_that_is_not_yaml_is_named() -> None:
    with pytest.raises(ConfigError, match=r"eval.metrics=\[loss"):
        override({}, ["eval.metrics=[loss"])


@pytest.mark.parametrize("text", ["train.steps", "=3", "train..steps=3", ".=1"])
def test_overrides_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ConfigError, match="Cannot read the override"):
        override({}, [text])


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("1e-4", 1e-4), ("true", True), ("null", None), ("sprout", "sprout"), ("'1'", 1.0)],
)
def test_values_of_overrides(text: str, value: object) -> None:
    assert override({}, [f"a={text}"]) == {"a": value}


def test_suggest() -> None:
    assert suggest("lora_alfa", ["r", "lora_alpha"]) == "; did you mean 'lora_alpha'?"
    assert suggest("zorp", ["r", "lora_alpha"]) == ""
