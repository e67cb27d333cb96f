"""EVA: A starts as the main directions of what each layer reads (Paischer et al. 2024, arXiv 2410.07170).

Batches of training data run through the base; each layer's inputs get an incremental principal component
analysis until its directions stop moving. Ranks are then dealt out anew: the budget of all layers goes to the
directions that explain the largest share of their layer's variance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftlm.core.errors import ConfigError, DataError
from graftlm.core.notices import notice
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.dora import DoraLinear
from graftlm.methods.experts import parameter_paths
from graftlm.methods.families import is_linear
from graftlm.methods.lora import LoraConfig
from graftlm.methods.low_rank import LoraLinear
from graftlm.methods.patterns import value_at
from graftlm.methods.site import base_modules
from graftlm.methods.starts.initialise import EvaConfig
from graftlm.methods.starts.input_space import InputSpace
from graftlm.methods.starts.layer_inputs import Batch, base_alone, observe, shared_inputs
from graftlm.methods.targets import named, select

LIMIT = 200
"""Batches after which directions that still move are taken as they are."""


@dataclass(frozen=True)
class EvaStart:
    """Where an adapter starts: a plain LoRA config with a rank for each layer, and A [rank, in] by path."""

    config: LoraConfig
    directions: Mapping[str, Tensor]

    @torch.no_grad()
    def apply(self, adapters: AdapterSet, name: str) -> None:
        """Put the directions into an adapter that was made from `config` and is not trained yet."""
        parts = adapters.parts(name)
        for path, rows in self.directions.items():
            part = parts[path]
            lora = part.lora if isinstance(part, DoraLinear) else part
            assert isinstance(lora, LoraLinear)
            lora.lora_A.copy_(rows)


def initialise_from_data(adapters: AdapterSet, name: str, batches: Sequence[Batch]) -> None:
    """Start the adapter `name`, attached with `init_lora_weights="eva"`, from these batches.

    Its parameters are new objects with other shapes afterwards, so this comes before the optimizer is made.
    Active and trainable adapters stay so. The same batches give the same start.

    Raises:
        ConfigError: the adapter is no LoRA that starts with EVA. DataError: too few tokens.
    """
    config = adapters.config(name)
    if not isinstance(config, LoraConfig) or config.init_lora_weights != "eva":
        raise ConfigError(
            f"Adapter {name!r} does not start from data.",
            fix="Attach it with LoraConfig(init_lora_weights='eva').",
        )
    start = eva_start(adapters.model, config, batches)
    active, trainable = adapters.active, adapters.trainable
    is_float32 = all(p.dtype == torch.float32 for p in adapters.parameters(name))
    adapters.delete(name)
    adapters.add(name, start.config, dtype="float32" if is_float32 else "base")
    start.apply(adapters, name)
    adapters.activate(active)
    adapters.train_only(trainable)


def eva_start(model: nn.Module, config: LoraConfig, batches: Sequence[Batch]) -> EvaStart:
    """The start that `batches` give on the base of `model`; nothing in the model is changed.

    Layers that read the very same tensor (q, k and v) share one analysis. Embeddings, and layers that these
    batches do not reach, keep the rank and the start of a plain LoRA.

    Raises:
        TargetError: targets do not resolve. ConfigError: none of them is a linear layer.
        DataError: the batches hold too few tokens for the ranks.
    """
    settings = config.eva_config or EvaConfig()
    modules = base_modules(model)
    copied = tuple(named(model, config.modules_to_save or (), "modules_to_save"))
    chosen = select(model, config) if config.target_modules else []
    paths = [path for path in chosen if not f"{path}.".startswith(tuple(f"{name}." for name in copied))]
    linear = {path: modules[path] for path in paths if is_linear(modules[path])}
    if not linear:
        raise ConfigError("EVA starts linear layers, and none is a target.", fix="Choose another start.")
    if not batches:
        raise DataError("There are no batches to start from.", fix="Give the first training batches.")
    with base_alone(model):
        leader = shared_inputs(model, linear, batches[0])
        analysis = _Analysis(model, linear, leader, {path: config.rank_at(path) for path in leader}, settings)
        shares = analysis.settle(batches)
    owners = parameter_paths(model, config.target_parameters or ())
    others = [f"{path}.{name}" for path, names in owners.items() for name in names]
    return EvaStart(_redistributed(config, paths, others, shares, settings), analysis.directions(shares))


class _Analysis:
    """One input space for each group of layers that read the same tensor, and the ranks these spaces give."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        leader: Mapping[str, str],
        ranks: Mapping[str, int],
        settings: EvaConfig,
    ) -> None:
        self.model, self.modules, self.leader, self.settings = model, modules, leader, settings
        self.budget = sum(ranks.values())
        widths: dict[str, int] = {}
        for path, first in leader.items():
            widths[first] = max(widths.get(first, 0), round(ranks[path] * settings.rho))
        self.spaces = {path: InputSpace(width) for path, width in widths.items()}

    def settle(self, batches: Sequence[Batch]) -> dict[str, int]:
        """Feed batches until every direction that gets a rank stands still; the rank of each layer."""
        shares = {path: self.spaces[first].width for path, first in self.leader.items()}
        for count in range(max(LIMIT, len(batches))):
            moving = self._moving(shares)
            if not moving or (count >= len(batches) and self._empty()):
                break
            ignored = self.settings.label_mask_value if self.settings.use_label_mask else None
            consumers = {path: (self.modules[path], self.spaces[path].add) for path in moving}
            observe(self.model, consumers, batches[count % len(batches)], ignored_label=ignored)
            if not self._empty():
                shares = _dealt(
                    {p: self.spaces[first].shares for p, first in self.leader.items()}, self.budget
                )
        if empty := self._empty():
            raise DataError(
                "The batches hold too few tokens that count to start from.",
                problems=[
                    f"{p}: {self.spaces[p].waiting} of {self.spaces[p].width} tokens" for p in empty[:10]
                ],
                fix="Give more batches, a smaller r or rho, or eva_config={'use_label_mask': False}.",
            )
        if moving:
            notice(f"EVA: some directions still move after {LIMIT} batches (eva_config.tau).")
        return shares

    def directions(self, shares: Mapping[str, int]) -> dict[str, Tensor]:
        """A [rank, in] of every layer that has a rank."""
        return {
            path: self.spaces[self.leader[path]].directions(share, whitened=self.settings.whiten)
            for path, share in shares.items()
            if share
        }

    def _moving(self, shares: Mapping[str, int]) -> list[str]:
        needed = dict.fromkeys(self.spaces, 0)
        for path, first in self.leader.items():
            needed[first] = max(needed[first], shares[path])
        tau = self.settings.tau
        return [path for path, space in self.spaces.items() if not space.is_still(needed[path], tau)]

    def _empty(self) -> list[str]:
        return [path for path, space in self.spaces.items() if space.is_empty]


