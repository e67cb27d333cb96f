"""What a run computes on, in figures: enough to predict it without the rows themselves."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Workload:
    """Data and steps of a run, counted by a task's batches or estimated from the text."""

    train_rows: int
    held_out_rows: int
    train_tokens: int
    """Real tokens of one epoch."""
    target_share: float
    """Share of them that carries a label."""
    held_out_tokens: int
    mean_row_tokens: float
    batch_tokens: int
    """Of the largest micro-batch, padding included."""
    mean_batch_tokens: float
    """Of the mean micro-batch, padding included."""
    mean_document: float
    """Tokens that attend to each other, seen from a token: sum of squares over sum of document lengths."""
    micro_batches: int
    """Per optimizer step."""
    steps: int
    eval_steps: int
    """Optimizer steps between measurements."""
    save_steps: int
    is_counted: bool = True
    """False where tokens were estimated from characters, without a tokenizer."""
    longest_row: int = 0
    """Tokens of the longest row that is trained on; 0 where nobody counted."""
    longest_held_out: int = 0
    """Tokens of the longest row that is held out; 0 where nobody counted."""
    longest_answer: int = 0
    """Labelled tokens of the longest held-out row with a prompt; 0 where there is none, or not counted."""

    mean_micro_batches: float = 0.0
    """Per optimizer step, the short last step of an epoch included; 0: `micro_batches`."""
    mean_step_tokens: float = 0.0
    """Real tokens of the mean optimizer step; 0 where nobody counted."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
