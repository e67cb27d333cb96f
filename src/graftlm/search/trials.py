"""What is known of each trial, in a file of its own folder: the search's memory of results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from graftlm.core.errors import CheckpointError
from graftlm.core.files import write_atomic
from graftlm.search.scores import Score

FILE, FOLDER = "trial.json", "trials"
State = Literal["running", "whole", "stopped", "failed"]


@dataclass(frozen=True)
class Rung:
    """A trial as it was measured on its way."""

    step: int
    score: Score
    """Of what the search is judged by."""
    early: Score
    """Of the loss, where the task has one: surer before the end, when a count of right answers is still
    chance; otherwise the score."""
    loss: float
    """The held-out loss."""
    costs: Mapping[str, float]
    """By name: parameters, memory (bytes), seconds (of a whole run, from what was measured)."""
    seconds: float
    """Of work from the rung before, measuring included."""
    tokens: int
    """That went through the model from the rung before."""


@dataclass(frozen=True)
class Trial:
    """One point: how far it is asked to go, and what was found.

    `target` is the rung (0, 1, ...) it is asked to reach; between two legs it has reached it and waits.
    """

    number: int
    point: Mapping[str, Any]
    fields: Mapping[str, Any]
    target: int = 0
    rungs: tuple[Rung, ...] = ()
    steps: tuple[int, ...] = ()
    """At which it is measured; the last is its end. Known once it has begun."""
    state: State = "running"
    why: str = ""
    """Of a failure."""
    memory: Mapping[str, Any] = field(default_factory=dict)
    """What the sampler noted of it."""

    @property
    def reached(self) -> int:
        """How many rungs it has reached."""
        return len(self.rungs)

    @property
    def is_due(self) -> bool:
        """Whether it still has to reach its target."""
        return self.state == "running" and self.reached <= self.target

    @property
    def is_waiting(self) -> bool:
        """Whether it stands at a rung."""
        return self.state == "running" and self.reached > self.target

    @property
    def last(self) -> Rung | None:
        """Its newest measurement."""
        return self.rungs[-1] if self.rungs else None

    def climbed(self, rung: Rung) -> Trial:
        """With one more measurement; whole at its last step."""
        rungs = (*self.rungs, rung)
        return replace(self, rungs=rungs, state="whole" if rung.step >= self.steps[-1] else "running")


def folder_of(search: Path, number: int) -> Path:
    """The folder of a trial.

    >>> folder_of(Path("a"), 7).as_posix()
    'a/trials/007'
    """
    return search / FOLDER / f"{number:03d}"


def write_trial(search: Path, trial: Trial) -> None:
    """Keep it."""
    write_atomic(folder_of(search, trial.number) / FILE, json.dumps(asdict(trial), indent=1) + "\n")


def read_trials(search: Path) -> list[Trial]:
    """All trials by number.

    Raises:
        CheckpointError: a file was damaged.
    """
    return [_read(path) for path in sorted((search / FOLDER).glob(f"*/{FILE}"))]


def _read(path: Path) -> Trial:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Trial).validate_json(path.read_bytes())
    except ValidationError as error:
        raise CheckpointError(
            f"{path} is no record of a trial: {error.error_count()} fields are missing or wrong.",
            meaning="The file was edited or damaged.",
            fix=f"Remove the folder {path.parent}; the search then does without it.",
        ) from None


def common(trials: Sequence[Trial], rung: int) -> list[Trial]:
    """Those that have reached a rung."""
    return [trial for trial in trials if trial.reached > rung]
