"""LoftQ: A and B start as the correction of rank r of what quantising lost (Li et al., arXiv 2310.08659).

With Q the quantised weight that the layer stores, s B A is the truncated SVD of W - Q. The paper then
quantises W - s B A in place of W, and repeats. Here the base is never edited: other adapters stand on the
same Q, and the file of this one is a plain LoRA that fits any copy of the quantised base. For a Q that
stays, one SVD is the best that rank r can do, so there is nothing to repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graftlm.core.errors import ConfigError
from graftlm.kernels.lengths import changed_lengths
from graftlm.kernels.ops import row_products
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.base import Layer, Part
from graftlm.methods.dora import DoraLinear
from graftlm.methods.low_rank import LoraLinear
from graftlm.methods.site import base_modules
from graftlm.methods.starts.initialise import LoftQConfig, Start, shared_out
from graftlm.quant.facts import is_packed
from graftlm.quant.weights import widened

Original = Callable[[str], Tensor]
"""The weight of the layer at a path as it was before it was quantised, [out, in] or [in, out]."""

EXACT_SIDE = 512
"""A weight whose smaller side is at most this gets an exact SVD, a larger one a randomised one."""
POWER_ITERATIONS = 8
"""What quantising loses has no few main directions: with these, within 0.1 % of the exact SVD's error."""
FARTHEST = 0.5
"""|W - Q| / |W| beyond which Q was made from another W; the roundest scheme stays below 0.2."""


@dataclass(frozen=True)
class Correction:
    """How far one layer is from its original, in Frobenius norms relative to the original's."""

    path: str
    before: float
    """|W - Q| / |W|."""
    after: float
    """|W - Q - s B A| / |W|."""


@torch.no_grad()
def correct_quantisation(
    adapters: AdapterSet,
    name: str,
    original: Original,
    config: LoftQConfig | None = None,
    *,
    accepts: Callable[[str], bool] | None = None,
) -> list[Correction]:
    """Start an adapter that is not trained yet from the originals of the quantised layers it is on.

    One original is read at a time. Layers that are not quantised keep the start that they have, and so do
    those for which `accepts`, called with the path when the new start is in place, says no.

    Raises:
        ConfigError: no layer of the adapter is quantised, or an original is not what the base was made from;
            the adapter is then of no use, and its maker takes it off.

    >>> from graftlm.methods.attach import attach
    >>> from graftlm.formats.layout import FOLDER
    >>> from graftlm.methods.lora import LoraConfig
    >>> from graftlm.testing.models import tiny
    >>> whole, adapters = tiny("llama"), attach(tiny("llama-nf4"), LoraConfig(r=8), storage=FOLDER)
    >>> found = correct_quantisation(adapters, "default", lambda path: whole.get_submodule(path).weight)
    >>> all(one.after < one.before for one in found)
    True
    """
    modules = base_modules(adapters.model)
    layers = {
        path: (Layer(path, modules[path]), part)
        for path, part in adapters.parts(name).items()
        if is_packed(modules[path]) and isinstance(part, LoraLinear | DoraLinear)
    }
    if not layers:
        raise ConfigError(
            "init_lora_weights='loftq' corrects what quantising lost, and no adapted layer is quantised.",
            fix="Load the base with quantization='nf4' (model.quantization: nf4), or use another start.",
        )
    for layer, _ in layers.values():
        _require_bits(layer, config)
    found = []
    for path, (layer, part) in layers.items():
        before = {key: parameter.detach().clone() for key, parameter in part.named_parameters()}
        correction = _correct(layer, part, original(path))
        if accepts is None or accepts(path):
            found.append(correction)
        else:
            for key, values in before.items():
                part.get_parameter(key).copy_(values)
    return found


def _correct(layer: Layer, part: Part, original: Tensor) -> Correction:
    lora = part.lora if isinstance(part, DoraLinear) else part
    assert isinstance(lora, LoraLinear)
    stored = widened(layer.handle.weight())
    weight = _facing(widened(original).to(stored.device), stored, layer.path)
    lost = weight - stored
    start = _truncated(lost, lora.lora_A.shape[0], lora.scaling, layer.path)
    lora.lora_A.copy_(start.a)
    lora.lora_B.copy_(start.b)
    if isinstance(part, DoraLinear):
        part.magnitude.copy_(changed_lengths(*row_products(stored, start.a), start.a, start.b, lora.scaling))
    size = float(weight.norm()) or 1.0
    left = lost - lora.scaling * (start.b @ start.a)
    return Correction(layer.path, float(lost.norm()) / size, float(left.norm()) / size)


def _facing(original: Tensor, stored: Tensor, path: str) -> Tensor:
    """The original as [out, in]: of a square weight the way round that is nearer to what is stored."""
    ways = [way for way in (original, original.mT) if way.shape == stored.shape]
    nearest = min(ways, key=lambda way: float((way - stored).norm()), default=None)
    if nearest is None or float((nearest - stored).norm()) > FARTHEST * float(nearest.norm()):
        seen = f"{list(original.shape)}" if nearest is None else "another weight"
        raise ConfigError(
            f"The original of {path} is {seen}; the base stores a {list(stored.shape)} quantised.",
            meaning="The base was quantised from other weights than those that were found.",
            fix="Name the model that this base was quantised from, or use another start.",
        )
    return nearest


def _truncated(lost: Tensor, r: int, scaling: float, path: str) -> Start:
    """Factors with scaling * B A the best, or all but the best, approximation of rank r."""
    side = min(lost.shape)
    if r > side:
        raise ConfigError(
            f"init_lora_weights='loftq' takes r directions of a weight, and r is {r}.",
            meaning=f"{path}, of shape {list(lost.shape)}, has only {side}.",
            fix=f"Choose r <= {side}, exclude the layer, or use init_lora_weights=True.",
        )
    if side <= EXACT_SIDE:
        u, values, vh = torch.linalg.svd(lost, full_matrices=False)
        return shared_out(u[:, :r], values[:r] / scaling, vh[:r])
    devices = [lost.device] if lost.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        u, values, v = torch.svd_lowrank(lost, q=min(2 * r, side), niter=POWER_ITERATIONS)
    return shared_out(u[:, :r], values[:r] / scaling, v[:, :r].t())


def _require_bits(layer: Layer, config: LoftQConfig | None) -> None:
    bits = 4 if layer.handle.packed.scheme.is_four_bit else 8
    if config is not None and config.loftq_bits != bits:
        raise ConfigError(
            f"loftq_bits is {config.loftq_bits}, and {layer.path} is stored in {bits} bits.",
            meaning="The base is quantised when it is loaded; the adapter corrects what that lost.",
            fix=f"Leave loftq_bits out, write {bits}, or load the base in {config.loftq_bits} bits.",
        )
