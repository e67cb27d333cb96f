"""`graft diagnose` as people use it; what rules recognise is in tests/diagnosis."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import Outcome

from graftlm.core.errors import FormatError, UsageError
from graftlm.diagnosis.finding import Finding
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.table import RULES
from graftlm.verbs.diagnose import diagnose
from graftlm.verbs.tune_result import TuneResult


@pytest.fixture
def run(tuned: TuneResult, tmp_path: Path) -> Path:
    shutil.copytree(tuned.run, tmp_path / "my run")
    return tmp_path / "my run"


def _alarm(severity: str) -> Rule:
    found = Finding(
        "D05", "Made up", severity, 0.9, "seen", "meaning", "fix", "graft eval RUN --data RUNS.jsonl"
    )  # type: ignore[arg-type]
    return Rule("D05", "Made up", lambda evidence: found if evidence.is_over else None, "this test")


def test_of_a_sound_run(run: Path) -> None:
    found = diagnose(run)
    assert found.passed and found.asked == len(RULES)
    assert not [one for one in found.findings if one.severity == "error"]
    kept = json.loads((run / "diagnosis.json").read_text(encoding="utf-8"))
    assert kept["verdict"] == found.verdict and "events" in kept["looked_at"]


def test_a_finding_reaches_file_report_and_exit_code(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "D05", _alarm("error"))
    found = diagnose(run)
    assert not found.passed and "1 error" in found.verdict
    command = next(one.command for one in found.findings if one.rule == "D05")
    assert command == f"graft eval '{run}' --data RUNS.jsonl"
    assert "Made up" in (run / "report.html").read_text(encoding="utf-8")
    monkeypatch.undo()
    diagnose(run)
    assert "Made up" not in (run / "report.html").read_text(encoding="utf-8"), "and leaves it again"


def test_a_warning_is_no_failure(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "D05", _alarm("warning"))
    assert diagnose(run).passed


def test_single_rules_are_asked_without_a_trace(run: Path) -> None:
    before = (run / "diagnosis.json").read_bytes()
    assert diagnose(run, rules=["D08"]).asked == 1
    assert (run / "diagnosis.json").read_bytes() == before
    with pytest.raises(UsageError, match="D77"):
        diagnose(run, rules=["D77"])


def test_of_an_adapter_alone(run: Path) -> None:
    shutil.move(run / "adapter", run.parent / "alone")
    found = diagnose(run.parent / "alone")
    assert found.written is None and "the adapter" in found.looked_at
    assert "the rows (--data FILE)" in found.not_looked_at


def test_of_a_run_without_an_adapter_the_newest_checkpoint_is_read(run: Path) -> None:
    shutil.rmtree(run / "adapter")
    (run / "report.json").unlink()
    found = diagnose(run)
    assert "the adapter" in found.looked_at and found.passed


@pytest.mark.parametrize(("name", "text"), [("nothing", "There is no"), ("empty", "no run folder")])
def test_what_is_none(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match=text):
        diagnose(tmp_path / name)


def test_a_damaged_file_is_named(run: Path) -> None:
    (run / "plan.json").write_text("{", encoding="utf-8")
    with pytest.raises(FormatError, match=r"plan\.json"):
        diagnose(run)


def test_from_the_command_line(run: Path, command: Callable[..., Outcome]) -> None:
    shown = command("diagnose", run)
    assert shown.code == 0 and "Looked at" in shown.out and "Written to" in shown.out
    found = command("diagnose", run, "--json").json
    assert found["passed"] and found["rules_asked"] == len(RULES)
    wrong = command("diagnose", "support@3")
    assert wrong.code == 2 and "registry" in wrong.err
