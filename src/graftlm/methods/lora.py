"""LoRA: a frozen weight plus a trained product of two thin matrices (Hu et al. 2021, arXiv 2106.09685).

y = W x + s B A x        s = alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)

The arithmetic is in `methods.low_rank`, that of DoRA in `methods.dora`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from torch import nn

from graftlm.core.errors import TargetError
from graftlm.methods.base import Layer, Maker, MethodConfig, Part, SiteAdapter
from graftlm.methods.bias import BiasShift, has_bias
from graftlm.methods.dora import DoraEmbedding, DoraLinear
from graftlm.methods.experts import Update, parameter_paths, parameter_places
from graftlm.methods.families import is_linear
from graftlm.methods.layer_config import LayerConfig
from graftlm.methods.low_rank import LoraEmbedding, LoraLinear
from graftlm.methods.patterns import check_expressions, require_matches, value_at
from graftlm.methods.site import base_modules
from graftlm.methods.starts.initialise import (
    EvaConfig,
    LoftQConfig,
    checked,
    doubled,
    require_rank,
    say_eva_needs_data,
    say_loftq_needs_originals,
    subtracts,
)
from graftlm.methods.tokens import Indices, NestedTokenRows, checked_ids, link_tied, token_places

NO_TARGET = "names no module; use 'all-linear', a role, or module names"


class LoraConfig(LayerConfig):
    """LoRA on linear layers, GPT-2's Conv1D and embeddings.

    >>> LoraConfig(r=8, lora_alpha=16).scaling
    2.0
    >>> LoraConfig(r=16, lora_alpha=16, use_rslora=True).scaling
    4.0
    """

    peft_type: ClassVar[str] = "LORA"
    aliases: ClassVar[Mapping[str, str]] = {
        "lora_r": "r",
        "lora_rank": "r",
        "rank": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "lora_target": "target_modules",
        "lora_target_modules": "target_modules",
    }

    r: int = Field(16, gt=0)
    """Rank of the update."""
    lora_alpha: int | float = Field(32, gt=0)
    """Numerator of the scaling."""
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the input of the update, never on the base's."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""
    init_lora_weights: bool | str = True
    """True: Kaiming-uniform A, zero B. `gaussian`: normal A, deviation 1/r. `orthogonal`: neither zero, their
    product is. `pissa`, `pissa_niter_N`, `olora`: from the base's weight, which stays as it is. `eva`: from
    data (`methods.starts.eva`). `loftq`: from what quantising the base lost (`methods.starts.loftq`). False:
    both random (tests)."""
    eva_config: EvaConfig | None = None
    """How `eva` reads data."""
    loftq_config: LoftQConfig | None = None
    """What `loftq` is told about the base."""
    trainable_token_indices: Indices | dict[str, Indices] | None = None
    """Tokens whose embedding rows are trained too: ids in the input embedding, or ids by name of table."""
    target_parameters: tuple[str, ...] | None = None
    """Parameters that are no layer's weight, such as stacked experts (`methods.experts`), by path or ending.
    `target_modules` may be empty then."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Which of the base's biases are trained too: none, those of adapted layers, or all."""

    rank_pattern: Mapping[str, Annotated[int, Field(gt=0)]] = Field(default_factory=dict)
    """Other ranks for some modules, by pattern of their path (`methods.patterns`); the first match wins."""
    alpha_pattern: Mapping[str, Annotated[int | float, Field(gt=0)]] = Field(default_factory=dict)
    """Other values of `lora_alpha`, likewise."""
    lora_bias: bool = False
    """A trained bias on B, scaled like it. Merging needs a bias in the base layer."""
    use_dora: bool = False
    """Train the length of every row of the weight apart from its direction (`methods.dora`)."""

    @property
    def scaling(self) -> float:
        """The factor on B A, where no pattern says otherwise."""
        return self._scaling(self.r, self.lora_alpha)

    def rank_at(self, path: str) -> int:
        """The rank of the update at one module."""
        return value_at(self.rank_pattern, path, self.r)

    def scaling_at(self, path: str) -> float:
        """The factor on B A at one module."""
        return self._scaling(self.rank_at(path), value_at(self.alpha_pattern, path, self.lora_alpha))

    def _scaling(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns_compile(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        return check_expressions(value)

    @model_validator(mode="after")
    def _one_of_bias_and_dora(self) -> Self:
        if self.use_dora and self.lora_bias:
            raise ValueError("lora_bias cannot be used with use_dora: DoRA scales the weight, not a bias")
        return self

    @field_validator("loftq_config", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return value or None

    @field_validator("init_lora_weights")
    @classmethod
    def _init_is_known(cls, value: bool | str) -> bool | str:
        return checked(value)

    @model_validator(mode="after")
    def _ranks_suit_the_start(self) -> Self:
        for rank in (self.r, *self.rank_pattern.values()):
            require_rank(self.init_lora_weights, rank)
        return self

    @field_validator("target_modules")
    @classmethod
    def _not_empty(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if value == "" or any(not name for name in value):
            raise ValueError(NO_TARGET)
        return value  # no name at all is right beside target_parameters: see below

    @model_validator(mode="after")
    def _targets_make_sense(self) -> Self:
        if not self.target_modules and not self.target_parameters:
            raise ValueError(f"target_modules: {NO_TARGET}")
        others = {"lora_dropout": self.lora_dropout, "use_dora": self.use_dora, "lora_bias": self.lora_bias}
        init = self.init_lora_weights
        others |= {f"init_lora_weights={init!r}": subtracts(init) or init == "orthogonal"}
        if self.target_parameters and (given := [name for name, value in others.items() if value]):
            raise ValueError(f"target_parameters cannot be used with {', '.join(given)}")
        return self

    @field_validator("trainable_token_indices")
    @classmethod
    def _are_ids(cls, value: Any) -> Any:
        for ids in value.values() if isinstance(value, dict) else () if value is None else (value,):
            checked_ids(ids)
        return value

    def portable(self) -> MethodConfig:
        """A plain LoRA: a start from data or from the base's weight is in the tensors, none is repeated."""
        plain = self.replace(eva_config=None, loftq_config=None)
        if not subtracts(self.init_lora_weights):
            return plain
        patterns = (self.rank_pattern, self.alpha_pattern)
        return plain.replace(**doubled(self.r, self.lora_alpha, *patterns, use_rslora=self.use_rslora))

    def link(self, parts: Mapping[str, Part]) -> None:
        link_tied(parts)

    def supports(self, module: nn.Module) -> bool:
        return is_linear(module) or isinstance(module, nn.Embedding)

    def build(self, layer: Layer) -> SiteAdapter:
        init, module = self.init_lora_weights, layer.module
        weight = layer.handle.weight() if subtracts(init) else None
        if init == "eva" and layer.device.type != "meta":
            say_eva_needs_data()
        if init == "loftq" and layer.device.type != "meta":
            say_loftq_needs_originals()
        rank, scaling = self.rank_at(layer.path), self.scaling_at(layer.path)
        if isinstance(module, nn.Embedding):
            table = LoraEmbedding(module, r=rank, scaling=scaling, init=init, weight=weight)
            return DoraEmbedding(table, layer.handle.weight()) if self.use_dora else table
        rows, columns = layer.handle.shape
        bias = module.bias if self.bias != "none" and has_bias(module) else None
        lora = LoraLinear(
            columns,
            rows,
            r=rank,
            scaling=scaling,
            dropout=self.lora_dropout,
            init=init,
            weight=weight,
            bias=bias,
            lora_bias=self.lora_bias,
        )
        return DoraLinear(lora, layer.handle.weight()) if self.use_dora else lora

    def extra(self, model: nn.Module, chosen: Sequence[str]) -> Mapping[str, Maker]:
        owners = parameter_paths(model, self.target_parameters or ())
        parameters = [f"{path}.{name}" for path, names in owners.items() for name in names]
        patterns = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        require_matches(patterns, [*chosen, *parameters])
        if self.lora_bias:
            _refuse_embeddings(model, chosen)
        more = parameter_places(owners, {path: self._update(path) for path in parameters}, taken=chosen)
        if self.trainable_token_indices is not None:
            indices, taken = self.trainable_token_indices, (*chosen, *more)
            more |= token_places(model, indices, NestedTokenRows, taken=taken, copied=self.modules_to_save)
        if self.bias != "all":
            return more
        biases = {
            path: lambda layer: BiasShift(layer.module.get_parameter("bias"))
            for path, module in base_modules(model).items()
            if path not in chosen and has_bias(module)
        }
        return {**biases, **more}

    def _update(self, path: str) -> Update:
        return Update(self.rank_at(path), self.scaling_at(path), self.init_lora_weights)


def _refuse_embeddings(model: nn.Module, chosen: Sequence[str]) -> None:
    modules = base_modules(model)
    tables = [path for path in chosen if isinstance(modules[path], nn.Embedding)]
    if tables:
        raise TargetError(
            "lora_bias is for linear layers, and embeddings are among the targets.",
            problems=tables,
            fix="Exclude them with exclude_modules, or set lora_bias=False.",
        )
