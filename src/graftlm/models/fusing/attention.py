"""Causal attention over documents in a row, in place of the model's own, while it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.core.errors import GraftError
from graftlm.data.batches import Batch
from graftlm.data.forms import DOCUMENTS, for_attention
from graftlm.methods.families import blocks_of
from graftlm.models.fusing.document_attention import SEEN, Call, note_form, register
from graftlm.models.generate import evaluation_mode
from graftlm.quant.facts import device_of, dtype_of

WIDTH, MISSING = 6, (0, 2)
"""Tokens of a row of the probe, and how many each row lacks."""
NEAR = {torch.float64: 1e-6, torch.float32: 1e-3}
"""How far the model's hidden states may be from its own, relative to their size; in 16 bits:"""
NEAR_IN_16_BITS = 0.05
DIFFERS = "another result"


@dataclass(frozen=True)
class AttentionLayers:
    """The attention layers of a model, all of them or none (`why`): what lies between must be of one kind."""

    stack: nn.Module
    configs: tuple[Any, ...]
    """What the layers, and who makes their masks, read the name of the implementation from."""
    total: int
    way: str
    why: str

    @property
    def summary(self) -> str:
        """As every `FasterPart`: "8 of 8 attention layers (native kernel)"."""
        count = 0 if self.why else self.total
        return f"{count} of {self.total} attention layers ({self.why or self.way})"

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the model takes flat batches, and every other kind as before."""
        if self.why:
            yield
            return
        register()
        with _implementation(self.stack, self.configs):
            yield


@contextmanager
def _implementation(stack: nn.Module, configs: tuple[Any, ...]) -> Iterator[None]:
    with ExitStack() as undo:
        for config in configs:
            undo.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = DOCUMENTS
        undo.callback(stack.register_forward_pre_hook(note_form, with_kwargs=True).remove)
        yield


def attention_layers(model: nn.Module) -> AttentionLayers:
    """The attention layers of a causal model, if two documents in one row give what they give by its own."""
    stack = getattr(model, "base_model", model)
    total = sum(not attention.is_cross for block in blocks_of(model) for attention in block.attentions)
    why = _against(model, total)
    if why:
        return AttentionLayers(stack, (), total, "", why)
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    held = [getattr(module, "config", None) for module in (*stack.modules(), model)]
    configs = tuple({id(config): config for config in held if type(config) is type(text)}.values())
    calls, why = _probed(model, stack, configs)
    if why in ("", DIFFERS):
        why = _against_calls(calls, text, total) or why
    return AttentionLayers(stack, configs, total, "" if why else _way(calls), why)


def _against(model: Any, total: int) -> str:
    """What speaks against it before anything is run."""
    if total == 0 or not hasattr(getattr(model, "config", None), "get_text_config"):
        return "none that transformers calls"
    if getattr(model.config, "is_encoder_decoder", False):
        return "an encoder-decoder"
    text = model.config.get_text_config()
    if text._attn_implementation not in ("sdpa", "eager"):
        return f"the model runs {text._attn_implementation}"
    odd = sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if odd:
        return f"layers of another kind: {', '.join(odd)}"
    device = device_of(model).type
    return "" if device in ("cpu", "cuda") else f"not on {device}"


def _probed(model: nn.Module, stack: nn.Module, configs: tuple[Any, ...]) -> tuple[list[Call], str]:
    """The calls of attention that a probe made, and why its result does not do."""
    padded = _batch(model)
    flat = for_attention(padded, DOCUMENTS, dtype_of(model))
    calls: list[Call] = []
    register()
    try:
        with evaluation_mode(model):
            expected = _hidden(stack, padded)
            with _implementation(stack, configs):
                found = _hidden(stack, flat, **{SEEN: calls})[0]
    except GraftError as error:
        return calls, error.seen.rstrip(".")
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        return calls, f"documents in one row do not run: {type(error).__name__}"
    expected = torch.cat([row[: len(row) - missing] for row, missing in zip(expected, MISSING, strict=True)])
    difference, size = (found - expected).float().norm(dim=-1), expected.float().norm(dim=-1)
    near = NEAR.get(expected.dtype, NEAR_IN_16_BITS)
    return calls, "" if bool((difference <= near * size).all()) else DIFFERS


def _batch(model: Any) -> Batch:
    """Two rows, the second of them padded."""
    ids = torch.arange(3, 3 + 2 * WIDTH, device=device_of(model)).view(2, WIDTH)
    ids = ids.remainder(getattr(model.config.get_text_config(), "vocab_size", 2 * WIDTH))
    mask = torch.ones_like(ids)
    mask[1, -MISSING[1] :] = 0
    documents = tuple((WIDTH - missing,) for missing in MISSING)
    return Batch({"input_ids": ids, "attention_mask": mask}, ids, 0, int(mask.sum()), (), documents)


def _hidden(stack: nn.Module, batch: Batch, **more: Any) -> Tensor:
    hidden: Tensor = stack(**batch.inputs, **more, use_cache=False)[0]
    return hidden


def _against_calls(calls: list[Call], text: Any, total: int) -> str:
    """What a probe of a few tokens cannot show by its result."""
    layers = list({id(call.layer): call for call in calls}.values())
    count = getattr(text, "num_hidden_layers", total)
    if not len(layers) == total == count:
        return f"{len(layers)} of {count} layers ask transformers for it"
    for number, call in enumerate(layers):
        if call.window != _window(text, getattr(call.layer, "layer_idx", None) or number):
            return "its sliding window is in the mask only"
    if device_of(layers[0].layer).type != "cpu" and _way(layers) != "torch varlen":
        return "no attention over documents for this device and dtype"
    return ""


def _window(text: Any, layer: int) -> int | None:
    """The sliding window of a layer, by the config."""
    kinds, window = getattr(text, "layer_types", None), getattr(text, "sliding_window", None)
    slides = kinds[layer] == "sliding_attention" if kinds else getattr(text, "use_sliding_window", True)
    return window if slides else None


def _way(calls: list[Call]) -> str:
    return ", ".join(sorted({call.way for call in calls}))
