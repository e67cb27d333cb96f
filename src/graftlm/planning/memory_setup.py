"""What a recipe means for memory on a machine: number format, storage of the base, micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graftlm.methods.base import MethodConfig
from graftlm.models.precision import AUTO, DTYPES
from graftlm.planning.base_facts import BaseFacts
from graftlm.planning.machine import Machine
from graftlm.planning.rehearsal import Load
from graftlm.planning.workload import Workload
from graftlm.quant.scheme import Scheme
from graftlm.training.recipe import ModelSection, Recipe


@dataclass(frozen=True)
class Setup:
    """One run, as far as its memory depends on it."""

    facts: BaseFacts
    config: MethodConfig | None
    """None: the base alone."""
    dtype: torch.dtype
    """Of the computation and of all that is not packed."""
    scheme: Scheme | None
    load: Load
    is_first: bool
    """Each optimizer step has one micro-batch."""
    optimizer: str
    placement: str
    embeddings: str

    @property
    def base_key(self) -> tuple[str, ...]:
        """What a stage without an adapter depends on."""
        return self.facts.name, repr(self.facts.ending), str(self.dtype), repr(self.scheme)

    @property
    def key(self) -> tuple[str, ...]:
        """What a stage depends on."""
        if self.config is None:
            return self.base_key
        return *self.base_key, type(self.config).__name__, self.config.model_dump_json()


def setup_of(recipe: Recipe, facts: BaseFacts, workload: Workload, machine: Machine) -> Setup:
    """The run of this recipe on that machine."""
    scheme = scheme_of(recipe.model, facts)
    return Setup(
        facts,
        recipe.method.config,
        dtype_of_run(recipe.model, facts, machine),
        scheme,
        load_of(recipe, workload),
        workload.micro_batches <= 1,
        recipe.train.optim,
        recipe.model.placement,
        recipe.model.embeddings,
    )


def scheme_of(section: ModelSection, facts: BaseFacts) -> Scheme | None:
    """How the linear layers are stored."""
    kind = section.quantization if section.quantization != "none" else facts.stored_quantised
    if kind is None:
        return None
    return Scheme(kind) if kind == "fp8_block" else Scheme.parse(kind, double_quant=section.double_quant)


def dtype_of_run(section: ModelSection, facts: BaseFacts, machine: Machine) -> torch.dtype:
    """As `verbs.base.base_dtype` and `models.precision.choose_dtype` decide it on that machine."""
    is_cpu = machine.device == "cpu"
    has_bfloat16 = not is_cpu or any("bf16" in name.lower() for name in machine.instruction_sets)
    if section.quantization != "none" and section.dtype == AUTO:
        is_slow = section.compute_dtype == "bfloat16" and not has_bfloat16
        return torch.float32 if is_slow else DTYPES[section.compute_dtype]
    if section.dtype != AUTO:
        return DTYPES[section.dtype]
    if not is_cpu:
        return torch.bfloat16
    stored = DTYPES[facts.dtype]
    is_slow = stored == torch.float16 or (stored == torch.bfloat16 and not has_bfloat16)
    return torch.float32 if is_slow else stored


def load_of(recipe: Recipe, workload: Workload) -> Load:
    """The largest micro-batch."""
    rows = recipe.train.per_device_train_batch_size
    length = max(2, workload.batch_tokens // rows)
    mean = max(1.0, workload.mean_document or workload.mean_row_tokens)
    is_packed = recipe.data.packing
    documents = max(1, round(length / mean)) if is_packed else 1
    return Load(rows, length, min(documents, max(1, length // 2)), workload.target_share, is_packed)
