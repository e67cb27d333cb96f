"""How far a run is: everything a resume needs that is not a tensor or a random state."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from graftlm.training.interfaces import HeldOut


@dataclass(frozen=True)
class Progress:
    """Counters after `step` windows. Losses are means over held-out target tokens."""

    step: int = 0
    epoch: int = 0  # of the next window
    position: int = 0  # micro-batches of that epoch already used
    target_tokens: int = 0
    skipped: int = 0
    failures: int = 0  # non-finite windows in a row
    best_step: int | None = None
    best_loss: float | None = None
    stale: int = 0  # evaluations in a row that were no better
    evaluated_step: int = 0

    def advanced(self, **changes: Any) -> Progress:
        """A copy with these fields changed."""
        return dataclasses.replace(self, **changes)

    def evaluated(self, result: HeldOut) -> Progress:
        """The progress after an evaluation here; a loss that is not finite is never the best."""
        better = math.isfinite(result.loss) and (self.best_loss is None or result.loss < self.best_loss)
        if better:
            return self.advanced(
                best_step=self.step, best_loss=result.loss, stale=0, evaluated_step=self.step
            )
        return self.advanced(stale=self.stale + 1, evaluated_step=self.step)

    def as_dict(self) -> dict[str, Any]:
        """JSON values; `Progress(**d)` reads them back exactly."""
        return dataclasses.asdict(self)
