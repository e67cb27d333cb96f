"""RMS norms with frozen weights, in one operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from graftlm.kernels.pointwise import rms_norm
from graftlm.models.fusing.base import Exchanged, Forward, agreeing, probe_rows, untouched

Factor = Callable[[Tensor], Tensor]


def norms(model: nn.Module) -> Exchanged:
    """The RMS norms of a model whose weight is a frozen vector."""
    found = [module for module in untouched(model) if _is_norm(module)]
    forwards: dict[nn.Module, Forward] = {}
    for factor in (_weight, _one_plus_weight):
        rest = {module: _fused(module, factor) for module in found if module not in forwards}
        forwards |= agreeing(rest, _probe)
    return Exchanged("norms", len(found), forwards)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    is_vector = isinstance(weight, Tensor) and weight.dim() == 1 and not weight.requires_grad
    return is_vector and "RMSNorm" in type(module).__name__


def _probe(norm: Any) -> Tensor:
    return probe_rows(len(norm.weight), norm)


def _weight(weight: Tensor) -> Tensor:
    return weight


def _one_plus_weight(weight: Tensor) -> Tensor:
    """As in Gemma: exact, because near 1 the weight itself would lose its digits in 16 bits."""
    return weight.float() + 1.0


def _fused(module: Any, factor: Factor) -> Forward:
    plain: Forward = module.forward
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), 0.0)

    def forward(hidden_states: Tensor) -> Any:
        weight = module.weight
        fits = weight.dtype == hidden_states.dtype and not weight.requires_grad
        return rms_norm(hidden_states, factor(weight), eps) if fits else plain(hidden_states)

    return forward
