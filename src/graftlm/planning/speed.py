"""How long a run will take: work by class against the machine's rates, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping

from graftlm.planning.base_facts import BaseFacts
from graftlm.planning.estimates import Part, TimeEstimate
from graftlm.planning.machine import Machine
from graftlm.planning.run_work import base_seconds, outside_steps
from graftlm.planning.setting import Setting, load_of, setting_of
from graftlm.planning.step_work import (
    OPERATIONS,
    OPTIMIZER,
    STEP_PARTS,
    STREAMED,
    optimizer_work,
    training_work,
)
from graftlm.planning.work import Work, device_seconds, host_seconds
from graftlm.planning.workload import Workload
from graftlm.training.recipe import Recipe

RUN_PARTS = ("load", "evaluate", "steps", "save", "verify")
LINK = 2.5e10
"""Bytes per second between host and GPU (PCIe 4)."""


def estimate_time(
    recipe: Recipe, facts: BaseFacts, workload: Workload, machine: Machine, *, recompute: str
) -> TimeEstimate:
    """The seconds of a run of `recipe`: its steps, and what comes before and after them.

    Args:
        recompute: the policy of the run; `auto` is taken as `nothing`.

    Raises:
        TargetError, AdapterError: the recipe's method does not fit the base.
    """
    setting = setting_of(recipe, facts, workload, machine, recompute)
    parts = step_seconds(setting)
    step = sum(parts.values())
    seconds = {**outside_steps(setting), "steps": step * workload.steps}
    return TimeEstimate(
        parts=tuple(Part(name, seconds[name]) for name in RUN_PARTS),
        step_seconds=step,
        base_seconds=base_seconds(setting),
        step_parts=tuple(Part(name, parts[name]) for name in STEP_PARTS if parts.get(name)),
    )


def step_seconds(setting: Setting) -> dict[str, float]:
    """Of one optimizer step, by part. On a GPU what the host takes counts where the device would wait."""
    workload, machine = setting.workload, setting.machine
    times = workload.mean_micro_batches or workload.micro_batches
    work = {name: each * times for name, each in _micro_batch(setting).items()}
    work[OPTIMIZER] = optimizer_work(setting.sites)
    found = {name: device_seconds(each, machine, setting.dtype) for name, each in work.items()}
    host = host_seconds(sum(work.values(), Work()), machine)
    found[STREAMED] = streamed_seconds(setting) * times
    device = sum(found.values())
    found[OPERATIONS] += max(0.0, host - device) if machine.device == "cuda" else host
    return found


def _micro_batch(setting: Setting) -> Mapping[str, Work]:
    return training_work(
        setting.facts,
        setting.sites,
        setting.shape,
        load_of(setting),
        setting.recompute,
        is_native=setting.is_native,
        is_full=setting.sites.copied > setting.shape.linear,
    )


def streamed_seconds(setting: Setting) -> float:
    """Of bringing the weights of the layers, twice a micro-batch, where they do not stay on the device."""
    placement = setting.recipe.model.placement
    if placement == "resident":
        return 0.0
    size = stored_bytes(setting.facts, setting.recipe.model.quantization)
    return 2 * size / (LINK if placement == "host" else setting.machine.rates.disk_read)


def stored_bytes(facts: BaseFacts, quantization: str) -> float:
    """Of a base whose linear layers are stored so; 16 bits for what is not packed."""
    bits = {"nf4": 4.13, "fp4": 4.13, "int8": 8.1, "fp8": 8.1}.get(quantization, 16)
    return (facts.quantisable * bits + (facts.total - facts.quantisable) * 16) / 8
