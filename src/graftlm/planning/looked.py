"""A candidate after it was looked at on a machine."""

from __future__ import annotations

from dataclasses import dataclass

from graftlm.core.errors import GraftError
from graftlm.planning.candidates import Candidate
from graftlm.planning.fitting import TooLarge
from graftlm.planning.option import Fit


@dataclass(frozen=True)
class Looked:
    """What became of one candidate."""

    candidate: Candidate
    outcome: Fit | TooLarge | GraftError
    trainable: int

    @property
    def run(self) -> Fit:
        """How it runs. Asked of those that do."""
        assert isinstance(self.outcome, Fit)
        return self.outcome

    @property
    def peak(self) -> int | None:
        """Bytes that it takes, or would take at the least."""
        return None if isinstance(self.outcome, GraftError) else self.outcome.memory.peak
