from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from case import QUICK, tuned, write_rows

from graftlm.core.errors import TrainingError
from graftlm.core.events import read_events
from graftlm.training.callbacks import Event
from graftlm.verbs.diagnosing.live import LiveDiagnosis, is_due
from graftlm.verbs.tune import tune

LARGE = ("method.lora_alpha=4096", "train.max_steps=10", "train.save_steps=4")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [{"prompt": f"What is twice {n}?", "completion": f"It is {2 * n}."} for n in range(60)]
    return write_rows(tmp_path_factory.mktemp("data") / "sums.jsonl", lines)


def test_it_looks_ever_more_rarely() -> None:
    due = [step for step in range(1, 100_001) if is_due(step)]
    assert due[:16] == list(range(1, 17))
    assert len(due) < 130
    assert all(later - step <= max(1, step // 8) for step, later in pairwise(due))


def test_a_finding_is_said_once_and_kept(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tuned(tmp_path, rows, *LARGE)
    found = [event for event in read_events(run / "events.jsonl") if event["kind"] == "finding"]
    assert [event["rule"] for event in found].count("D05") == 1
    assert "error D05 at step" in capsys.readouterr().err
    kept = json.loads((run / "diagnosis.json").read_text(encoding="utf-8"))
    assert "D05" in [finding["rule"] for finding in kept["findings"]]
    assert str(run) in next(one["command"] for one in kept["findings"] if one["rule"] == "D05")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<h2>Findings</h2>" in page and "Update too large" in page and "threshold" in page


def test_a_run_stops_if_asked_and_goes_on_all_the_same(rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = (*QUICK, *LARGE, "train.on_failure=stop")
    quick = {setting.partition("=")[0]: setting for setting in settings}
    with pytest.raises(TrainingError, match="D05") as error:
        tune(rows, model="sprout", task="sft", out=out, overrides=tuple(quick.values()))
    assert "--resume --set train.on_failure=warn" in error.value.fix
    last = read_events(out / "events.jsonl")[-1]
    assert (last["kind"], last["why"]) == ("end", "failed")
    result = tune(out, resume=True, overrides=("train.on_failure=warn",))
    assert result.figures["steps"] == 10


def test_looking_changes_no_number(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("train.max_steps=4", "method.lora_dropout=0.1")
    one = tuned(tmp_path / "one", rows, *settings)

    def silent(self: LiveDiagnosis, event: Event) -> tuple[Event, ...]:
        return ()

    monkeypatch.setattr(LiveDiagnosis, "__call__", silent)
    other = tuned(tmp_path / "other", rows, *settings)
    assert not [event for event in read_events(other / "events.jsonl") if event["kind"] == "adapter"]
    for name in ("trainable", "optimizer"):
        file = f"checkpoints/step-000004/{name}.safetensors"
        assert (one / file).read_bytes() == (other / file).read_bytes()