def _dealt(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many of the `budget` largest shares each layer holds; between equal ones the earlier layer wins."""
    owners = [path for path, values in shares.items() for _ in values]
    order = torch.cat(list(shares.values())).argsort(descending=True, stable=True)[:budget]
    counts = dict.fromkeys(shares, 0)
    for index in order.tolist():
        counts[owners[index]] += 1
    return counts


def _redistributed(
    config: LoraConfig,
    paths: Sequence[str],
    others: Sequence[str],
    shares: Mapping[str, int],
    settings: EvaConfig,
) -> LoraConfig:
    """The config with these ranks; a layer with none left is no target any more, `others` keep theirs."""
    ranks = {path: shares.get(path, config.rank_at(path)) for path in (*paths, *others)}
    alphas = {}
    for path, rank in ranks.items():
        ratio = rank / config.rank_at(path) if settings.adjust_scaling_factors else 1.0
        alpha = value_at(config.alpha_pattern, path, config.lora_alpha)
        alphas[path] = alpha * (math.sqrt(ratio) if config.use_rslora else ratio)
    changes: dict[str, object] = {
        "init_lora_weights": True,
        "eva_config": None,
        "rank_pattern": {path: rank for path, rank in ranks.items() if rank not in (0, config.r)},
        "alpha_pattern": {p: alpha for p, alpha in alphas.items() if ranks[p] and alpha != config.lora_alpha},
    }
    if not all(ranks.values()):
        changes |= {"target_modules": tuple(path for path in paths if ranks[path]), "exclude_modules": None}
        changes |= {"layers_to_transform": None, "layers_pattern": None}
    return config.replace(**changes)
