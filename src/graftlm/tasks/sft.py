"""Supervised fine-tuning: chat, completion or plain text, continued by a causal model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from graftlm.data.batches import Batch, Batches
from graftlm.data.encode import Encoded
from graftlm.data.records import Example
from graftlm.evaluation.perplexity import row_losses
from graftlm.evaluation.rows import TokenRow
from graftlm.evaluation.runner import Evaluation, evaluate
from graftlm.evaluation.text_scores import require_packages, with_scores
from graftlm.models.generate import Progress, StopFlag
from graftlm.objectives.sft import SftObjective, require_causal
from graftlm.tasks.base import spread
from graftlm.tasks.dataset import Converted, encode, to_texts
from graftlm.tasks.measurement import answers_wanted, scores_wanted
from graftlm.tasks.records import RecordTask
from graftlm.training.interfaces import Evaluate, HeldOut, StopAsked

ROWS_DURING_TRAINING = 512


class SftTask(RecordTask[Example, Encoded, Batch]):
    """Next-token prediction on the answers, or on everything."""

    name = "sft"

    def prepare(self) -> None:
        require_packages(scores_wanted(self.recipe))

    def convert(
        self, rows: Sequence[Mapping[str, Any]], format: str, numbers: Sequence[int], source: str
    ) -> Converted[Example]:
        return to_texts(rows, format, numbers, source)

    def require_base(self, model: nn.Module) -> None:
        require_causal(model)

    def encoded(self, records: Sequence[Example], tokenizer: Any, part: str) -> tuple[Encoded, ...]:
        return encode(records, self.recipe.data, tokenizer, part)

    def batches(self, tokenizer: Any) -> Batches:
        data, train = self.recipe.data, self.recipe.train
        return Batches(
            self.dataset.train,
            rows_per_batch=train.per_device_train_batch_size,
            max_length=data.max_length,
            packing=data.packing,
            seed=train.seed,
            pad_token_id=tokenizer.pad_token_id,
        )

    def objective(self, model: nn.Module) -> SftObjective:
        return SftObjective(model)

    def held_out_loss(self, model: nn.Module) -> Evaluate:
        return HeldOutLoss(model, self.dataset.held_out)

    def measure(
        self, model: nn.Module, tokenizer: Any, *, name: str, progress: Progress, stop: StopFlag
    ) -> Evaluation:
        rows = self.dataset.held_out
        found = evaluate(
            model, tokenizer, rows, name=name, most_answers=answers_wanted(self.recipe, rows),
            progress=progress, should_stop=stop,
        )  # fmt: skip
        return with_scores(found, scores_wanted(self.recipe))

    def probes(self, count: int) -> list[list[int]]:
        return [list(row.input_ids) for row in spread(self.dataset.held_out, count)]


class HeldOutLoss:
    """The loss on held-out rows while training; at most `ROWS_DURING_TRAINING` of them, evenly spread."""

    def __init__(self, model: nn.Module, rows: Sequence[TokenRow]) -> None:
        stride = -(-len(rows) // ROWS_DURING_TRAINING)
        self.model, self.rows = model, list(rows)[::stride]

    def __call__(self, stop: StopAsked) -> HeldOut | None:
        found = row_losses(self.model, self.rows, should_stop=stop)
        if not found.complete:
            return None
        tokens = sum(row.tokens for row in found.rows)
        return HeldOut(sum(row.loss_sum for row in found.rows) / tokens, tokens, len(found.rows))
