"""What a run is about to do, in figures: written to `plan.json` before the first step."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graftlm.evaluation.report_data import SiteGroup
from graftlm.formats.fingerprint import scheme_of
from graftlm.methods.adapter_set import AdapterSet
from graftlm.models.fusing.fused import Fusable
from graftlm.models.streaming.streamed import RESIDENT, placement_of
from graftlm.objectives.base import Objective
from graftlm.quant.facts import device_of, dtype_of, is_packed
from graftlm.quant.weights import WeightHandle
from graftlm.tasks.base import Task, TaskBatches
from graftlm.tasks.dataset import Dataset, Row
from graftlm.training.defaults import REFERENCE_WIDTH, usual_rate
from graftlm.training.recipe import Recipe
from graftlm.training.recompute import RecomputeChoice
from graftlm.training.timeline import Timeline
from graftlm.verbs.acceleration import Acceleration


@dataclass(frozen=True)
class Plan:
    """Base, method, sites, steps and the choices made for this machine, with their reasons."""

    base: str
    task: str
    task_why: str
    """Whether the recipe named it, or what was seen in the data and the base."""
    device: str
    dtype: str
    quantization: str
    """How the linear layers of the base are stored: `none`, or the kind and what belongs to it."""
    placement: str
    """Where the layers of the base lie while a pass does not need them."""
    placement_why: str
    method: str
    trainable: int
    total: int
    sites: tuple[SiteGroup, ...]
    train_rows: int
    held_out_rows: int
    train_tokens: int
    windows_filled: float
    """Share of the packed windows that is text; the rest is padding. 1 where rows are not packed."""
    steps: int
    learning_rate: float
    usual_learning_rate: float
    """What Graft takes for this method, task and width where nobody writes a rate."""
    loss_path: str
    loss_path_why: str
    fused: str
    """Which parts of the model run a faster way while training, and why the others do not."""
    recompute: str
    """What backward computes again instead of keeping it. A run that goes on reads it here."""
    recompute_why: str
    activation_bytes: int
    """Predicted for one micro-batch."""
    acceleration: Acceleration
    """Whether layers are compiled, and what FP8 products change: decisions with their numbers."""
    free_bytes: int
    """Free for activations, gradients and the optimizer when that was chosen."""

    @property
    def summary(self) -> str:
        """One line."""
        share = 100 * self.trainable / self.total
        base = "" if self.quantization == "none" else f" on a base in {self.quantization.split()[0]}"
        placed = "" if self.placement == RESIDENT else f", its layers on {self.placement}"
        return (
            f"{self.method}: {self.trainable:,} trainable parameters ({share:.2f} %) in "
            f"{sum(group.count for group in self.sites)} modules, {self.steps:,} steps in {self.dtype} "
            f"on {self.device}{base}{placed}"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(
    recipe: Recipe,
    model: nn.Module,
    adapters: AdapterSet,
    dataset: Dataset[Row],
    batches: TaskBatches[Any],
    objective: Objective[Any],
    recompute: RecomputeChoice,
    fusable: Fusable,
    acceleration: Acceleration,
    task: Task[Any],
) -> Plan:
    """The plan of a run whose adapter is attached."""
    trainable, total = adapters.count_parameters()
    placement, placement_why = placement_of(model)
    return Plan(
        base=recipe.model.name,
        task=recipe.task.type,
        task_why=task.why,
        device=str(device_of(model)),
        dtype=dtype_name(model),
        quantization=stored_as(model),
        placement=placement,
        placement_why=placement_why,
        method=recipe.method.summary,
        trainable=trainable,
        total=total,
        sites=site_groups(model, adapters),
        train_rows=len(dataset.train),
        held_out_rows=len(dataset.held_out),
        train_tokens=dataset.train_tokens,
        windows_filled=round(batches.packing_rate(), 4),
        steps=Timeline(batches, recipe.train.gradient_accumulation_steps).total_steps(recipe.train),
        learning_rate=recipe.train.learning_rate,
        usual_learning_rate=usual_rate(recipe, width_of(model), task.rate_scale),
        loss_path=objective.path,
        loss_path_why=objective.why,
        fused=fusable.summary,
        recompute=recompute.policy,
        recompute_why=recompute.why,
        activation_bytes=recompute.activation_bytes,
        free_bytes=recompute.free_bytes,
        acceleration=acceleration,
    )


def why_of_plan(plan: Path) -> str | None:
    """Why a run that goes on has its task, by its plan; None where there is none yet."""
    if not plan.is_file():
        return None
    found = json.loads(plan.read_text(encoding="utf-8")).get("task_why")
    return found if isinstance(found, str) else None


def width_of(model: nn.Module) -> int:
    """What a learning rate is fitted to."""
    config: Any = model.config
    return int(getattr(config.get_text_config(), "hidden_size", REFERENCE_WIDTH))


def dtype_name(model: nn.Module) -> str:
    """What a base computes in."""
    return str(dtype_of(model)).removeprefix("torch.")


def stored_as(model: nn.Module) -> str:
    """How the linear layers of a base are stored, as a person reads it; `none` where they are dense."""
    scheme = scheme_of(model)
    if scheme is None:
        return "none"
    scales = " with quantised scales" if scheme.double_quant else ""
    return f"{scheme.kind}{scales}, blocks of {scheme.block_size}" if scheme.is_four_bit else scheme.kind


def site_groups(model: nn.Module, adapters: AdapterSet) -> tuple[SiteGroup, ...]:
    """Adapted modules of the same role and shape, counted: 28 x `self_attn.q_proj`, for instance."""
    groups: dict[tuple[str, str], list[int]] = {}
    for path, part in adapters.parts(adapters.trainable[0]).items():
        role = re.sub(r"^.*?\d+\.", "", path) or "whole model"
        shape = " x ".join(map(str, _shape(model.get_submodule(path)))) or "-"
        groups.setdefault((role, shape), []).append(sum(p.numel() for p in part.parameters()))
    return tuple(SiteGroup(role, len(sizes), shape, sum(sizes)) for (role, shape), sizes in groups.items())


def _shape(place: nn.Module) -> tuple[int, ...]:
    """Of the weight at a place, without decoding it."""
    layer = getattr(place, "base_layer", place)
    if is_packed(layer):
        return WeightHandle(layer).shape
    weight = getattr(layer, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else ()
