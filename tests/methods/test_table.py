"""Type names and the methods behind them."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints
from typing import ClassVar

import pytest

from graftlm.core.errors import ConfigError
from graftlm.methods import table
from graftlm.methods.lora import LoraConfig


class Foreign(LoraConfig):
    """A method of another package."""

    peft_type: ClassVar[str] = "FOREIGN"


def test_known_types_are_those_of_their_configs() -> None:
    for name, config in table.METHODS.items():
        assert table.method(name) is config and config.peft_type == name


def test_an_unknown_type_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"(?s)'HRA'.*LORA"):
        table.method("HRA")


def test_another_package_adds_a_method_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("FOREIGN", f"{__name__}:Foreign", "graftlm.methods")
    monkeypatch.setattr(table, "entry_points", lambda group: EntryPoints([point]))
    found = table.method("FOREIGN")
    assert found.__name__ == "Foreign" and found.peft_type == "FOREIGN"
    with pytest.raises(ConfigError):
        table.method("OTHER")
