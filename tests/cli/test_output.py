from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftlm.cli.output import finish, print_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(Path("a/b")),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@dataclass(frozen=True)
class Measured:
    """A result as the functions of the api return it."""

    passed: bool = True
    verdict: str = "The adapter helps."
    lines: tuple[str, ...] = ("Data: 90 rows -> train.jsonl", "Loss: 2.1 to 0.4 [0.3, 0.5]", "no name")
    extra: dict[str, Any] = field(default_factory=lambda: {"run": Path("runs/a"), "loss": float("nan")})

    def as_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, **self.extra}


def test_a_result_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert finish(Measured(), as_json=False) == 0
    assert capsys.readouterr().out.splitlines() == [
        "✓ Data  90 rows → train.jsonl",
        "✓ Loss  2.1 to 0.4 [0.3, 0.5]",
        "✓ no name",
        "✓ The adapter helps.",
    ]


def test_a_gate_that_said_no(capsys: pytest.CaptureFixture[str]) -> None:
    assert finish(Measured(passed=False, verdict="No gain."), as_json=False) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "✗ No gain."


def test_terminals_without_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    finish(Measured(), as_json=False)
    assert raw.getvalue().startswith(b"ok Data  90 rows -> train.jsonl")


def test_json_is_one_strict_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert finish(Measured(passed=False), as_json=True) == 1
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"passed": False, "run": "runs/a", "loss": None}


@given(st.dictionaries(st.text(), VALUES))
def test_any_result_is_valid_json(value: dict[str, Any]) -> None:
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", stream)
        print_json(value)
    text = stream.getvalue()
    assert text.count("\n") == 1

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert set(json.loads(text, parse_constant=refuse)) == set(value)
