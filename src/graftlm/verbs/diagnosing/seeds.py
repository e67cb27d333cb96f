"""Short trainings that differ in their seed alone: what a method does to a run by chance."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from graftlm.core.progress import progress
from graftlm.diagnosis.facts.behaviour import SeedProbe
from graftlm.methods.prefix import PrefixTuningConfig
from graftlm.methods.prompt import PromptTuningConfig
from graftlm.models.generate import context_length
from graftlm.tasks.base import Task
from graftlm.tasks.multi import MultiTask
from graftlm.tasks.table import task_of
from graftlm.training.defaults import fitted_length, room_beside
from graftlm.training.loop import train
from graftlm.training.recipe import Recipe
from graftlm.verbs.diagnosing.loaded import Loaded
from graftlm.verbs.diagnosing.subject import Subject
from graftlm.verbs.learner import attach_learner

SEEDS = (1, 2, 3)
STEPS = 20


def seed_probe(loaded: Loaded, subject: Subject) -> SeedProbe | None:
    """Held-out losses of short runs of a recipe that trains virtual tokens; None of any other run.

    The adapters that are attached are taken away; nothing is written into the run's folder.
    """
    recipe = subject.recipe()
    if recipe is None or not isinstance(recipe.method.config, PrefixTuningConfig | PromptTuningConfig):
        return None
    task = task_of(recipe)
    if isinstance(task, MultiTask):
        return None
    loaded.adapters.detach()
    task.read()
    context = context_length(loaded.model)
    task.recipe = fitted_length(recipe, room_beside(recipe.method.config, context))
    task.encode(loaded.tokenizer)
    steps = min(STEPS, recipe.train.max_steps or STEPS)
    losses = []
    with progress("training from other seeds") as tick:
        for number, seed in enumerate(SEEDS, start=1):
            changes = {"seed": seed, "max_steps": steps, "eval_steps": steps, "save_steps": steps}
            short = task.recipe.model_copy(update={"train": task.recipe.train.replace(**changes)})
            losses.append(_trained(task, loaded, short))
            tick(number, len(SEEDS))
    return SeedProbe(steps, tuple(losses))


def _trained(task: Task[Any], loaded: Loaded, recipe: Recipe) -> float:
    """The held-out loss at the end of a run of this recipe."""
    task.recipe = recipe
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        learner = attach_learner(task, loaded.model, loaded.tokenizer, recipe, run / "plan.json")
        evaluate = task.held_out_loss(loaded.model)
        with learner.in_use():
            learner.begin(run, lambda: False)
            train(
                learner.model,
                learner.objective,
                learner.batches,
                learner.parameters,
                recipe.train,
                run=run,
                lora_b=learner.output_side,
                scales=learner.rate_scales,
            )
            found = evaluate(lambda: False)
    learner.adapters.detach()
    assert found is not None
    return found.loss
