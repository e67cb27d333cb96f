"""RMS norms with frozen weights, in one operator."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from graftlm.kernels.pointwise import rms_norm
from graftlm.models.fusing.base import Exchanged, Forward, agreeing, probe_rows, untouched


def norms(model: nn.Module) -> Exchanged:
    """The RMS norms of a model whose weight is a frozen vector."""
    found = {module: _fused(module) for module in untouched(model) if _is_norm(module)}
    return Exchanged("norms", len(found), agreeing(found, lambda norm: probe_rows(len(_weight(norm)), norm)))


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    is_vector = isinstance(weight, Tensor) and weight.dim() == 1 and not weight.requires_grad
    return is_vector and "RMSNorm" in type(module).__name__


def _weight(norm: Any) -> Tensor:
    weight: Tensor = norm.weight
    return weight


def _fused(module: Any) -> Forward:
    plain: Forward = module.forward
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), 0.0)

    def forward(hidden_states: Tensor) -> Any:
        weight = module.weight
        fits = weight.dtype == hidden_states.dtype and not weight.requires_grad
        return rms_norm(hidden_states, weight, eps) if fits else plain(hidden_states)

    return forward
