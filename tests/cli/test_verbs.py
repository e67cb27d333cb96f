"""Verbs against the real api: what goes wrong first, and what needs no training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WRONG: list[tuple[list[str], int, str]] = [
    (["check", "nowhere.jsonl"], 1, "nowhere.jsonl"),
    (["tune", "nowhere.jsonl", "--model", "sprout"], 1, "nowhere.jsonl"),
    (["tune", "nowhere.yaml"], 2, "nowhere.yaml"),
    (["eval", "./nowhere", "--data", "rows.jsonl"], 1, "nowhere"),
    (["merge", "./nowhere", "--out", "merged"], 1, "nowhere"),
    (["chat", "./nowhere", "--prompt", "Hello"], 1, "nowhere"),
]


@pytest.mark.parametrize(("arguments", "code", "seen"), WRONG, ids=[" ".join(row[0][:2]) for row in WRONG])
def test_what_is_missing_is_named(
    arguments: list[str],
    code: int,
    seen: str,
    graft: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = graft(*arguments, "--json")
    assert outcome.code == code
    assert outcome.json["exit_code"] == code
    assert seen in outcome.json["seen"]
    assert outcome.json["fix"]
    assert "Traceback" not in outcome.err
    assert not list(tmp_path.iterdir()), "nothing is written by a request that failed"


def test_env(graft: Callable[..., Any]) -> None:
    plain = graft("env")
    assert plain.code == 0
    assert "fast paths" in plain.out
    assert "matrix products" in plain.out
    machine = graft("env", "--json")
    assert machine.code == 0
    assert {"graft", "python", "cpu", "cores", "packages", "extras", "fast_paths", "machine"} <= set(
        machine.json
    )
    assert machine.json["machine"]["rates"]["matrix"]["float32"] > 0


def test_check_reads_real_rows(graft: Callable[..., Any], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(f'{{"prompt": "What is {n} + 1?", "completion": "{n + 1}"}}\n' for n in range(60))
    )
    plain = graft("check", str(rows))
    assert plain.code == 0, plain.err
    assert "60" in plain.out
    machine = graft("check", str(rows), "--json")
    assert machine.code == 0
    assert "60" in str(machine.json)
