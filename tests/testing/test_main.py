"""`python -m graftlm.testing`: the table, the count, the exit code."""

from __future__ import annotations

import pytest

from graftlm.methods.lora import LoraConfig
from graftlm.testing import __main__ as command
from graftlm.testing.properties import PROPERTIES
from graftlm.testing.suite import Subject


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["graftlm.testing", *arguments])
    return command.main()


def test_the_table_counts_cells(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--kind", "bert", "--property", "identity", "--property", "generates"]
    assert run(monkeypatch, "--method", "ia3", "--method", "bottleneck, pfeiffer", *options) == 0
    said = capsys.readouterr().out
    assert "2 cells (method, model, property) checked: 2 holds, 0 refused, 2 absent, 0 failed" in said
    assert "bert is an encoder" in said
    assert all(f" {name}\n" in said for name in PROPERTIES)


def test_a_failure_is_shown_and_gives_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"loud": Subject(LoraConfig(r=2, init_lora_weights=False))}
    monkeypatch.setattr(command, "ROWS", rows)
    assert run(monkeypatch, "--kind", "gpt2", "--property", "identity") == 1
    said = capsys.readouterr().out
    assert "FAILED loud, identity on gpt2" in said and "1 failed" in said


@pytest.mark.parametrize("wrong", [["--method", "lorra"], ["--kind", "cat"], ["--property", "beauty"]])
def test_wrong_names_are_refused(monkeypatch: pytest.MonkeyPatch, wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *wrong)
    assert stop.value.code == 2
