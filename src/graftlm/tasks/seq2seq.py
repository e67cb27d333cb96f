"""Sequence to sequence: an encoder-decoder learns to write targets to sources."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from graftlm.core.errors import ConfigError
from graftlm.core.notices import notice
from graftlm.data.batches import Batch
from graftlm.data.pair_batches import PairBatches
from graftlm.data.pairs import Limits, Pair, encode_pairs
from graftlm.data.records import Example
from graftlm.evaluation.pairs import Asking, evaluate_pairs, pair_losses
from graftlm.evaluation.runner import Evaluation
from graftlm.evaluation.text_scores import require_packages, with_scores
from graftlm.models.encoder_decoder import decoder_ids, require_encoder_decoder
from graftlm.models.generate import Progress, StopFlag, context_length
from graftlm.objectives.seq2seq import Seq2SeqObjective, Seq2SeqSettings
from graftlm.tasks.base import spread
from graftlm.tasks.dataset import Converted, counted, kept, to_texts
from graftlm.tasks.measurement import MOST_ANSWERS, SHORT_ANSWER, scores_wanted
from graftlm.tasks.records import RecordTask
from graftlm.tasks.sft import ROWS_DURING_TRAINING
from graftlm.training.defaults import room_beside
from graftlm.training.interfaces import Evaluate, HeldOut, StopAsked

SHORT_ANSWERS_BY = ("chrf", "character_error_rate")
"""What short answers are judged by where nobody chose; neither needs a package."""


class Seq2SeqTask(RecordTask[Example, Pair, Batch]):
    """Cross-entropy of targets, written by the decoder to what the encoder reads."""

    name = "seq2seq"
    keeps_known_text = False
    unpacked = "an encoder-decoder reads one row at a time; rows of like length go together"

    @property
    def settings(self) -> Seq2SeqSettings:
        """What the recipe says of the task."""
        settings = self.recipe.task.settings
        assert isinstance(settings, Seq2SeqSettings)
        return settings

    def convert(
        self, rows: Sequence[Mapping[str, Any]], format: str, numbers: Sequence[int], source: str
    ) -> Converted[Example]:
        return to_texts(rows, format, numbers, source)

    def require_base(self, model: nn.Module) -> None:
        require_encoder_decoder(model)
        self._model = model
        room = room_beside(self.recipe.method.config, context_length(model))
        longest = self.settings.max_target_length
        if room is not None and longest is not None and longest > room:
            raise ConfigError(
                f"task.max_target_length is {longest}; the decoder of this base has room for {room} tokens.",
                meaning="Positions beyond the context were never trained.",
                fix=f"Set task.max_target_length to at most {room}.",
            )

    def batches(self, tokenizer: Any) -> PairBatches:
        train = self.recipe.train
        size = train.per_device_train_batch_size
        return PairBatches(
            self.dataset.train,
            rows_per_batch=size,
            rows_per_step=size * train.gradient_accumulation_steps,
            seed=train.seed,
            pad_token_id=tokenizer.pad_token_id,
        )

    def objective(self, model: nn.Module) -> Seq2SeqObjective:
        rows = self.dataset.train
        shape = max(len(row.source) for row in rows), max(len(row.target) for row in rows)
        return Seq2SeqObjective(model, label_smoothing=self.settings.label_smoothing, shape=shape)

    def held_out_loss(self, model: nn.Module) -> Evaluate:
        return PairLoss(model, self.dataset.held_out)

    def measure(
        self, model: nn.Module, tokenizer: Any, *, name: str, progress: Progress, stop: StopFlag
    ) -> Evaluation:
        rows = self.dataset.held_out
        asked, measures = self._answers_wanted()
        found = evaluate_pairs(
            model, tokenizer, rows, Asking(asked, self.settings.num_beams),
            name=name, progress=progress, should_stop=stop,
        )  # fmt: skip
        return with_scores(found, measures)

    def probes(self, count: int) -> list[list[int]]:
        return [list(row.decoder) for row in spread(self.dataset.held_out, count)]

    def encoded(self, records: Sequence[Example], tokenizer: Any, part: str) -> tuple[Pair, ...]:
        data, settings = self.recipe.data, self.settings
        longest = settings.max_target_length or data.max_length
        limits = Limits(data.max_length, longest, settings.source_prefix)
        found = encode_pairs(records, tokenizer, limits, lambda target: decoder_ids(self._model, target))
        several = sum(sum(turn.trained for turn in example.turns) > 1 for example in records)
        if several:
            notice(f"{counted(several, part)} with several answers: the last is learnt, the others are read.")
        return kept(found.rows, found.problems, data, part)

    def _answers_wanted(self) -> tuple[list[int], tuple[str, ...]]:
        """Which rows are answered, and what answers are judged by."""
        rows, named, scores = self.dataset.held_out, self.recipe.eval.metrics, scores_wanted(self.recipe)
        if named != "auto":
            return (list(range(len(rows))) if scores or "exact_match" in named else []), scores
        if statistics.median(row.target_tokens for row in rows) > SHORT_ANSWER:
            return [], ()
        most = min(len(rows), MOST_ANSWERS)
        return [place * len(rows) // most for place in range(most)], SHORT_ANSWERS_BY

    def prepare(self) -> None:
        data = self.recipe.data
        require_packages(scores_wanted(self.recipe))
        if data.template == "chat" or data.train_on == "all":
            key, value = ("template", "chat") if data.template == "chat" else ("train_on", "all")
            raise ConfigError(
                f"data.{key}: {value} has no effect on task seq2seq.",
                meaning="The encoder reads the source as it is, and the whole target is learnt.",
                fix="Leave it out.",
            )


class PairLoss:
    """The loss on held-out pairs while training; at most `ROWS_DURING_TRAINING` of them, evenly spread."""

    def __init__(self, model: nn.Module, rows: Sequence[Pair]) -> None:
        stride = -(-len(rows) // ROWS_DURING_TRAINING)
        self.model, self.rows = model, list(rows)[::stride]

    def __call__(self, stop: StopAsked) -> HeldOut | None:
        found = pair_losses(self.model, self.rows, should_stop=stop)
        if not found.complete:
            return None
        tokens = sum(row.tokens for row in found.rows)
        loss = sum(row.loss_sum for row in found.rows) / tokens
        return HeldOut(loss, tokens, len(found.rows), metrics={"perplexity": math.exp(min(loss, 700.0))})
