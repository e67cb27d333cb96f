"""How a candidate runs on a machine: the batch and the recomputation that fit, the quickest of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from graftlm.models.recompute.policy import POLICIES, Policy
from graftlm.planning.base_facts import BaseFacts
from graftlm.planning.estimates import MemoryEstimate, Part, Phase, TimeEstimate
from graftlm.planning.kept_estimates import kept_memory
from graftlm.planning.machine import Machine
from graftlm.planning.option import Fit
from graftlm.planning.requirements import Requirements
from graftlm.planning.rows import RowLengths
from graftlm.planning.speed import estimate_time, stored_bytes
from graftlm.planning.workload import Workload
from graftlm.planning.written import is_written
from graftlm.training.recipe import Recipe

USABLE = 0.95
"""Share of the memory that a prediction may take: the worst errors measured are larger, most are far
smaller."""


@dataclass(frozen=True)
class Estimators:
    """Where predictions come from; a history of runs puts its corrections here."""

    memory: Callable[..., MemoryEstimate] = kept_memory
    """As `planning.memory.estimate_memory`."""
    time: Callable[..., TimeEstimate] = estimate_time
    """As `planning.speed.estimate_time`."""


@dataclass(frozen=True)
class Situation:
    """What every candidate of one plan runs on."""

    facts: BaseFacts
    rows: RowLengths
    machine: Machine
    requirements: Requirements
    estimators: Estimators

    @property
    def room(self) -> int:
        """Bytes that a run may be predicted to take."""
        return round(USABLE * self.machine.memory_bytes)

    @property
    def policies(self) -> tuple[Policy, ...]:
        """Ways to recompute that the device has."""
        return tuple(each for each in POLICIES if each != "offload" or self.machine.device == "cuda")

    def memory(self, effective: Recipe, workload: Workload, policy: str) -> MemoryEstimate:
        """Of one run."""
        return self.estimators.memory(effective, self.facts, workload, self.machine, recompute=policy)

    def time(self, effective: Recipe, workload: Workload, policy: str) -> TimeEstimate:
        """Likewise."""
        return self.estimators.time(effective, self.facts, workload, self.machine, recompute=policy)


@dataclass(frozen=True)
class TooLarge:
    """No way to run a candidate fits; the one that takes the least."""

    effective: Recipe
    memory: MemoryEstimate


def fitted_run(recipe: Recipe, situation: Situation, trainable: int) -> Fit | TooLarge:
    """The quickest way to run a recipe in the memory of the machine, at the same number of rows per step.

    What weights and optimizer alone do not leave room for is not looked at further. Ways are tried in the
    order of their time. Where one is too large, so are those with as many rows at a time
    and as little recomputation: they are passed over.

    Args:
        trainable: parameters that are trained.

    Raises:
        GraftError: this base cannot be trained so.
    """
    usual = situation.rows.effective(recipe, situation.facts)
    state = _state(recipe, situation, trainable)
    if state.peak > situation.room:
        return TooLarge(usual, state)
    first, *others = _ways(recipe, usual, situation)
    ways = [first, *sorted(others, key=lambda way: way.seconds)]  # where nothing has to change, nothing does
    least = max(ways, key=lambda way: (-way.rows, situation.policies.index(way.policy)))
    smallest: TooLarge | None = None
    failed: list[_Way] = []
    for way in ways:
        if any(way.is_larger_than(other, situation) for other in failed):
            continue
        memory = situation.memory(way.effective, way.workload, way.policy)
        if memory.peak <= situation.room:
            return Fit(way.effective, way.workload, way.policy, memory, way.time)
        failed.append(way)
        if smallest is None:  # whether any way fits, before the others are tried
            memory = situation.memory(least.effective, least.workload, least.policy)
            smallest = TooLarge(least.effective, memory)
            if memory.peak > situation.room:
                return smallest
    assert smallest is not None
    return smallest


def _state(recipe: Recipe, situation: Situation, trainable: int) -> MemoryEstimate:
    """What every way to run a recipe holds: weights, and of what is trained value, gradient and two
    moments."""
    machine, placement = situation.machine, recipe.model.placement
    weights = stored_bytes(situation.facts, recipe.model.quantization) if placement == "resident" else 0.0
    moments = 2 if "8bit" in recipe.train.optim else 8
    parts = (Part("libraries", machine.idle_bytes), Part("weights", weights), Part("trained", 4 * trainable),
             Part("gradients", 4 * trainable), Part("optimizer state", moments * trainable))  # fmt: skip
    return MemoryEstimate((Phase("update", parts),))


@dataclass(frozen=True)
class _Way:
    """One batch size with one policy."""

    effective: Recipe
    workload: Workload
    policy: Policy
    time: TimeEstimate

    @property
    def seconds(self) -> float:
        return self.time.seconds

    @property
    def rows(self) -> int:
        return self.effective.train.per_device_train_batch_size

    def is_larger_than(self, other: _Way, situation: Situation) -> bool:
        """Whether it keeps as much as the other at the least."""
        order = situation.policies
        return self.rows >= other.rows and order.index(self.policy) <= order.index(other.policy)


def _ways(recipe: Recipe, usual: Recipe, situation: Situation) -> Iterator[_Way]:
    asked = recipe.train.recompute
    policies = situation.policies if asked == "auto" else (asked,)
    for effective in smaller_batches(recipe, usual):
        workload = situation.rows.workload(effective)
        for policy in policies:
            yield _Way(effective, workload, policy, situation.time(effective, workload, policy))


def smaller_batches(recipe: Recipe, effective: Recipe) -> Iterator[Recipe]:
    """The effective recipe, and unless the batch was written, those with fewer rows at a time and as many
    rows per optimizer step: the same numbers up to rounding."""
    yield effective
    if any(is_written(recipe, f"train.{name}") for name in BATCH):
        return
    size, passes = (getattr(effective.train, name) for name in BATCH)
    rows = size * passes
    while size > 1:
        size = next(fewer for fewer in range(size // 2, 0, -1) if rows % fewer == 0)
        train = effective.train.model_copy(update=dict(zip(BATCH, (size, rows // size), strict=True)))
        yield effective.model_copy(update={"train": train})


BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
