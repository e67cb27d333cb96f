"""Experiment trackers as readers of a run's events. A tracker that fails never harms the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graftlm.core.notices import notice
from graftlm.training.callbacks import Callback, Event

SCALARS = {
    "step": ("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_bytes"),
    "evaluate": ("loss",),
    "adapter": ("median", "largest"),
}
"""Figures by kind of event; shown as train/loss, evaluate/loss, ... Those of the task join them."""


def trackers(names: Sequence[str], run: Path) -> list[Callback]:
    """The trackers that a recipe asks for and this machine has; a missing one is said."""
    found: list[Callback] = []
    if "tensorboard" in names:
        try:
            found.append(TensorBoard(run / "tensorboard"))
        except ImportError:
            notice("No TensorBoard files: tensorboard is not installed (pip install 'graftlm[track]').")
        except OSError as error:
            notice(f"No TensorBoard files: {error}")
    return found


class TensorBoard:
    """Scalars for `tensorboard --logdir RUN`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))  # None once it has failed

    def __call__(self, event: Event) -> None:
        if self._writer is None:
            return
        try:
            self._write(event)
        except (OSError, ValueError, RuntimeError) as error:  # it writes in a thread, and tells later
            self._writer = None
            notice(f"TensorBoard files are incomplete: {error}")

    def _write(self, event: Event) -> None:
        group = "train" if event.kind == "step" else event.kind
        for name in SCALARS.get(event.kind, ()):
            if name in event.fields:
                self._writer.add_scalar(f"{group}/{name}", event.fields[name], event.fields["step"])
        for name, value in (event.fields.get("metrics") or {}).items():
            self._writer.add_scalar(f"{group}/{name}", value, event.fields["step"])
        if event.kind == "end":
            self._writer.close()
