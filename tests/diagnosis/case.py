"""A failure made on purpose, and the same without it: what every rule is judged by.

`broken` and `fixed` are functions from an empty folder to what is diagnosed, by real runs on small bases.
Where the command of the finding is the fix, `fixed` is `BY_COMMAND`: it is run as it stands.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from graftlm.cli.main import run as command_line
from graftlm.core.errors import GraftError
from graftlm.diagnosis.finding import Finding
from graftlm.verbs.diagnose import Diagnosis, diagnose
from graftlm.verbs.tune import tune

BASE = "sprout"
KNOWN = Path(__file__).parents[1] / "verbs" / "known.txt"
QUICK: tuple[str, ...] = (
    "model.dtype=float32",
    "data.max_length=64",
    "method.r=4",
    "train.max_steps=20",
    "output.report_to=none",
    "eval.before_after=false",
    f"eval.known_path={KNOWN}",
)
"""Settings of a run of seconds; later ones win."""


@dataclass(frozen=True)
class Diagnosed:
    """What `graft diagnose` is given."""

    folder: Path
    base: str | None = None
    data: Path | None = None
    adapter: Path | None = None
    beside: tuple[Path, ...] = ()
    served: str | None = None
    safety: Path | None = None
    known: Path | None = None


Make = Callable[[Path], Diagnosed | Path]
BY_COMMAND = "by command"


@dataclass(frozen=True)
class Case:
    """One way to make the failure that a rule names."""

    rule: str
    name: str
    broken: Make
    fixed: Make | str = BY_COMMAND
    deep: bool = False
    """Whether the rule needs base and adapter loaded."""

    def __str__(self) -> str:
        return f"{self.rule}-{self.name}"


@dataclass(frozen=True)
class Outcome:
    """What the rules said of both."""

    broken: Diagnosis
    fixed: Diagnosis

    def of(self, rule: str) -> tuple[Finding | None, Finding | None]:
        """The rule's finding in each."""
        one, other = (
            next((finding for finding in found.findings if finding.rule == rule), None)
            for found in (self.broken, self.fixed)
        )
        return one, other


def judge(case: Case, folder: Path) -> Outcome:
    """Make both and diagnose both."""
    for name in ("broken", "fixed"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    subject = _diagnosed(case.broken(folder / "broken"))
    broken = _ask(case, subject)
    if not callable(case.fixed):
        finding = next((one for one in broken.findings if one.rule == case.rule), None)
        assert finding is not None, f"{case} was not recognised; found: {_ids(broken)}"
        subject = replace(subject, folder=follow(finding.command))
    else:
        subject = _diagnosed(case.fixed(folder / "fixed"))
    return Outcome(broken, _ask(case, subject))


def follow(command: str) -> Path:
    """Run the command of a finding as a person would, and give the folder that it names with --out."""
    words = shlex.split(command)
    assert words[0] == "graft" and "--out" in words, command
    code = command_line(words[1:])
    assert code in (0, 1), f"{command} ended with {code}"  # 1: the run's own verdict is none of ours
    return Path(words[words.index("--out") + 1])


def _ask(case: Case, subject: Diagnosed) -> Diagnosis:
    options = {field.name: getattr(subject, field.name) for field in fields(subject)}
    return diagnose(options.pop("folder"), deep=case.deep, **options)


def _diagnosed(made: Diagnosed | Path) -> Diagnosed:
    return made if isinstance(made, Diagnosed) else Diagnosed(made)


def _ids(found: Diagnosis) -> list[str]:
    return [finding.rule for finding in found.findings]


def tuned(
    folder: Path, data: Path | str, *settings: str, model: str = BASE, method: str = "lora",
    task: str = "sft", fails: bool = False,
) -> Path:  # fmt: skip
    """A run in `folder`/run by `gl.tune` with `QUICK` and then `settings`; `fails`: it ends with an error."""
    given = {setting.partition("=")[0] for setting in settings}
    quick = [setting for setting in QUICK if setting.partition("=")[0] not in given]
    quick = [setting for setting in quick if method in ("lora", "qlora", "dora") or "method.r" not in setting]
    out = folder / "run"
    try:
        tune(data, model=model, method=method, task=task, out=out, overrides=(*quick, *settings))
    except GraftError:
        if not fails:
            raise
        return out
    assert not fails, "the run was meant to fail"
    return out


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
