"""Faster steps that a recipe asks for, or that must pay for themselves: FP8 products, compiled layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from graftlm.core.errors import ConfigError
from graftlm.models.fusing.base import FasterPart
from graftlm.models.fusing.fp8 import fp8_products
from graftlm.models.fusing.fused import Fusable, fused
from graftlm.models.fusing.last_rows import LastLayer
from graftlm.models.regional_compile import Failure, compiled_layers
from graftlm.objectives.recorded import CudaRecorder, RecordedSft
from graftlm.objectives.sft import SftObjective
from graftlm.quant.facts import device_of, dtype_of
from graftlm.tasks.base import TaskBatches
from graftlm.training.compile_choice import CompileChoice, choose_compile, measured_gain
from graftlm.training.recipe import Recipe
from graftlm.training.timeline import Timeline
from graftlm.verbs.fp8_check import Fp8Check, check_fp8
from graftlm.verbs.record_choice import RecordChoice, record_choice, takes_documents_together
from graftlm.verbs.step_setup import StepSetup


@dataclass(frozen=True)
class Acceleration:
    """What was decided, and measured; in `plan.json`."""

    compile: CompileChoice
    recorded: RecordChoice
    fp8_products: Fp8Check | None


def accelerated(
    setup: StepSetup,
    recipe: Recipe,
    batches: TaskBatches[Any],
    parameters: Mapping[str, nn.Parameter],
    total: int,
) -> tuple[StepSetup, Acceleration]:
    """The setup with the parts that the recipe asks for, or that pay.

    Args:
        parameters: those that are trained.
        total: how many parameters the model has.

    Raises:
        ConfigError: the recipe asks for what this model or device does not do.
        TrainingError: FP8 products change the loss of the first batch too much.
    """
    check, parts = None, list[FasterPart]()
    if recipe.model.products == "fp8":
        part = fp8_products(setup.model)
        with fused(setup.fusable):
            check = check_fp8(setup.model, setup.objective, batches.batch(0, 0), parameters, part)
        parts.append(part)
    choice = _compile_choice(setup, recipe, batches, total)
    if choice.compiles:
        on_failure: Failure = "stop" if recipe.train.compile == "on" else "go on"
        parts.append(compiled_layers(setup.model, _replaced(setup), on_failure=on_failure))
        setup.objective.tokens = batches.most_tokens
    found = Fusable((*setup.fusable.parts, *parts))
    recorded = record_choice(setup, recipe, compiles=choice.compiles)
    objective = setup.objective
    if recorded.records and isinstance(objective, SftObjective):
        trained = list(parameters.values())
        objective = RecordedSft(objective, setup.model, trained, batches.most_tokens, CudaRecorder())
    return replace(setup, fusable=found, objective=objective), Acceleration(choice, recorded, check)


def _compile_choice(setup: StepSetup, recipe: Recipe, batches: TaskBatches[Any], total: int) -> CompileChoice:
    train, asked = recipe.train, recipe.train.compile
    obstacle = _obstacle(setup, recipe)
    if asked == "on" and obstacle:
        raise ConfigError(f"train.compile: on is not possible here: {obstacle}.", fix="Leave it at auto.")
    return choose_compile(
        asked,
        gain=measured_gain(device_of(setup.model).type, str(dtype_of(setup.model)).removeprefix("torch.")),
        steps=Timeline(batches, train.gradient_accumulation_steps).total_steps(train),
        tokens_per_step=batches.most_tokens * train.gradient_accumulation_steps,
        parameters=total,
        obstacle=obstacle,
    )


def _obstacle(setup: StepSetup, recipe: Recipe) -> str:
    """Why layers are not compiled: code is compiled for one number of tokens, and for layers that stay."""
    if recipe.model.placement != "resident":
        return f"the layers come from {recipe.model.placement} one by one"
    if not recipe.data.packing:
        return "rows that are not packed have many lengths"
    if not takes_documents_together(setup):
        return "its attention does not take documents in one row together"
    return "" if compiled_layers(setup.model, _replaced(setup)).layers else "it has no numbered layers"


def _replaced(setup: StepSetup) -> list[nn.Module]:
    """Layers that another part computes in its own way."""
    ends = [part for part in setup.fusable.parts if isinstance(part, LastLayer)]
    return [part.layer for part in ends if part.layer is not None and not part.why]
