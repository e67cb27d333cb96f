"""Several adapters learnt in one run, one for each task, or one that all tasks share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from graftlm.models.generate import StopFlag
from graftlm.models.siblings import Siblings, path_of
from graftlm.objectives.multi import MultiObjective, Side
from graftlm.tasks.mixture import Mixture
from graftlm.tasks.multi import MultiTask
from graftlm.training.recipe import Recipe
from graftlm.training.timeline import Timeline
from graftlm.verbs.learner import Learner, attach_learner
from graftlm.verbs.plan import Plan
from graftlm.verbs.proof import Proof

BEGUN = "tasks"
"""Folder of a run in which each task keeps what it has to know before the first step."""


@dataclass(frozen=True)
class JointPlan(Plan):
    """The plan of a run of several tasks: what holds for all, and the plan of each."""

    parts: Mapping[str, Plan]


@dataclass(frozen=True)
class Learners:
    """The adapters of a run of several tasks, by the names of the tasks."""

    parts: Mapping[str, Learner]
    model: Siblings
    batches: Mixture
    objective: MultiObjective
    plan: JointPlan

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name; what tasks share, by its name in the first of them."""
        found: dict[nn.Parameter, str] = {}
        for name, part in self.parts.items():
            for key, parameter in part.parameters.items():
                found.setdefault(parameter, f"{path_of(name)}.{key}")
        return {key: parameter for parameter, key in found.items()}

    @property
    def output_side(self) -> list[str]:
        """The names of the parameters that LoRA+ trains faster."""
        return [f"{path_of(name)}.{key}" for name, part in self.parts.items() for key in part.output_side]

    @property
    def rate_scales(self) -> dict[str, float]:
        """What the learning rate of a parameter is multiplied by: its task may have one of its own."""
        rate = self.plan.learning_rate
        return {
            f"{path_of(name)}.{key}": part.rate_scales.get(key, 1.0) * part.plan.learning_rate / rate
            for name, part in self.parts.items()
            for key in part.parameters
        }

    @property
    def lines(self) -> list[str]:
        """What is said before the first step."""
        each = [
            f"{name}: {line}" for name, part in self.parts.items() for line in (_settings(part), *part.lines)
        ]
        return [self.plan.summary, *each]

    def begin(self, run: Path, stop: StopFlag) -> None:
        """What the tasks have to know before the first step; kept in folders of their own in `run`."""
        for name, part in self.parts.items():
            folder = run / BEGUN / name
            folder.mkdir(parents=True, exist_ok=True)
            part.begin(folder, stop)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, steps run as decided."""
        with ExitStack() as stack:
            for part in self.parts.values():
                stack.enter_context(part.in_use())
            yield

    def save(self, folder: Path) -> None:
        """Each adapter in a folder of its task's name."""
        for name, part in self.parts.items():
            part.save(folder / name)

    def prove(self, folder: Path) -> Proof:
        """The worst of what was found of each adapter."""
        found = {name: part.prove(folder / name) for name, part in self.parts.items()}
        merges = [proof.merge for proof in found.values() if proof.merge is not None]
        refused = [f"{name}: {proof.why_unmerged}" for name, proof in found.items() if proof.why_unmerged]
        return Proof(
            is_reload_exact=all(proof.is_reload_exact for proof in found.values()),
            merge=max(merges, key=lambda merge: (not merge.is_same_model, merge.mean_kl), default=None),
            is_unmerge_exact=all(proof.is_unmerge_exact for proof in found.values()),
            why_unmerged="; ".join(refused),
            merged_into=next(iter(found.values())).merged_into,
        )


def _settings(part: Learner) -> str:
    train = part.task.recipe.train
    return f"learning rate {train.learning_rate:.1e}, {train.per_device_train_batch_size} rows at a time"


def attach_learners(task: MultiTask, tokenizer: Any, recipe: Recipe, plan_file: Path) -> Learners:
    """Attach the adapter of every task to that task's model, each as in a run of its own.

    Raises:
        As `attach_learner`.
    """
    parts: dict[str, Learner] = {}
    for name, part in task.parts.items():
        shared = next(iter(parts.values())).adapters if parts and task.is_shared else None
        parts[name] = attach_learner(
            part, task.models[name], tokenizer, part.recipe, plan_file, part=name, shared=shared
        )
    sides = {name: Side(part.model, part.objective, task.weights[name]) for name, part in parts.items()}
    batches = task.mixture({name: part.batches for name, part in parts.items()})
    total = Timeline(batches, recipe.train.gradient_accumulation_steps).total_steps(recipe.train)
    for name, steps in batches.taken(total).items():
        parts[name] = replace(parts[name], plan=replace(parts[name].plan, steps=steps))
    found = Learners(parts, Siblings(task.models), batches, MultiObjective(sides), _no_plan(parts))
    return replace(found, plan=_plan(task, found, total))


def _no_plan(parts: Mapping[str, Learner]) -> JointPlan:
    plans = {name: part.plan for name, part in parts.items()}
    first = next(iter(plans.values()))
    return JointPlan(**{field.name: getattr(first, field.name) for field in fields(Plan)}, parts=plans)


def _plan(task: MultiTask, found: Learners, steps: int) -> JointPlan:
    """What holds for the whole run."""
    plans = found.plan.parts
    first = next(iter(plans.values()))
    trainable = sum(parameter.numel() for parameter in found.parameters.values())
    methods = dict.fromkeys(plan.method for plan in plans.values())
    paths = dict.fromkeys(plan.loss_path for plan in plans.values())
    return replace(
        found.plan,
        task=task.name,
        method=" and ".join(methods),
        trainable=trainable,
        total=first.total - first.trainable + trainable,
        sites=tuple(group for plan in plans.values() for group in plan.sites),
        train_rows=len(task.dataset.train),
        held_out_rows=len(task.dataset.held_out),
        train_tokens=task.dataset.train_tokens,
        windows_filled=round(found.batches.packing_rate(), 4),
        steps=steps,
        learning_rate=task.recipe.train.learning_rate,
        loss_path="; ".join(paths),
        loss_path_why="; ".join(f"{name}: {plan.loss_path_why}" for name, plan in plans.items()),
        activation_bytes=max(plan.activation_bytes for plan in plans.values()),
    )
