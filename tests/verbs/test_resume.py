"""An interrupted `tune` goes on by the command that it names, and ends as if nothing had happened."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from interrupting import STAGES, interrupted, when
from runs import SETTINGS, Outcome, assignments, files_of

from graftlm.core.errors import CheckpointError, ConfigError, UsageError
from graftlm.core.events import read_events
from graftlm.verbs.tune import tune
from graftlm.verbs.tune_result import TuneResult


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c(stage: str, sums: Path, tuned: TuneResult, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    said = interrupted(stage, run, lambda: tune(sums, model="sprout", out=run, overrides=SETTINGS))
    assert not (run / "adapter").exists()
    assert not [path for path in run.rglob("*") if ".tmp-" in path.name]
    command = said.rpartition(": ")[2]
    words = shlex.split(command)
    assert words == ["graft", "tune", str(run), "--resume"], said
    result = tune(words[2], resume=True)
    assert result.passed
    assert files_of(result.adapter) == files_of(tuned.adapter)
    assert result.figures["before"] == tuned.figures["before"]
    assert result.figures["after"] == tuned.figures["after"]


def test_twice_interrupted(sums: Path, tuned: TuneResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    interrupted(
        "while the base is measured", run, lambda: tune(sums, model="sprout", out=run, overrides=SETTINGS)
    )
    interrupted("while training", run, lambda: tune(run, resume=True))
    assert files_of(tune(run, resume=True).adapter) == files_of(tuned.adapter)


@pytest.fixture
def finished(tuned: TuneResult, tmp_path: Path) -> Path:
    """A copy of the finished run, in another place: a run may be moved."""
    shutil.copytree(tuned.run, tmp_path / "moved")
    return tmp_path / "moved"


def test_a_finished_run_stays_as_it_is(finished: Path, tuned: TuneResult) -> None:
    result = tune(finished, resume=True)
    assert result.passed and result.verdict == tuned.verdict
    assert files_of(result.adapter) == files_of(tuned.adapter)
    steps = [event["step"] for event in read_events(finished / "events.jsonl") if event["kind"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6], "no step was repeated"


def test_the_first_command_with_resume_added(finished: Path, sums: Path, tuned: TuneResult) -> None:
    result = tune(sums, model="sprout", out=finished, overrides=SETTINGS, resume=True)
    assert files_of(result.adapter) == files_of(tuned.adapter)


def test_a_recipe_that_names_its_folder(finished: Path, sums: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: sprout\ndata: {sums}\noutput: {{dir: {finished}, report_to: none}}\n")
    settings = [setting for setting in SETTINGS if not setting.startswith("output")]
    assert tune(recipe, overrides=settings, resume=True).run == finished


def test_an_adapter_cut_short_by_a_kill_is_written_again(finished: Path, tuned: TuneResult) -> None:
    """The config is the last of its files; a dead writer's temporary file lies beside."""
    (finished / "adapter" / "adapter_config.json").unlink()
    (finished / "adapter" / "adapter_model.safetensors").write_bytes(b"half of it")
    dead = finished / "adapter" / ".graft.json.tmp-999999999-1-0123abcd"
    dead.write_bytes(b"{")
    tune(finished, resume=True)
    assert files_of(finished / "adapter") == files_of(tuned.adapter)


def test_other_settings_are_refused(finished: Path) -> None:
    before = files_of(finished)
    with pytest.raises(ConfigError) as refused:
        tune(finished, method="lora", overrides=["train.learning_rate=1e-3", "method.r=8"], resume=True)
    assert [line.partition(":")[0] for line in refused.value.problems] == ["method.r", "train.learning_rate"]
    assert "4 in the run, 8 asked for" in refused.value.problems[0]
    with pytest.raises(UsageError, match="Two runs are named"):
        tune(finished, out=finished.with_name("elsewhere"), resume=True)
    assert files_of(finished) == before


def test_who_follows_the_run_may_change(finished: Path) -> None:
    tune(finished, overrides=["output.report_to=tensorboard"], resume=True)
    assert list((finished / "tensorboard").glob("events.out.*"))


def test_other_data_under_the_same_name_are_refused(finished: Path, sums: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.jsonl"
    changed.write_text(sums.read_text().replace("twice", "double"))
    recipe = (finished / "recipe.yaml").read_text().replace(str(sums), str(changed))
    (finished / "recipe.yaml").write_text(recipe)
    with pytest.raises(CheckpointError, match="data or settings changed"):
        tune(finished, resume=True)


def test_a_recipe_edited_by_hand_is_refused(finished: Path) -> None:
    """Also where the edit changes no shape and no batch."""
    recipe = (finished / "recipe.yaml").read_text()
    assert "lora_alpha: 32" in recipe
    (finished / "recipe.yaml").write_text(recipe.replace("lora_alpha: 32", "lora_alpha: 64"))
    with pytest.raises(CheckpointError, match="data or settings changed") as refused:
        tune(finished, resume=True)
    assert "lora_alpha" in "".join(refused.value.problems)


def started(sums: Path, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "graftlm", "tune", str(sums), "--model", "sprout", "--out", "run", "--json",
         *assignments(SETTINGS)],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("stage", STAGES)
def test_a_process_that_was_stopped(
    stage: str, number: signal.Signals, sums: Path, tuned: TuneResult, command: Callable[..., Outcome],
    tmp_path: Path,
) -> None:  # fmt: skip
    process = started(sums, tmp_path)
    when(STAGES[stage], tmp_path / "run", lambda: process.send_signal(number), threading.Event())
    out, err = process.communicate(timeout=120)
    if number == signal.SIGINT:
        assert process.returncode == 130, err
        assert json.loads(out.splitlines()[-1])["exit_code"] == 130
        assert "graft tune run --resume" in err
        assert "Traceback" not in err
    else:
        assert process.returncode == -signal.SIGKILL
    done = command("tune", "run", "--resume", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert files_of(tmp_path / "run" / "adapter") == files_of(tuned.adapter)
    assert not [path for path in (tmp_path / "run").rglob("*") if ".tmp-" in path.name]


@pytest.mark.slow
@pytest.mark.parametrize("after", [2.0, 3.0, 4.0, 4.5, 5.0, 5.5, 6.0, 7.0])
def test_killed_at_any_time(
    after: float, sums: Path, tuned: TuneResult, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    """Whatever it was doing: going on, or starting again where nothing was written yet, gives the adapter."""
    process = started(sums, tmp_path)
    time.sleep(after)
    process.kill()
    process.communicate(timeout=60)
    if (tmp_path / "run" / "recipe.yaml").exists():
        done = command("tune", "run", "--resume", cwd=tmp_path)
    else:
        done = command(
            "tune", sums, "--model", "sprout", "--out", "run", *assignments(SETTINGS), cwd=tmp_path
        )
    assert done.code == 0, done.err
    assert files_of(tmp_path / "run" / "adapter") == files_of(tuned.adapter)
