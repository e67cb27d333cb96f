from __future__ import annotations

import inspect
import re

import pytest

from graftlm.core import errors
from graftlm.core.errors import ConfigError, GraftError, MissingDependency, UsageError

TREE = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, GraftError) and value is not MissingDependency
]


@pytest.mark.parametrize("kind", TREE)
def test_every_error_is_a_value_error_in_three_parts(kind: type[GraftError]) -> None:
    error = kind("Seen.", meaning="Means.", fix="Fixes.", problems=["one", "two"])
    assert isinstance(error, ValueError)
    assert str(error) == "Seen.\n  - one\n  - two\n  meaning: Means.\n  fix: Fixes."
    assert error.as_dict() == {
        "error": kind.__name__,
        "seen": "Seen.",
        "meaning": "Means.",
        "fix": "Fixes.",
        "problems": ["one", "two"],
    }


@pytest.mark.parametrize("kind", TREE)
def test_only_wrong_usage_exits_with_2(kind: type[GraftError]) -> None:
    assert kind.exit_code == (2 if issubclass(kind, UsageError) else 1)


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    drawn = re.findall(r"^[ │├└─]*(\w+)", errors.__doc__ or "", re.MULTILINE)
    assert {kind.__name__ for kind in [*TREE, MissingDependency]} <= set(drawn)


def test_parts_that_are_missing_leave_no_line() -> None:
    assert str(GraftError("Seen.")) == "Seen."


def test_a_config_error_is_wrong_usage() -> None:
    assert issubclass(ConfigError, UsageError)


def test_a_missing_dependency_names_its_extra() -> None:
    error = MissingDependency("bitsandbytes", extra="quant")
    assert "bitsandbytes" in error.seen
    assert error.fix == "pip install 'graftlm[quant]'"
    assert error.exit_code == 2
