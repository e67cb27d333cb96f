from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graftlm.cli.main import app
from graftlm.core.version import __version__

VERBS = ("demo", "tune", "check", "plan", "eval", "diagnose", "merge", "chat", "combine", "env", "search")
OPTIONS = {
    "demo": {"--out"},
    "tune": {"--model", "--method", "--task", "--out", "--set", "--resume"},
    "check": {"--model", "--task", "--set", "--max-length", "--format", "--template"},
    "plan": {
        *(
            "--model",
            "--method",
            "--task",
            "--set",
            "--deadline",
            "--budget",
            "--latency-critical",
            "--tasks",
        ),
        *(
            "--quality-first",
            "--gpu",
            "--gpu-memory",
            "--machine",
            "--price-per-hour",
            "--recipe",
            "--picture",
        ),
        *("--all", "--calibrate"),
    },
    "eval": {"--data", "--against", "--base", "--limit"},
    "diagnose": {"--base", "--data", "--deep", "--adapter", "--beside", "--safety", "--known", "--served"},
    "merge": {"--base", "--dtype", "--force", "--into", "--out", "--requantize"},
    "chat": {"--base", "--prompt", "--max-new-tokens"},
    "combine": {"--base", "--density", "--how", "--majority-sign", "--out", "--rank", "--seed"},
    "env": {"--measure"},
    "search": {
        *(
            "--model",
            "--space",
            "--ladder",
            "--method",
            "--task",
            "--set",
            "--budget",
            "--metric",
            "--against",
        ),
        *("--sampler", "--stopping", "--together", "--seed", "--out", "--workers", "--on", "--resume"),
    },
}


def test_the_verbs_are_those_of_this_version() -> None:
    assert tuple(verb.name for verb in app.registered_commands) == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb: str, graft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    outcome = graft(verb, "--help")
    assert outcome.code == 0
    assert outcome.err == ""
    shown = set(re.findall(r"│[ *]+(--[a-z-]+)", outcome.out))
    assert shown == OPTIONS[verb] | {"--json", "--debug", "--help"}
    assert "Examples" in outcome.out
    assert f"graft {verb}" in outcome.out


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_examples_fit_a_terminal(
    verb: str, graft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    examples = graft(*verb.split(), "--help").out.partition("Examples")[2].strip("\n").splitlines()
    commands = [line for line in examples if line.strip()]
    assert commands
    assert all(line.startswith(" graft ") for line in commands), "an example was wrapped"


def test_version(graft: Callable[..., Any]) -> None:
    outcome = graft("--version")
    assert (outcome.code, outcome.out) == (0, f"graft {__version__}\n")


def test_nothing_asked_shows_help_and_is_wrong_usage(graft: Callable[..., Any]) -> None:
    outcome = graft()
    assert outcome.code == 2
    assert "Usage: graft" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "seen", "fix"),
    [
        (["evl"], "No such command 'evl'. Did you mean 'eval'", "graft --help"),
        (["tune"], "Missing argument 'DATA|RECIPE.yaml'", "graft tune --help"),
        (["tune", "--modle", "x", "y"], "--model", "graft tune --help"),
        (["eval", "runs/a"], "Missing option '--data'", "graft eval --help"),
        (["check", "x", "--max-length", "many"], "'--max-length'", "graft check --help"),
        (["chat", "x", "--json"], "--json needs --prompt", "--prompt TEXT"),
    ],
)
def test_wrong_usage(arguments: list[str], seen: str, fix: str, graft: Callable[..., Any]) -> None:
    plain = graft(*[word for word in arguments if word != "--json" or "chat" in arguments])
    assert plain.code == 2
    assert seen in plain.err
    assert fix in plain.err
    assert "Traceback" not in plain.err
    machine = graft(*arguments, "--json")
    assert machine.code == 2
    assert machine.json["error"] == "UsageError"
    assert seen in machine.json["seen"]


def test_json_after_the_end_of_options_is_text(graft: Callable[..., Any]) -> None:
    assert graft("tune", "--zorp", "--", "--json").out == ""


@pytest.mark.parametrize("start", [["-m", "graftlm"], ["-c", "from graftlm.cli.main import main; main()"]])
def test_as_a_process(start: list[str], repository: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(repository / "src")}
    done = subprocess.run(
        [sys.executable, *start, "zorp", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert json.loads(done.stdout)["exit_code"] == 2
    assert done.stderr.startswith("error: No such command 'zorp'")
    assert not list(tmp_path.iterdir())
