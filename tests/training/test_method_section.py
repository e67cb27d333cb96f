"""The method of a recipe: every type, its starting values, its errors, and the way back to YAML."""

from __future__ import annotations

import pytest

from graftlm.core.errors import ConfigError
from graftlm.methods.lora import LoraConfig
from graftlm.methods.table import METHODS
from graftlm.training.method_section import TYPES, Method


def test_a_section_is_the_config_of_its_method() -> None:
    method = Method.parse({"type": "lora", "r": 8, "lora_alpha": 16, "use_rslora": True})
    assert type(method.config) is LoraConfig
    assert (method.config.r, method.config.lora_alpha, method.config.use_rslora) == (8, 16, True)


@pytest.mark.parametrize("name", TYPES)
def test_every_type_is_written_and_read_back(name: str) -> None:
    fields = {"tokens": {"token_indices": [3]}}.get(name, {})
    method = Method.parse({"type": name, **fields})
    assert Method.parse(method.as_dict()) == method
    assert method.summary.startswith(name)
    for key, value in TYPES[name].fields.items():
        assert method.as_dict()[key] == value


def test_every_method_of_the_table_has_a_type() -> None:
    assert set(METHODS) == {kind.peft_type for kind in TYPES.values()}


def test_what_is_written_wins_over_a_type() -> None:
    method = Method.parse({"type": "prefix", "prefix_projection": False})
    assert method.as_dict()["prefix_projection"] is False


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"type": "lora", "lora_alpa": 1}, "lora_alpa: unknown key; did you mean 'lora_alpha'?"),
        ({"type": "bottlenek"}, "type: no such method; did you mean 'bottleneck'? (got 'bottlenek')"),
        ({"type": "ia3", "r": 8}, "r: unknown key"),
        ({"type": 7}, "type: no such method"),
    ],
)
def test_what_does_not_fit_is_named(section: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Method.parse(section)
    assert any(line.startswith(problem) for line in refused.value.problems), refused.value.problems
