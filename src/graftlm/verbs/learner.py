"""A task on a model with its adapter attached, and how its steps are taken: what a run trains."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from graftlm.core.files import remove_stale
from graftlm.core.seeding import seed_everything
from graftlm.formats.layout import CONFIG
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.copies import FullCopy
from graftlm.models.generate import StopFlag
from graftlm.models.heads import head_modules
from graftlm.objectives.base import Objective
from graftlm.tasks.base import Task, TaskBatches
from graftlm.training.recipe import Recipe
from graftlm.verbs.acceleration import accelerated
from graftlm.verbs.plan import Plan, make_plan
from graftlm.verbs.proof import Proof, prove
from graftlm.verbs.recompute import policy_of_plan
from graftlm.verbs.start import attach_started
from graftlm.verbs.step_setup import StepSetup, step_setup

NAME = "default"
PROBES = 8


@dataclass(frozen=True)
class Learner:
    """One adapter of a run. A run has one, or one for each of several tasks."""

    task: Task[Any]
    model: nn.Module
    adapters: AdapterSet
    batches: TaskBatches[Any]
    setup: StepSetup
    plan: Plan

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {**self.adapters.named_parameters(NAME), **self.task.own_parameters(self.model)}

    @property
    def output_side(self) -> list[str]:
        """The names of the parameters that LoRA+ trains faster."""
        parts = self.adapters.parts(NAME)
        return [f"{path}.{key}" for path, part in parts.items() for key in part.output_side]

    @property
    def rate_scales(self) -> dict[str, float]:
        """What the learning rate of a parameter is multiplied by, where it is not 1: a head that starts from
        random weights is trained at LoRA's rate, whatever the method wants for itself."""
        own = self.task.method(self.model).rate_scale
        heads = tuple(f"{path}." for path in head_modules(self.model))
        return {name: 1 / own for name in self.parameters if own != 1 and name.startswith(heads)}

    @property
    def objective(self) -> Objective[Any]:
        """The loss."""
        return self.setup.objective

    @property
    def lines(self) -> list[str]:
        """What is said before the first step."""
        plan = self.plan
        recorded = ["micro-batches recorded and played again"] if plan.acceleration.recorded.records else []
        return [
            plan.summary,
            f"recomputed in backward: {plan.recompute} ({plan.recompute_why})",
            f"layers {plan.acceleration.compile.text}",
            *recorded,
        ]

    def begin(self, run: Path, stop: StopFlag) -> None:
        """What the task has to know before the first step; kept in the folder `run`."""
        self.task.begin(self.model, self.adapters, run, stop)

    def in_use(self) -> AbstractContextManager[None]:
        """Inside, steps run as decided."""
        return self.setup.in_use()

    def save(self, folder: Path) -> None:
        """The config is written last: an adapter without it was cut short by a kill, and is written again."""
        remove_stale(folder)
        if not (folder / CONFIG).is_file():
            self.adapters.save(folder, NAME)

    def prove(self, folder: Path) -> Proof:
        """Compare the adapter with its file in `folder`, and with a merge."""
        return prove(self.model, self.adapters, folder, self.task.probes(PROBES))


def attach_learner(
    task: Task[Any],
    model: nn.Module,
    tokenizer: Any,
    recipe: Recipe,
    plan_file: Path,
    *,
    part: str | None = None,
    shared: AdapterSet | None = None,
) -> Learner:
    """Attach the adapter of the recipe at its start, and settle how its steps are taken.

    Args:
        plan_file: the plan of a run that goes on: what it recomputes, it goes on recomputing.
        part: the name of the task in that plan, where there are several.
        shared: an adapter on a model over the same weights, whose parameters this one shares.

    Raises:
        TargetError, ConfigError: the recipe does not fit the model; TrainingError: see `accelerated`.
    """
    seed_everything(recipe.train.seed)  # the adapter's start is random, and belongs to the recipe
    batches = task.batches(tokenizer)
    adapters = attach_started(model, task.method(model), NAME, batches)
    if shared is not None:
        share(shared, adapters)
    begun = policy_of_plan(plan_file, part)
    objective = task.objective(model)
    setup = step_setup(model, objective, recipe, tokens=batches.most_tokens, started_with=begun)
    trained, (_, total) = adapters.named_parameters(NAME), adapters.count_parameters()
    setup, acceleration = accelerated(setup, recipe, batches, trained, total)
    plan = make_plan(
        recipe,
        model,
        adapters,
        task.dataset,
        batches,
        objective,
        setup.recompute,
        setup.fusable,
        acceleration,
        task,
    )
    return Learner(task, model, adapters, batches, setup, plan)


def share(first: AdapterSet, other: AdapterSet) -> None:
    """Give an adapter the parameters of the first, but for what its model has of its own: its head."""
    theirs = first.parts(NAME)
    for path, part in other.parts(NAME).items():
        if path not in theirs or isinstance(part, FullCopy):
            continue
        for name, parameter in list(part.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            shared = theirs[path].get_parameter(name)
            if shared.shape == parameter.shape:
                setattr(part.get_submodule(owner), leaf, shared)
