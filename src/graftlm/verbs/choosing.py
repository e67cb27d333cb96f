"""What `graft tune` takes from a plan: nothing where the recipe fits as it is, else the first that does."""

from __future__ import annotations

from typing import Any

from graftlm.core.errors import ConfigError, GraftError
from graftlm.core.notices import notice
from graftlm.core.progress import progress, say
from graftlm.methods.full import FullConfig
from graftlm.planning.amounts import in_gib
from graftlm.planning.base_facts import BaseFacts, base_facts
from graftlm.planning.choice import choose
from graftlm.planning.fitting import BATCH, Estimators, Situation
from graftlm.planning.hardware import this_machine
from graftlm.planning.machine import Machine
from graftlm.planning.option import Choice
from graftlm.planning.requirements import Requirements
from graftlm.planning.written import changed
from graftlm.tasks.base import Task
from graftlm.training.defaults import TOKENS_PER_PASS
from graftlm.training.recipe import Recipe
from graftlm.verbs.row_lengths import row_lengths

ROOMY = 0.5
"""Share of the memory below which a generous bound needs no plan."""
IN_DOUBT = 1.15
"""Predictions may be wrong by so much: what was written runs up to there, and is refused beyond."""
_BYTES = {"adapter": 6, "whole": 24}
"""A generous bound of bytes per parameter of the base: stored in 32 bits, or with copy, gradients and
moments."""
_ACTIVATIONS, _LOGITS = 120, 12
"""Likewise per token and hidden value of a layer, and per token and word of the vocabulary."""


def settled_by_plan(
    task: Task[Any],
    recipe: Recipe,
    *,
    machine: Machine | None = None,
    estimators: Estimators | None = None,
) -> Recipe:
    """The recipe of a new run with what nobody wrote chosen so that it fits this machine.

    `task` has read its data; nothing of the base is loaded. Where a recipe fits as it is, it stays as it is.

    Args:
        machine: where it will run, if not here.
        estimators: where predictions come from, if not from the models of memory and time alone.

    Raises:
        ConfigError: no way to run the recipe fits, with what would.
    """
    try:
        facts = base_facts(recipe.model.name, task.ending)
    except GraftError as error:  # loading says what is wrong with a base; a plan is not needed for that
        notice(f"Not planned: {error.seen}")
        return recipe
    machine = machine or this_machine(calibrate=False)
    if is_roomy(recipe, facts, machine):
        return recipe
    rows, settled = row_lengths(task, recipe, facts)
    estimators = estimators or Estimators()
    situation = Situation(facts, rows, machine, Requirements(), estimators)
    if _fits(settled, situation):
        return recipe
    with progress("choosing what fits") as tick:
        choice = choose(settled, Requirements(), facts, rows, machine, estimators=estimators, progress=tick)
    if choice.best is None:
        _refuse_or_warn(recipe, choice)
        return recipe
    return _taken(recipe, choice)


def is_roomy(recipe: Recipe, facts: BaseFacts, machine: Machine) -> bool:
    """Whether a generous bound of what a recipe takes leaves so much room that nothing has to be
    predicted."""
    config, train = recipe.method.config, recipe.train
    kind = "whole" if isinstance(config, FullConfig) and config.parts == "all" else "adapter"
    is_written = BATCH[0] in train.model_fields_set
    written = train.per_device_train_batch_size * recipe.data.max_length if is_written else 0
    tokens = max(written, TOKENS_PER_PASS, recipe.data.max_length)
    activations = tokens * (facts.layers * facts.hidden_size * _ACTIVATIONS + facts.vocabulary * _LOGITS)
    bound = machine.idle_bytes + facts.total * _BYTES[kind] + activations
    return bound <= ROOMY * machine.memory_bytes


def _fits(recipe: Recipe, situation: Situation) -> bool:
    """Whether the recipe runs as it would without a plan, with whatever recomputation the run then
    chooses."""
    effective = situation.rows.effective(recipe, situation.facts)
    workload = situation.rows.workload(effective)
    asked = recipe.train.recompute
    policies = situation.policies if asked == "auto" else (asked,)
    return any(situation.memory(effective, workload, policy).peak <= situation.room for policy in policies)


def _taken(recipe: Recipe, choice: Choice) -> Recipe:
    """The best option, said with its reasons; its batch is written down where it is not what a run fills
    in."""
    best = choice.best
    assert best is not None
    changes = {section: dict(fields) for section, fields in best.candidate.changes.items()}
    train = best.fit.effective.train
    if not any(name in recipe.train.model_fields_set for name in BATCH):
        changes["train"] = {**changes.get("train", {}), **{name: getattr(train, name) for name in BATCH}}
    say(f"Plan   {best.label}: the first of {len(choice.options)} options that fit this machine")
    for reason in best.reasons:
        say(f"       {reason}")
    return changed(recipe, changes)


def _refuse_or_warn(recipe: Recipe, choice: Choice) -> None:
    machine = choice.machine
    needs = [item.needed_bytes for item in choice.rejected if item.needed_bytes is not None]
    if not needs:
        return  # what is wrong is no matter of memory, and is said where it is met
    if min(needs) <= IN_DOUBT * machine.memory_bytes:
        notice(
            f"Memory is tight: {in_gib(min(needs))} are predicted, and there are "
            f"{in_gib(machine.memory_bytes)}."
        )
        return
    nearest = choice.rejected[0]
    raise ConfigError(
        f"Nothing that this recipe allows fits: {in_gib(min(needs))} are needed, and this machine has "
        f"{in_gib(machine.memory_bytes)}.",
        problems=[f"{item.label}: {item.why}" for item in choice.rejected],
        meaning="Found by prediction, before anything was loaded; what the recipe says was kept.",
        fix=f"{nearest.remedy[:1].upper()}{nearest.remedy[1:]}. What is not written is chosen to fit.",
    )
