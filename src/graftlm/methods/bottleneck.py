"""Bottleneck adapters: a narrow two-layer network inside every block, in front of the residual addition.

houlsby   (arXiv 1902.00751)  y + change(y)  after attention and after the feed-forward part
pfeiffer  (arXiv 2005.00247)  y + change(y)  after the feed-forward part
parallel  (arXiv 2110.04366)  y + change(x)  beside the feed-forward part, whose input is x and output y

The network stands at the linear layer that ends its part of the block, so no model's code is touched. A
mixture of experts has no such layer: there it stands at the module that holds the experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from torch import nn

from graftlm.core.errors import AdapterError, TargetError
from graftlm.methods import targets
from graftlm.methods.base import Layer, Maker, MethodConfig, Part
from graftlm.methods.bottleneck_parts import (
    Bottleneck,
    InputTap,
    ModuleBottleneck,
    NonLinearity,
    ParallelBottleneck,
    Scaling,
    Shape,
)
from graftlm.methods.families import Block, blocks_of, is_linear, shape_of
from graftlm.methods.site import base_modules

Placement = Literal["pfeiffer", "houlsby", "parallel"]
PARALLEL_SCALING = 4.0


class BottleneckConfig(MethodConfig):
    """Bottleneck adapters in every block of a model.

    >>> BottleneckConfig().scaling, BottleneckConfig(placement="parallel").scaling
    (1.0, 4.0)
    >>> BottleneckConfig(reduction_factor={3: 4, "default": 16}).width_of(3, 768)
    192
    """

    peft_type: ClassVar[str] = "BOTTLENECK"

    placement: Placement = "pfeiffer"
    """After the feed-forward part (`pfeiffer`), after attention too (`houlsby`), or beside the feed-forward
    part (`parallel`)."""
    reduction_factor: int | float | dict[str, int | float] = 16
    """Width of the block over width of the adapter: one number, or one per block number and `default`."""
    non_linearity: NonLinearity = "relu"
    """Between the two layers."""
    scaling: Scaling = 1.0
    """Factor on the change: a number, or `learned` (starting at 1). Without a value `parallel` takes 4."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the change, in training."""
    leave_out: tuple[int, ...] = ()
    """Blocks without an adapter, by number from 0; in an encoder-decoder the decoder's count on."""
    cross_adapter: bool = False
    """With `houlsby`: also after attention to the encoder."""
    target_modules: str | tuple[str, ...] | None = None
    """None: as `placement` says, read off the model's structure. Otherwise the layers or modules that get an
    adapter at their output (`parallel`: modules, whose own input it reads), as names, endings of names or an
    expression."""

    @model_validator(mode="before")
    @classmethod
    def _scaling_of_placement(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("placement") == "parallel":
            return {"scaling": PARALLEL_SCALING, **data}
        return data

    @field_validator("reduction_factor", mode="before")
    @classmethod
    def _numbers_are_keys(cls, value: Any) -> Any:
        """JSON and YAML know block numbers as text."""
        return {str(key): factor for key, factor in value.items()} if isinstance(value, Mapping) else value

    @field_validator("reduction_factor")
    @classmethod
    def _factors_make_sense(cls, value: Any) -> Any:
        factors: dict[str, float] = value if isinstance(value, dict) else {"default": value}
        if any(factor <= 0 for factor in factors.values()):
            raise ValueError("factors must be greater than 0")
        if strange := [key for key in factors if not key.isdigit() and key != "default"]:
            raise ValueError(f"keys are block numbers and 'default', not {', '.join(map(repr, strange))}")
        return value

    @property
    def rate_scale(self) -> float:
        return 5.0

    def width_of(self, block: int | None, features: int) -> int:
        """The narrow width in one block (None: outside of numbered blocks); at least 1."""
        factors = self.reduction_factor
        if isinstance(factors, dict):
            return max(1, int(features / factors.get(str(block), factors.get("default", features))))
        return max(1, int(features / factors))

    def places(self, model: nn.Module) -> Mapping[str, Maker]:
        problems: list[str] = []
        blocks = blocks_of(model)
        self._check_numbers(blocks, problems)
        by_structure = self.target_modules is None
        spots = [*(self._by_structure(blocks, problems) if by_structure else self._by_name(model, blocks))]
        modules = base_modules(model)
        made: dict[str, Maker] = {}
        for spot in spots:
            features = _features(model, modules[spot.path])
            if features is None:
                problems.append(f"{spot.path}: the width of its output is not known")
                continue
            if spot.begins is not None:
                made[spot.begins] = partial(_tap, ends=spot.path)
            elif self.placement == "parallel" and is_linear(modules[spot.path]):
                problems.append(f"{spot.path}: 'parallel' by name needs a whole feed-forward module")
            made[spot.path] = partial(self._build, spot, features)
        if not spots and not problems:
            problems.append("no block with attention and a feed-forward part was found")
        if problems:
            raise TargetError(
                f"{len(problems)} problem{'s' * (len(problems) > 1)} in placing this BottleneckConfig.",
                problems=problems,
                meaning="Numbers count blocks from 0; places are read off the model's structure or named.",
                fix="Name the layers or modules that get an adapter at their output, for instance "
                "target_modules=('out_proj', 'fc2'), or leave blocks out with leave_out.",
            )
        return made

    def link(self, parts: Mapping[str, Part]) -> None:
        taps = {part.ends: (path, part) for path, part in parts.items() if isinstance(part, InputTap)}
        ends = {path: part for path, part in parts.items() if isinstance(part, ParallelBottleneck)}
        lonely = [taps[path][0] if path in taps else path for path in taps.keys() ^ ends.keys()]
        if lonely:
            raise AdapterError(
                "Some parts of this adapter lack their other half.",
                problems=[
                    f"{path}: the other end of its feed-forward part is missing" for path in sorted(lonely)
                ],
                meaning="That end is copied whole, as modules_to_save says.",
                fix="Name the whole feed-forward module in modules_to_save, or put its block into leave_out.",
            )
        for path, end in ends.items():
            end.memory = taps[path][1].memory

    def _check_numbers(self, blocks: tuple[Block, ...], problems: list[str]) -> None:
        factors = self.reduction_factor if isinstance(self.reduction_factor, dict) else {"default": 1.0}
        named = {int(key) for key in factors if key != "default"}
        for field, numbers in (("leave_out", {*self.leave_out}), ("reduction_factor", named)):
            if beyond := sorted(number for number in numbers if not 0 <= number < len(blocks)):
                problems.append(f"{field} names {beyond}, but this model has {len(blocks)} blocks, from 0")
        missing = sorted({block.number for block in blocks} - named - {*self.leave_out})
        if "default" not in factors and missing:
            problems.append(f"reduction_factor has neither {missing} nor 'default'")

    def _by_structure(self, blocks: tuple[Block, ...], problems: list[str]) -> Iterator[_Spot]:
        for block in blocks:
            if block.number in self.leave_out or not (
                block.attentions or block.feed_forwards or block.mixture
            ):
                continue
            if self.placement == "houlsby":
                for attention in block.attentions:
                    if attention.output is None:
                        problems.append(f"{attention.path}: the layer that ends it was not found")
                    elif self.cross_adapter or not attention.is_cross:
                        yield _Spot(attention.output, block.number)
            if block.mixture is not None:
                yield _Spot(block.mixture, block.number)
            elif not block.feed_forwards:
                problems.append(f"{block.path}: the layer that ends its feed-forward part was not found")
            for feed_forward in block.feed_forwards if block.mixture is None else ():
                begins = feed_forward.inputs[0] if self.placement == "parallel" else None
                yield _Spot(feed_forward.output, block.number, begins)

    def _by_name(self, model: nn.Module, blocks: tuple[Block, ...]) -> Iterator[_Spot]:
        for path in targets.select(model, _Named(self.target_modules or ())):
            numbers = [block.number for block in blocks if path.startswith(f"{block.path}.")]
            if not {*numbers} & {*self.leave_out}:
                yield _Spot(path, numbers[0] if numbers else None)

    def _build(self, spot: _Spot, features: int, layer: Layer) -> Part:
        width = self.width_of(spot.block, features)
        shape = Shape(features, width, self.non_linearity, self.scaling, self.dropout)
        if not is_linear(layer.module):
            return ModuleBottleneck(shape, reads_input=self.placement == "parallel")
        return Bottleneck(shape) if spot.begins is None else ParallelBottleneck(shape)


@dataclass(frozen=True)
class _Spot:
    """Where one network goes: the layer or module at whose output, in which block, and where its input is."""

    path: str
    block: int | None
    begins: str | None = None


@dataclass(frozen=True)
class _Named:
    """`target_modules` by the common grammar of targets."""

    target_modules: str | tuple[str, ...]
    exclude_modules: None = None
    layers_to_transform: None = None
    layers_pattern: None = None

    def supports(self, module: nn.Module) -> bool:
        is_container = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Embedding)
        return is_linear(module) or (not is_container and next(module.children(), None) is not None)


def _features(model: nn.Module, module: nn.Module) -> int | None:
    """Numbers per token that a layer gives; a whole module gives as many as the model is wide."""
    if is_linear(module):
        return shape_of(module)[0]
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    width = getattr(text, "hidden_size", None)
    return width if isinstance(width, int) else None


def _tap(layer: Layer, *, ends: str) -> Part:
    return InputTap(ends)
