"""The middle of gated feed-forward parts, in one operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from graftlm.kernels.pointwise import gated_gelu, gated_silu
from graftlm.methods.site import base_modules
from graftlm.models.fusing.base import Exchanged, Forward, agreeing, probe_rows, untouched

_GATES = {
    **dict.fromkeys(("SiLU", "SiLUActivation"), gated_silu),
    **dict.fromkeys(("GELUTanh", "PytorchGELUTanh"), gated_gelu),
}
"""By the name of the activation's class."""

Gated = Callable[[Tensor, Tensor], Tensor]


def feed_forward_parts(model: nn.Module) -> Exchanged:
    """The feed-forward parts `down(act(gate(x)) * up(x))` of a model, act SiLU or GELU with tanh."""
    found = {module: forward for module in untouched(model) if (forward := _faster(module)) is not None}
    return Exchanged("gated feed-forward parts", len(found), agreeing(found, _probe))


def _faster(module: nn.Module) -> Forward | None:
    """The faster forward of a part whose children have these names; None if it is none of those."""
    children = module._modules
    for names, form in (
        (("gate_proj", "up_proj", "down_proj", "act_fn"), _apart),
        (("gate_up_proj", "down_proj", "activation_fn"), _together),
    ):
        if all(children.get(name) is not None for name in names):
            gated = _GATES.get(type(children[names[-1]]).__name__)
            return None if gated is None else form(module, gated)
    return None


def _probe(part: Any) -> Tensor:
    name = next(name for name in ("gate_proj", "gate_up_proj") if name in part._modules)
    return probe_rows(getattr(part, name).in_features, base_modules(part)[name])


def _apart(module: Any, gated: Gated) -> Forward:
    def forward(x: Tensor) -> Tensor:
        down: Tensor = module.down_proj(gated(module.gate_proj(x), module.up_proj(x)))
        return down

    return forward


def _together(module: Any, gated: Gated) -> Forward:
    """One linear layer for both, as in Phi-3: the gate is the first half."""

    def forward(hidden_states: Tensor) -> Tensor:
        gate, up = module.gate_up_proj(hidden_states).chunk(2, dim=-1)
        down: Tensor = module.down_proj(gated(gate, up))
        return down

    return forward
