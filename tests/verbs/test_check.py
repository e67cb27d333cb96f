"""`graft check` as a function: reads, writes nothing, refuses options that would do nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from graftlm.core.errors import ConfigError, DataError, UsageError
from graftlm.verbs.check import check


def test_with_and_without_a_model(sums: Path) -> None:
    plain = check(sums)
    counted = check(sums, model="sprout", max_length=32)
    assert plain.ok and counted.ok
    assert plain.as_dict() != counted.as_dict()
    assert sorted(path.name for path in sums.parent.iterdir()) == ["sums.jsonl"]


@pytest.mark.parametrize(
    ("option", "value"), [("max_length", 64), ("template", "chat"), ("template", "zorp")]
)
def test_options_that_need_a_model(option: str, value: object, sums: Path) -> None:
    with pytest.raises(UsageError, match=f"{option} has no effect without a model") as refused:
        check(sums, **{option: value})  # type: ignore[arg-type]
    assert "--model" in refused.value.fix


def test_unknown_names(sums: Path) -> None:
    with pytest.raises(ConfigError, match="Unknown template 'zorp'"):
        check(sums, model="sprout", template="zorp")
    with pytest.raises(ConfigError, match="Unknown data format 'zorp'"):
        check(sums, format="zorp")
    with pytest.raises(DataError, match="No file"):
        check(sums.with_name("nowhere.jsonl"))
