"""LLaMA-Adapter: trained tokens that the top attention layers attend to besides the text, through a gate that
begins at zero (Zhang et al. 2023, arXiv 2303.16199).

y = attention(x) + O(g softmax(q K' / sqrt(d)) V')        K', V': keys and values of the trained tokens
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core.errors import TargetError
from graftlm.methods.base import Layer, Maker, MethodConfig
from graftlm.methods.families import blocks_of
from graftlm.methods.site import Site, base_modules
from graftlm.methods.virtual.attention_gate import AttentionAdapter

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class AdaptionPromptConfig(MethodConfig):
    """LLaMA-Adapter on decoders with rotary positions and separate projections (Llama, Mistral), and GPT-2.

    >>> AdaptionPromptConfig(adapter_len=10, adapter_layers=30).adapter_layers
    30
    """

    peft_type: ClassVar[str] = "ADAPTION_PROMPT"

    adapter_len: int = Field(10, gt=0)
    """Trained tokens in each layer."""
    adapter_layers: int | None = Field(None, gt=0)
    """How many layers have them, counted from the top; None for all but the two lowest."""
    target_modules: str | None = None
    """Name of the attention modules; found by what they do without it."""

    @property
    def rate_scale(self) -> float:
        return 30.0

    def places(self, model: nn.Module) -> Mapping[str, Maker]:
        modules = base_modules(model)
        if self.target_modules is None:
            found = [a.path for block in blocks_of(model) for a in block.attentions if not a.is_cross]
        else:
            found = [path for path in modules if path.endswith(f".{self.target_modules}")]
        paths = [path for path in found if _is_known(modules[path])]
        count = self.adapter_layers or max(1, len(paths) - 2)
        if len(paths) < max(count, 1):
            raise TargetError(
                f"{type(model).__name__} has {len(paths)} attention layers of a known kind, not {count}.",
                meaning="Gated prompts need attention like Llama's (q_proj, k_proj, v_proj, o_proj).",
                fix="Use a smaller adapter_layers, or prefix tuning.",
            )
        return dict.fromkeys(paths[-count:], self._build)

    def _build(self, layer: Layer) -> AdaptionPrompt:
        return AdaptionPrompt(layer.module, self.adapter_len)


class AdaptionPrompt(AttentionAdapter):
    """The tokens of one layer and their gate. Shapes: adaption_prompt [1, n, hidden size], gate [1]."""

    def __init__(self, attention: Any, tokens: int) -> None:
        super().__init__()
        self._rotate = _rotation_of(attention)
        self.adaption_prompt = nn.Parameter(torch.randn(1, tokens, attention.config.hidden_size))
        self.adaption_gate = nn.Parameter(torch.zeros(1))

    def change(self, attention: Any, x: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        is_gpt2 = hasattr(attention, "c_attn")
        tokens = self.adaption_prompt.to(x.dtype)
        if is_gpt2:
            size = attention.split_size
            queries = _base(attention.c_attn)(x).split(size, dim=2)[0]
            keys, values = _base(attention.c_attn)(tokens).split(size, dim=2)[1:]
        else:
            queries = _base(attention.q_proj)(x)
            keys, values = _base(attention.k_proj)(tokens), _base(attention.v_proj)(tokens)
        queries, keys, values = (_by_head(one, attention.head_dim) for one in (queries, keys, values))
        if self._rotate is not None:
            queries, _ = self._rotate(queries, queries, *arguments["position_embeddings"])
        groups = queries.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
        scores = queries @ keys.transpose(2, 3) / math.sqrt(attention.head_dim)
        weights = self.adaption_gate * F.softmax(scores, dim=-1, dtype=torch.float32)
        seen: Tensor = (weights.to(x.dtype) @ values).transpose(1, 2).flatten(2)
        return seen if is_gpt2 else _base(attention.o_proj)(seen)


def _base(layer: Any) -> Callable[[Tensor], Tensor]:
    """The layer without adapters: changes of several are summed, so none depends on another."""
    found: Callable[[Tensor], Tensor] = layer.original if isinstance(layer, Site) else layer
    return found


def _is_known(attention: nn.Module) -> bool:
    """Whether queries are computed here as that attention computes them."""
    names = set(dict(attention.named_children()))
    if {"c_attn", "c_proj"} <= names:
        return True
    config: Any = getattr(attention, "config", None)
    rotary = {**(getattr(config, "rope_parameters", None) or {})}
    is_partial = rotary.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0)) != 1.0
    has_norms = any("norm" in name for name in names)
    is_plain = names.issuperset(PROJECTIONS) and not has_norms and not is_partial
    return is_plain and _rotation_of(attention) is not None


def _rotation_of(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The model's own rotary position embedding."""
    found: Callable[..., tuple[Tensor, Tensor]] | None
    found = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    return found


def _by_head(states: Tensor, head_dim: int) -> Tensor:
    """[B, T, heads x size] as [B, heads, T, size]."""
    return states.view(*states.shape[:2], -1, head_dim).transpose(1, 2)
