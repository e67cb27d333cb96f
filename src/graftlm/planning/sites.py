"""What a method adds to a base, in figures: asked of the method itself, on a model without memory."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch
from torch import nn

from graftlm.methods.base import MethodConfig, ModelAdapter
from graftlm.methods.copies import FullCopy
from graftlm.methods.dora import DoraLinear
from graftlm.methods.families import BLOCK, blocks_of, is_linear
from graftlm.methods.resolve import Placement, resolve
from graftlm.methods.virtual.rows import CacheTokens, InputTokens
from graftlm.planning.base_facts import BaseFacts, empty_model


@dataclass(frozen=True)
class Sites:
    """Sums over the places of one adapter."""

    trainable: int
    """Parameters in all."""
    tensors: int
    """Parameters as the optimizer sees them."""
    places: int
    products: int
    """Numbers in matrices that every token is multiplied with, beside the base's own."""
    narrow: int
    """Values per token that enter or leave those matrices on their wide side."""
    scaled: int
    """Values per token that are multiplied or shifted one by one."""
    copied: int
    """Numbers in trained copies of linear layers: their gradients are matrix products of their own."""
    normed: int
    """Numbers whose lengths are taken once a step through a product with the rank (DoRA), times that rank."""
    input_tokens: int
    """Virtual tokens before each row."""
    added_keys: int
    """Keys that every token sees besides, summed over layers."""
    backward_share: float
    """Share of the blocks that gradients pass on their way down."""


def sites_of(facts: BaseFacts, config: MethodConfig) -> Sites:
    """What attaching `config` to the base would add.

    Raises:
        TargetError: targets match nothing; AdapterError: sites lie inside each other.

    >>> from graftlm.methods.lora import LoraConfig
    >>> from graftlm.planning.base_facts import base_facts
    >>> sites_of(base_facts("meta-llama/Llama-3.1-8B"), LoraConfig(r=16)).trainable
    41943040
    """
    fields = {"type": type(config).__name__, **config.model_dump(mode="json")}
    key = json.dumps([facts.as_dict(), fields], sort_keys=True, default=str)
    if key not in _known:
        _known[key] = _counted(facts, config)
    return _known[key]


_known: dict[str, Sites] = {}
"""By facts and fields: a plan asks for the same adapter at many batch sizes."""


def _counted(facts: BaseFacts, config: MethodConfig) -> Sites:
    model = empty_model(facts.config, facts.name, facts.ending)
    placements = resolve(model, config).placements
    sums = _Sums(facts, getattr(config, "num_virtual_tokens", 0))
    for placement in placements:
        sums.add(placement)
    blocks, lowest = len(blocks_of(model)), _lowest(placements)
    return Sites(
        trainable=sum(placement.parameters for placement in placements),
        tensors=sums.tensors,
        places=len(placements),
        products=sums.products,
        narrow=sums.narrow,
        scaled=sums.scaled,
        copied=sums.copied,
        normed=sums.normed,
        input_tokens=sums.input_tokens,
        added_keys=sums.added_keys,
        backward_share=1.0 if lowest is None or not blocks else (blocks - lowest) / blocks,
    )


def _lowest(placements: tuple[Placement, ...]) -> int | None:
    """Number of the lowest block with an adapter in it; None where one stands before all blocks."""
    numbers = []
    for placement in placements:
        inside = BLOCK.match(placement.path)
        number = None if inside is None else inside["block"].rpartition(".")[2]
        if number is None:
            if not _stands_behind(placement.path):
                return None
        else:
            numbers.append(int(number))
    return min(numbers, default=0)


def _stands_behind(path: str) -> bool:
    """Whether a module outside the blocks reads what they wrote: heads and last norms."""
    return path.rpartition(".")[2] in ("lm_head", "score", "classifier", "norm", "ln_f", "final_layer_norm")


class _Sums:
    def __init__(self, facts: BaseFacts, virtual_tokens: int) -> None:
        self.facts, self.virtual_tokens = facts, virtual_tokens
        self.tensors = self.products = self.narrow = self.scaled = self.copied = self.normed = 0
        self.input_tokens = self.added_keys = 0

    def add(self, placement: Placement) -> None:
        """One place; its part is made without memory."""
        with torch.device("meta"):
            part = placement.make(placement.layer)
        shapes = [tuple(parameter.shape) for parameter in part.parameters()]
        self.tensors += len(shapes) if placement.parameters else 0  # those of a tied copy stand elsewhere
        layer = placement.layer.module
        if isinstance(part, ModelAdapter):
            self._of_stack(part, shapes)
        elif isinstance(part, FullCopy):
            self._copy(layer)
        elif isinstance(layer, nn.Embedding):
            self.scaled += self.facts.hidden_size
        else:
            self._of_layer(shapes)
            if isinstance(part, DoraLinear):
                weights = layer.weight.numel() if isinstance(layer.weight, torch.Tensor) else 0
                self.normed += weights * min(min(shape) for shape in shapes if len(shape) == 2)

    def _of_layer(self, shapes: list[tuple[int, ...]]) -> None:
        for shape in shapes:
            if len(shape) == 2 and min(shape) > 1:
                self.products += shape[0] * shape[1]
                self.narrow += max(shape)
            else:
                self.scaled += max(shape)

    def _copy(self, layer: nn.Module) -> None:
        weight = getattr(layer, "weight", None)
        if is_linear(layer) and isinstance(weight, torch.Tensor):
            self.copied += weight.numel()
        else:
            self.scaled += self.facts.hidden_size

    def _of_stack(self, part: ModelAdapter, shapes: list[tuple[int, ...]]) -> None:
        """Virtual tokens at the input, keys before every layer, or prompts at one layer's attention."""
        if isinstance(part, InputTokens):
            self.input_tokens += self.virtual_tokens
        elif isinstance(part, CacheTokens):
            self.added_keys += self.virtual_tokens * self.facts.layers
        else:
            self.added_keys += max(shapes, key=math.prod)[-2]
