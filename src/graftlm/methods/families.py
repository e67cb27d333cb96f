"""Roles of modules (`attention`, `mlp`, `all-linear`), read off the structure of any `transformers` model.

Architectures say what their layers are: attention lies below a component whose name contains `attn` or
`attention`, and the rest of a numbered block is its feed-forward part. That holds for every decoder, encoder
and encoder-decoder that the tests build, so there is no table to keep up with new models.
"""

from __future__ import annotations

import re

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from graftlm.methods.site import Site, base_modules

ROLES = ("all-linear", "attention", "mlp")
BLOCK = re.compile(r"^(?:.*?\.)?\d+\.(?P<inside>.+)$")
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)$")
"""Routers choose experts; adapting them unless asked unbalances the choice."""


def roles_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Module paths by role, in model order.

    `all-linear` is every linear layer of the backbone: the output head and classification heads are not part
    of it, and neither are routers of experts.
    """
    found: dict[str, list[str]] = {role: [] for role in ROLES}
    for path in _linear_paths(model):
        block = BLOCK.match(path)
        inside = block["inside"] if block else ""
        if ROUTER.search(inside):
            continue
        found["all-linear"].append(path)
        if inside:
            found["attention" if ATTENTION.search(inside) else "mlp"].append(path)
    return {role: tuple(paths) for role, paths in found.items()}


def _linear_paths(model: nn.Module) -> list[str]:
    """Linear layers below the backbone, or below the model where it has no separate backbone."""
    backbone = getattr(model, "base_model_prefix", "")
    prefix = f"{backbone}." if backbone and isinstance(getattr(model, backbone, None), nn.Module) else ""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    head = head.base_layer if isinstance(head, Site) else head
    return [
        path
        for path, module in base_modules(model).items()
        if is_linear(module) and module is not head and path.startswith(prefix)
    ]


def is_linear(module: nn.Module) -> bool:
    """Linear layers that are called. `nn.MultiheadAttention` only reads the weight of the one it has."""
    return isinstance(module, nn.Linear | Conv1D) and not isinstance(module, NonDynamicallyQuantizableLinear)
