"""A run and the machine it would take place on, as its times are computed from them."""

from __future__ import annotations

from dataclasses import dataclass

from graftlm.planning.base_facts import BaseFacts
from graftlm.planning.machine import Machine
from graftlm.planning.sites import Sites, sites_of
from graftlm.planning.step_work import Load, Shape, shape_of
from graftlm.planning.workload import Workload
from graftlm.training.recipe import Recipe

AUTO = "auto"
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BIDIRECTIONAL = frozenset(
    {"bert", "roberta", "distilbert", "deberta", "deberta-v2", "electra", "albert", "xlm-roberta"}
)
"""Architectures whose attention looks both ways."""


@dataclass(frozen=True)
class Setting:
    """Everything that the times of one run are computed from."""

    recipe: Recipe
    facts: BaseFacts
    sites: Sites
    shape: Shape
    workload: Workload
    machine: Machine
    dtype: str
    """What the base computes in."""
    recompute: str
    """The policy; `auto` is taken as `nothing`."""

    @property
    def is_native(self) -> bool:
        """Whether attention is that of causal documents, which has a kernel of its own."""
        return not self.facts.is_encoder_decoder and self.facts.architecture not in BIDIRECTIONAL

    @property
    def is_quantised(self) -> bool:
        return self.recipe.model.quantization != "none"


def setting_of(
    recipe: Recipe, facts: BaseFacts, workload: Workload, machine: Machine, recompute: str
) -> Setting:
    """Raises:
    TargetError, AdapterError: the recipe's method does not fit the base.
    """
    return Setting(
        recipe=recipe,
        facts=facts,
        sites=sites_of(facts, recipe.method.config),
        shape=shape_of(facts, quantised=recipe.model.quantization != "none"),
        workload=workload,
        machine=machine,
        dtype=computes_in(recipe, facts, machine),
        recompute="nothing" if recompute == AUTO else recompute,
    )


def load_of(setting: Setting) -> Load:
    """The mean micro-batch."""
    workload, tokens = setting.workload, setting.workload.mean_batch_tokens
    virtual = setting.sites.input_tokens * tokens / max(1.0, workload.mean_row_tokens)
    return Load(
        tokens=max(1.0, tokens + virtual),
        targets=workload.target_share * tokens,
        document=workload.mean_document + setting.sites.input_tokens,
        size=BYTES[setting.dtype],
    )


def computes_in(recipe: Recipe, facts: BaseFacts, machine: Machine) -> str:
    """The dtype that the base will compute in, as `models.precision` chooses it."""
    section, has_half = recipe.model, any("BF16" in name for name in machine.instruction_sets)
    if section.dtype != AUTO:
        return section.dtype
    if machine.device == "cuda":
        half = "bfloat16" if "bfloat16" in machine.rates.matrix else "float32"
        return half if section.quantization == "none" else section.compute_dtype
    if section.quantization != "none":
        is_slow = section.compute_dtype == "bfloat16" and not has_half
        return "float32" if is_slow else section.compute_dtype
    return "bfloat16" if facts.dtype == "bfloat16" and has_half else "float32"
