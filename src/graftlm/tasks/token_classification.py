"""Token classification: a new head tells the tag of every word, such as the names in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from graftlm.core.errors import DataError
from graftlm.data.batches import Batch
from graftlm.data.labels.encode import TaggedRow, collate_tagged, encode_tagged
from graftlm.data.labels.reader import TagReader, balance
from graftlm.data.labels.records import Tagged
from graftlm.data.length_batches import LengthBatches
from graftlm.evaluation.labelled import evaluate_tagged
from graftlm.evaluation.runner import Evaluation
from graftlm.models.ending import Ending
from graftlm.models.generate import Progress, StopFlag
from graftlm.objectives.token_classification import TokenClassificationObjective, TokenClassificationSettings
from graftlm.tasks.classification import SHOWN, held_out, label_names, require_no_metrics
from graftlm.tasks.dataset import Converted, kept
from graftlm.tasks.heads import HeadTask
from graftlm.tasks.sft import ROWS_DURING_TRAINING
from graftlm.training.interfaces import Evaluate, HeldOut, StopAsked
from graftlm.training.recipe import Recipe
from graftlm.training.task_section import TaskChoice


class TokenClassificationTask(HeadTask[Tagged, TaggedRow, Batch]):
    """Cross-entropy of the tag of every word; head and adapter are trained, saved and served together."""

    name = "token_classification"
    unpacked = "rows of like length go together"

    @property
    def settings(self) -> TokenClassificationSettings:
        """What the recipe says of the task."""
        settings = self.recipe.task.settings
        assert isinstance(settings, TokenClassificationSettings)
        return settings

    def prepare(self) -> None:
        require_no_metrics(self.recipe)
        self._reader = TagReader(label_names(self.settings.labels))

    def convert(
        self, rows: Sequence[Mapping[str, Any]], format: str, numbers: Sequence[int], source: str
    ) -> Converted[Tagged]:
        return Converted(*self._reader(rows, format, numbers, source))

    def look(self) -> None:
        said = {tag for record in self.raw.train for tag in record.tags}
        if len(said) < 2:
            raise DataError(
                f"All words of {self.recipe.data.path} have the tag {min(said, default='')!r}.",
                meaning="From one class alone nothing can be learnt: the answer is always the same.",
                fix="Give rows with other tags, or name the column that holds them: "
                "--set 'data.format=words_tags(WORDS, TAGS)'",
            )

    def settled(self) -> Recipe:
        settings = self.settings.replace(labels=self._reader.labels)
        return super().settled().model_copy(update={"task": TaskChoice(self.name, settings)})

    @property
    def ending(self) -> Ending:
        return Ending("tokens", self._reader.labels, seed=self.recipe.train.seed)

    def encoded(self, records: Sequence[Tagged], tokenizer: Any, part: str) -> tuple[TaggedRow, ...]:
        data = self.recipe.data
        found, problems = encode_tagged(records, tokenizer, data.max_length, self._reader.labels)
        return kept(found, problems, data, part)

    def batches(self, tokenizer: Any) -> LengthBatches[TaggedRow, Batch]:
        train = self.recipe.train
        most = max(row.tokens for row in self.dataset.train)
        return LengthBatches(
            self.dataset.train,
            partial(collate_tagged, pad=self._pad, most=most),
            ids=lambda row: row.identity,
            rows_per_batch=train.per_device_train_batch_size,
            seed=train.seed,
        )

    def objective(self, model: nn.Module) -> TokenClassificationObjective:
        return TokenClassificationObjective(model, longest=max(row.tokens for row in self.dataset.train))

    def held_out_loss(self, model: nn.Module) -> Evaluate:
        return HeldOutTags(model, self.dataset.held_out, self._reader.labels, self._pad)

    def measure(
        self, model: nn.Module, tokenizer: Any, *, name: str, progress: Progress, stop: StopFlag
    ) -> Evaluation:
        return evaluate_tagged(
            model, self.dataset.held_out, self._reader.labels, name=name, pad=self._pad, progress=progress,
            should_stop=stop,
        )  # fmt: skip

    @property
    def facts(self) -> Sequence[tuple[str, str]]:
        counts = sorted(balance(self.raw.train, self._reader.labels).items(), key=lambda item: -item[1])
        total = max(1, sum(count for _, count in counts))
        shown = [(name, f"{count:,} words ({count / total:.1%})") for name, count in counts[:SHOWN]]
        return (("head", self._head), ("tags", f"{len(counts)}"), *shown)


class HeldOutTags:
    """Loss and main figures on held-out rows while training; of `ROWS_DURING_TRAINING` of them at most."""

    def __init__(self, model: nn.Module, rows: Sequence[TaggedRow], tags: Sequence[str], pad: int) -> None:
        stride = -(-len(rows) // ROWS_DURING_TRAINING)
        self.model, self.rows, self.tags, self.pad = model, list(rows)[::stride], tags, pad

    def __call__(self, stop: StopAsked) -> HeldOut | None:
        found = evaluate_tagged(self.model, self.rows, self.tags, name="", pad=self.pad, should_stop=stop)
        return held_out(found)
