"""The rows of a run by their lengths: what a workload is counted from, for every batch size that is tried."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from functools import cached_property

from graftlm.data.batches import WIDTH_STEP
from graftlm.data.packing import best_fit
from graftlm.planning.base_facts import BaseFacts
from graftlm.planning.workload import Workload
from graftlm.training.defaults import fitted, fitted_length, room_beside
from graftlm.training.recipe import Recipe

_SEED = 0
"""Of the order in which rows meet in padded batches: another order gives nearly the same widths."""


@dataclass(frozen=True)
class RowLengths:
    """Tokens of every row, counted by a task or estimated.

    >>> rows = RowLengths((30, 50, 20), (10, 20, 5), (40,))
    >>> rows.tokens, round(rows.target_share, 2)
    (100, 0.35)
    """

    train: tuple[int, ...]
    targets: tuple[int, ...]
    """Tokens of each training row that carry a label."""
    held_out: tuple[int, ...]
    rate_scale: float = 1.0
    """The task's, as `tasks.base.Task.rate_scale`."""
    longest_answer: int = 0
    """Labelled tokens of the longest held-out row that has a prompt; 0 where there is none."""
    is_counted: bool = True
    """False where they were estimated from characters."""
    _orders: dict[tuple[int, bool], tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)
    """Rows or windows in the order in which they meet, by length and packing: planned once."""

    @property
    def tokens(self) -> int:
        """Of one epoch."""
        return sum(self.train)

    @property
    def target_share(self) -> float:
        """Share of them that carries a label."""
        return sum(self.targets) / max(1, self.tokens)

    def effective(self, recipe: Recipe, facts: BaseFacts) -> Recipe:
        """The recipe with what a run fills in for this base and these rows: length, batch and rate.

        Raises:
            ConfigError: `data.max_length` was written and does not fit the base's context.
        """
        room = room_beside(recipe.method.config, facts.context or None)
        recipe = fitted_length(recipe, room)
        lengths = self.cut(recipe.data.max_length).train
        return fitted(recipe, lengths, facts.hidden_size, self.rate_scale)[0]

    def cut(self, most: int) -> RowLengths:
        """The rows with at most so many tokens each; labels are lost in proportion."""
        if max((*self.train, *self.held_out), default=0) <= most:
            return self
        train = tuple(min(length, most) for length in self.train)
        kept = [short / max(1, length) for short, length in zip(train, self.train, strict=True)]
        targets = tuple(round(n * part) for n, part in zip(self.targets, kept, strict=True))
        return replace(
            self,
            train=train,
            targets=targets,
            held_out=tuple(min(n, most) for n in self.held_out),
            _orders={},
        )

    def workload(self, effective: Recipe) -> Workload:
        """What a run of an effective recipe computes on, before the positions that a method adds."""
        data, train = effective.data, effective.train
        rows, passes = self.cut(data.max_length), train.gradient_accumulation_steps
        widths = self._widths(effective)
        per_epoch = math.ceil(len(widths) / passes)
        epochs = train.num_train_epochs
        steps = train.max_steps or int(epochs) * per_epoch + math.ceil(epochs % 1 * per_epoch)
        longest = max(rows.train, default=1)
        most = train.per_device_train_batch_size * (data.max_length if data.packing else longest)
        return Workload(
            train_rows=len(rows.train),
            held_out_rows=len(rows.held_out),
            train_tokens=rows.tokens,
            target_share=rows.target_share,
            held_out_tokens=sum(rows.held_out),
            mean_row_tokens=rows.tokens / max(1, len(rows.train)),
            batch_tokens=min(most, max(widths)),
            mean_batch_tokens=sum(widths) / len(widths),
            mean_document=rows._mean_document,
            micro_batches=passes,
            steps=steps,
            eval_steps=train.eval_steps,
            save_steps=train.save_steps,
            is_counted=self.is_counted,
            mean_micro_batches=len(widths) / per_epoch,
            mean_step_tokens=rows.tokens / per_epoch,
        )

    @cached_property
    def _mean_document(self) -> float:
        return sum(length * length for length in self.train) / max(1, self.tokens)

    def _widths(self, effective: Recipe) -> list[int]:
        """Tokens of every micro-batch of an epoch, padding included."""
        size, most = effective.train.per_device_train_batch_size, effective.data.max_length
        order = self._order(most, is_packed=effective.data.packing)
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        if effective.data.packing:
            return [len(group) * min(-(-max(group) // WIDTH_STEP) * WIDTH_STEP, most) for group in groups]
        return [len(group) * max(group) for group in groups]

    def _order(self, most: int, *, is_packed: bool) -> tuple[int, ...]:
        """Lengths of the rows, or how far each window is filled."""
        if (most, is_packed) not in self._orders:
            lengths = list(self.cut(most).train)
            if is_packed:
                windows = best_fit(lengths, range(len(lengths)), most)
                lengths = [sum(lengths[row] for row in window) for window in windows]
            random.Random(_SEED).shuffle(lengths)
            self._orders[most, is_packed] = tuple(lengths)
        return self._orders[most, is_packed]
