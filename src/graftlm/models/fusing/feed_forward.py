"""The middle of SiLU-gated feed-forward parts, in one operator."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from graftlm.kernels.pointwise import gated_silu
from graftlm.methods.site import base_modules
from graftlm.models.fusing.base import Exchanged, Forward, agreeing, probe_rows, untouched


def feed_forward_parts(model: nn.Module) -> Exchanged:
    """The feed-forward parts `down(silu(gate(x)) * up(x))` of a model."""
    found = {module: _fused(module) for module in untouched(model) if _is_gated(module)}
    return Exchanged("gated feed-forward parts", len(found), agreeing(found, _probe))


def _is_gated(module: nn.Module) -> bool:
    children = module._modules
    names = ("gate_proj", "up_proj", "down_proj", "act_fn")
    return all(children.get(name) is not None for name in names) and _is_silu(children["act_fn"])


def _is_silu(module: nn.Module | None) -> bool:
    return type(module).__name__ in ("SiLU", "SiLUActivation")


def _probe(part: Any) -> Tensor:
    return probe_rows(part.gate_proj.in_features, base_modules(part)["gate_proj"])


def _fused(module: Any) -> Forward:
    def forward(x: Tensor) -> Tensor:
        down: Tensor = module.down_proj(gated_silu(module.gate_proj(x), module.up_proj(x)))
        return down

    return forward
