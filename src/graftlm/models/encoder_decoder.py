"""What sets encoder-decoders apart: what the decoder reads while it is taught, and what its head is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.core.errors import ModelError


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether one half of the model reads and the other writes."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def require_encoder_decoder(model: nn.Module) -> None:
    """Refuse a model that has one half only, or an end that writes no text.

    Raises:
        ModelError: it is no encoder-decoder.
    """
    if is_encoder_decoder(model) and start_token(model) is not None:
        return
    if is_encoder_decoder(model):
        raise ModelError(
            f"{type(model).__name__} does not say what its decoder starts with.",
            meaning="Its config has no decoder_start_token_id.",
            fix="Add decoder_start_token_id to the checkpoint's config.json, as its authors describe it.",
        )
    raise ModelError(
        f"{type(model).__name__} is no encoder-decoder model.",
        meaning="Sources and targets in two halves are learnt by models such as T5 and BART.",
        fix="Use --task sft, which has a causal model continue the source, or choose another base.",
    )


def start_token(model: Any) -> int | None:
    """What the decoder reads first."""
    for config in (model.config, getattr(model, "generation_config", None)):
        found = getattr(config, "decoder_start_token_id", None)
        if found is not None:
            return int(found)
    return None


def decoder_ids(model: Any, target: Sequence[int]) -> tuple[int, ...]:
    """What the decoder reads while it writes `target`: as long, shifted by the model's own rule.

    For most models a start token and all but the last token; mBART turns the language mark to the front.
    """
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is None:
        return (int(start_token(model) or 0), *target[:-1])
    return tuple(own(labels=torch.tensor([list(target)]))[0].tolist())


@torch.no_grad()
def head_bias(model: Any) -> Tensor | None:
    """What is added to the logits behind the head, [vocabulary]; None where it is nothing."""
    bias = getattr(model, "final_logits_bias", None)
    return bias.flatten() if isinstance(bias, Tensor) and bool(bias.any()) else None


def head_input(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the output head is given at every position of the decoder: [B, T, width].

    The model itself is called, with all that it does before its head; the head sees one position only.
    """
    with _first_position_only(model.get_output_embeddings()) as seen:
        model(**inputs, use_cache=False)
    return seen[-1]


@contextmanager
def _first_position_only(head: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the head gets one position of what it is given; the whole is noted."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(given[0])
        return (given[0][:, :1], *given[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
