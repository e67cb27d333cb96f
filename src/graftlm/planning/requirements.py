"""What somebody wants of a run besides its data and its base."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from graftlm.core.errors import ConfigError
from graftlm.planning.amounts import in_time

FEW_EXAMPLES = 500
"""Rows below which a run overfits unless it is held back (D02 of the known failures)."""


@dataclass(frozen=True)
class Requirements:
    """Limits that an option must keep, and what to prefer among those that do.

    >>> Requirements(tasks=0)
    Traceback (most recent call last):
    graftlm.core.errors.ConfigError: The requirements have 1 problem.
      - tasks: 0; at least 1 task is learnt
      fix: Correct the options above.
    """

    deadline_seconds: float | None = None
    """The whole run must be over by then."""
    budget: float | None = None
    """The whole run must cost at most this, at the machine's price per hour."""
    is_latency_critical: bool = False
    """Nothing may be added to the time of an answer: only methods that can be merged into the base."""
    tasks: int = 1
    """Tasks that are to share one base in memory, each with an adapter of its own."""
    is_quality_first: bool = False
    """Take what promises the best result among all that fits, whatever it takes."""

    def __post_init__(self) -> None:
        problems = []
        if self.deadline_seconds is not None and not self.deadline_seconds > 0:
            problems.append(f"deadline: {self.deadline_seconds} seconds; it must be above 0")
        if self.budget is not None and not self.budget > 0:
            problems.append(f"budget: {self.budget}; it must be above 0")
        if self.tasks < 1:
            problems.append(f"tasks: {self.tasks}; at least 1 task is learnt")
        if problems:
            count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
            raise ConfigError(
                f"The requirements have {count}.", problems=problems, fix="Correct the options above."
            )

    @property
    def in_words(self) -> tuple[str, ...]:
        """What was asked for, for a heading."""
        said = {
            f"within {in_time(self.deadline_seconds or 0)}": self.deadline_seconds is not None,
            f"for at most {self.budget:g}" if self.budget is not None else "": self.budget is not None,
            "nothing added to the time of an answer": self.is_latency_critical,
            f"{self.tasks} tasks on one base": self.tasks > 1,
            "quality first": self.is_quality_first,
        }
        return tuple(text for text, is_asked in said.items() if is_asked)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
