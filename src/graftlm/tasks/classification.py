"""Classification and regression: a new head tells of a text, or of a pair of texts, which label it has,
which of several, or a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from graftlm.core.errors import ConfigError
from graftlm.core.notices import notice
from graftlm.data.labels.encode import LabelledBatch, LabelledRow, collate_labelled, encode_labelled
from graftlm.data.labels.reader import LabelReader, balance, contradictions, require_variety
from graftlm.data.labels.records import Labelled
from graftlm.data.labels.values import read_label_map
from graftlm.data.length_batches import LengthBatches
from graftlm.evaluation.labelled import MEASURES, Labels, evaluate_labelled
from graftlm.evaluation.measures import MEASURES as KNOWN
from graftlm.evaluation.runner import Evaluation
from graftlm.models.ending import Ending
from graftlm.models.generate import Progress, StopFlag
from graftlm.models.heads import PROBLEMS
from graftlm.objectives.classification import (
    ClassificationObjective,
    ClassificationSettings,
    require_matching,
)
from graftlm.tasks.dataset import Converted, counted, kept
from graftlm.tasks.heads import HeadTask
from graftlm.tasks.sft import ROWS_DURING_TRAINING
from graftlm.training.interfaces import Evaluate, HeldOut, StopAsked
from graftlm.training.recipe import Recipe
from graftlm.training.task_section import TaskChoice

RARE = 10
"""Rows of a class below which a notice says that there are few."""
SHOWN = 30
"""Labels whose counts a report lists."""


class ClassificationTask(HeadTask[Labelled, LabelledRow, LabelledBatch]):
    """The loss of what a head says of rows; head and adapter are trained, saved and served together."""

    name = "classification"
    unpacked = "a head tells of one row at a time; rows of like length go together"

    @property
    def settings(self) -> ClassificationSettings:
        """What the recipe says of the task."""
        settings = self.recipe.task.settings
        assert isinstance(settings, ClassificationSettings)
        return settings

    @property
    def labels(self) -> Labels:
        """What there is to tell; known once the data are read."""
        told = self._reader.told
        assert told is not None
        return Labels(self._reader.labels, told)

    def convert(
        self, rows: Sequence[Mapping[str, Any]], format: str, numbers: Sequence[int], source: str
    ) -> Converted[Labelled]:
        return Converted(*self._reader(rows, format, numbers, source))

    def look(self) -> None:
        self._require_sense()
        require_variety(self.raw.train, self.labels.told, self.recipe.data.path)
        self._say_doubts()

    def settled(self) -> Recipe:
        settings = self.settings.replace(labels=self.labels.names, problem_type=PROBLEMS[self.labels.told])
        return super().settled().model_copy(update={"task": TaskChoice(self.name, settings)})

    @property
    def ending(self) -> Ending:
        labels = self.labels
        names = ("number",) if labels.told == "number" else labels.names
        return Ending("rows", names, labels.told, self.recipe.train.seed)

    def encoded(self, records: Sequence[Labelled], tokenizer: Any, part: str) -> tuple[LabelledRow, ...]:
        data = self.recipe.data
        found, problems = encode_labelled(records, tokenizer, data.max_length, self.labels.names)
        return kept(found, problems, data, part)

    def batches(self, tokenizer: Any) -> LengthBatches[LabelledRow, LabelledBatch]:
        train = self.recipe.train
        most = max(row.tokens for row in self.dataset.train)
        return LengthBatches(
            self.dataset.train,
            partial(collate_labelled, pad=self._pad, most=most, told=self.labels.told),
            ids=lambda row: row.identity,
            rows_per_batch=train.per_device_train_batch_size,
            seed=train.seed,
        )

    def objective(self, model: nn.Module) -> ClassificationObjective:
        longest = max(row.tokens for row in self.dataset.train)
        smoothing = self.settings.label_smoothing
        return ClassificationObjective(model, self.labels.told, label_smoothing=smoothing, longest=longest)

    def held_out_loss(self, model: nn.Module) -> Evaluate:
        return HeldOutLabels(model, self.dataset.held_out, self.labels, self._pad)

    def measure(
        self, model: nn.Module, tokenizer: Any, *, name: str, progress: Progress, stop: StopFlag
    ) -> Evaluation:
        return evaluate_labelled(
            model, self.dataset.held_out, self.labels, name=name, pad=self._pad, progress=progress,
            should_stop=stop,
        )  # fmt: skip

    @property
    def facts(self) -> Sequence[tuple[str, str]]:
        labels = self.labels
        if labels.told == "number":
            numbers = [record.number for record in self.raw.train if record.number is not None]
            return (("head", self._head), ("range of the numbers", f"{min(numbers):g} to {max(numbers):g}"))
        counts = sorted(balance(self.raw.train, labels.names).items(), key=lambda item: -item[1])
        total = max(1, len(self.raw.train))
        shown = [(name, f"{count:,} training rows ({count / total:.1%})") for name, count in counts[:SHOWN]]
        rest = [("...", f"{len(counts) - SHOWN} more labels")] if len(counts) > SHOWN else []
        return (
            ("head", self._head),
            ("labels", f"{len(counts)}, {labels.told} a row: {self._reader.why}"),
            *shown,
            *rest,
        )

    def prepare(self) -> None:
        settings = self.settings
        problem = {theirs: told for told, theirs in PROBLEMS.items()}.get(settings.problem_type)
        self._reader = LabelReader(label_names(settings.labels), problem)
        self._require_sense()

    def _require_sense(self) -> None:
        if self._reader.told is not None:
            require_matching(self._reader.told, self.settings.label_smoothing)
        require_no_metrics(self.recipe)

    def _say_doubts(self) -> None:
        """What is no error, and costs accuracy."""
        twice = contradictions([*self.raw.train, *self.raw.held_out])
        if twice:
            notice(f"{counted(len(twice))} with a text that has another label elsewhere: {twice[0]}")
        few = [name for name, count in balance(self.raw.train, self.labels.names).items() if count < RARE]
        if few and self.labels.told != "number":
            shown = ", ".join(few[:5]) + (" ..." if len(few) > 5 else "")
            count = f"{len(few)} of {len(self.labels.names)} labels"
            notice(f"{count} have fewer than {RARE} training rows: {shown}.")


class HeldOutLabels:
    """Loss and main figures on held-out rows while training; of `ROWS_DURING_TRAINING` of them at most."""

    def __init__(self, model: nn.Module, rows: Sequence[LabelledRow], labels: Labels, pad: int) -> None:
        stride = -(-len(rows) // ROWS_DURING_TRAINING)
        self.model, self.rows, self.labels, self.pad = model, list(rows)[::stride], labels, pad

    def __call__(self, stop: StopAsked) -> HeldOut | None:
        found = evaluate_labelled(self.model, self.rows, self.labels, name="", pad=self.pad, should_stop=stop)
        return held_out(found)


def held_out(found: Evaluation) -> HeldOut | None:
    """Of a whole evaluation; None of one that was stopped."""
    if not found.complete:
        return None
    figures = {name: KNOWN[name].value(found.rows) for name in found.measures[:2]}
    return HeldOut(found.loss, found.tokens, len(found.rows), metrics=figures)


def label_names(given: Sequence[str]) -> tuple[str, ...]:
    """The labels that a recipe names, itself or by a file.

    Raises:
        DataError: the file does not hold them; ConfigError: a name comes twice.
    """
    names = read_label_map(Path(given[0])) if len(given) == 1 else tuple(given)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"task.labels names {twice!r} more than once.", fix="Name every label once.")
    return names


def require_no_metrics(recipe: Recipe) -> None:
    """Refuse measures of text.

    Raises:
        ConfigError: `eval.metrics` names some.
    """
    if recipe.eval.metrics != "auto":
        measures = ", ".join(name for names in MEASURES.values() for name in names)
        raise ConfigError(
            f"eval.metrics has no effect on task {recipe.task.type}.",
            meaning=f"Labels are measured by what fits them: {measures}.",
            fix="Leave it at auto.",
        )
