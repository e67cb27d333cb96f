"""Spaces as people write them: values, ranges, conditions, sections, and every fault at once."""

from __future__ import annotations

import math
from typing import Any

import pytest

from graftlm.core.errors import ConfigError
from graftlm.search.space import Range, Space, Values

RATE = {"low": "1e-4", "high": 1e-2, "log": True}
BY_METHOD: dict[str, Any] = {
    "method.type": ["lora", "ia3"],
    "when": {
        "method.type=lora": {"method.r": [4, 8, 16], "train.learning_rate": [1e-4, 1e-3]},
        "method.type=ia3": {"train.learning_rate": [1e-2]},
    },
}


def test_lists_and_ranges_are_read_and_yaml_numbers_are_numbers() -> None:
    space = Space.parse(
        {"method.r": [4, 8], "train.learning_rate": RATE, "train.warmup_ratio": ["5e-2", 0.1]}
    )
    domains = {one.field: one.domain for one in space.parameters}
    assert domains == {
        "method.r": Values((4, 8)),
        "train.learning_rate": Range(1e-4, 1e-2, log=True),
        "train.warmup_ratio": Values((0.05, 0.1)),
    }


def test_a_section_may_be_written_as_one() -> None:
    nested = Space.parse({"train": {"learning_rate": RATE}, "method": {"r": [4, 8]}})
    flat = Space.parse({"train.learning_rate": RATE, "method.r": [4, 8]})
    assert nested == flat


@pytest.mark.parametrize(
    ("content", "size"),
    [
        ({"method.r": [4, 8, 4]}, 2),
        ({"method.r": {"low": 1, "high": 4}}, 4),
        ({"method.lora_dropout": {"low": 0.0, "high": 0.3, "step": 0.1}}, 4),
        ({"train.learning_rate": RATE}, math.inf),
        (BY_METHOD, 7),
        ({**BY_METHOD, "train.weight_decay": [0.0, 0.1]}, 14),
    ],
)
def test_the_size_is_the_number_of_points(content: dict[str, Any], size: float) -> None:
    space = Space.parse(content)
    assert space.size == size
    if math.isfinite(size):
        assert len(list(space.points())) == size


def test_a_condition_decides_which_fields_a_point_has() -> None:
    space = Space.parse(BY_METHOD)
    fields = [space.fields(point) for point in space.points()]
    assert all(("method.r" in one) == (one["method.type"] == "lora") for one in fields)
    assert [one for one in fields if one["method.type"] == "ia3"] == [
        {"method.type": "ia3", "train.learning_rate": 1e-2}
    ]


@pytest.mark.parametrize("content", [{}, {"method.r": [8]}, {"method.r": {"values": [8]}}])
def test_a_space_without_a_choice_is_empty(content: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="empty"):
        Space.parse(content)


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Space.parse(
            {
                "r": [4, 8],
                "method.r": {"low": 8, "high": 4},
                "train.learning_rate": {"low": 0, "high": 1, "log": True},
                "train.warmup_ratio": {"lov": 0},
                "method.type": ["lora", "ia3"],
                "when": {"method.typ=lora": {"method.r": [1, 2]}, "method.type=dora": {}},
            }
        )
    problems = "\n".join(caught.value.problems)
    for fault in (
        "r: a field is written section.field",
        "method.r: empty: low is 8 and high is 4",
        "train.learning_rate: on a log scale",
        "train.warmup_ratio: unknown key 'lov'; did you mean 'low'?",
        "when method.typ=lora: write field=value of a field that the space chooses; did you mean",
        "when method.type=dora: method.type never takes the value 'dora'",
    ):
        assert fault in problems


def test_a_field_is_chosen_freely_or_under_conditions() -> None:
    with pytest.raises(ConfigError, match="also chosen without a condition"):
        Space.parse({**BY_METHOD, "method.r": [1, 2]})
