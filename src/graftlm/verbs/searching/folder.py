"""The folder of a search, and what was found out before its first trial."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graftlm.core.files import write_atomic
from graftlm.evaluation.runner import Evaluation
from graftlm.models.recompute.policy import Policy
from graftlm.search.journal import WaitingLock
from graftlm.search.trials import folder_of
from graftlm.verbs.run_folder import RunFolder

PREPARED, RESULT, REPORT, LOG = "prepared.json", "result.json", "report.html", "search-events.jsonl"


@dataclass(frozen=True)
class Prepared:
    """What holds for every trial."""

    settled: Mapping[str, Any]
    """Sections of the recipe that the data settled."""
    rows: Mapping[str, int]
    why: str
    """Why it is this task."""
    metric: str = ""
    """By its name; empty until the base was measured."""
    together: int = 1
    """Trials that train at a time; what the sampler knows depends on it, so it stays what it was."""
    together_why: str = ""
    recompute: Policy = "nothing"
    """What trials side by side compute again in backward."""


@dataclass(frozen=True)
class SearchFolder:
    """One folder with fixed names inside."""

    path: Path

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def report(self) -> Path:
        return self.path / REPORT

    @property
    def result(self) -> Path:
        return self.path / RESULT

    @property
    def deciding(self) -> WaitingLock:
        """Held while it is decided what is done next, and while the search is prepared or finished."""
        return WaitingLock(self.path / ".deciding")

    def trial(self, number: int) -> RunFolder:
        """The run folder of a trial."""
        return RunFolder(folder_of(self.path, number))

    def evaluation(self, name: str) -> Path:
        """A measurement of the base, or on the final rows."""
        return self.path / "evaluation" / f"{name}.json"

    def keep_evaluation(self, name: str, found: Evaluation) -> None:
        """Write it."""
        write_atomic(self.evaluation(name), found.to_json())

    def kept_evaluation(self, name: str) -> Evaluation | None:
        """Read it; None where it was never finished."""
        path = self.evaluation(name)
        return Evaluation.from_json(path.read_text(encoding="utf-8")) if path.is_file() else None

    def keep_prepared(self, prepared: Prepared) -> None:
        """The last thing before trials begin."""
        write_atomic(self.path / PREPARED, json.dumps(asdict(prepared), indent=1, ensure_ascii=False) + "\n")

    def prepared(self) -> Prepared | None:
        """None where preparation was cut short."""
        path = self.path / PREPARED
        return Prepared(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
