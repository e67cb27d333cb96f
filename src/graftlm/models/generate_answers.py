"""Text from an encoder-decoder: what its decoder writes to each source, greedily, drawn, or by beam search.

As `models.generate` does for causal models, by `transformers`' own `generate`. Sources are padded on the
right and masked; the decoder begins as the model's config says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from graftlm.core.errors import ModelError
from graftlm.models.encoder_decoder import require_encoder_decoder, start_token
from graftlm.models.generate import (
    Generated,
    Progress,
    Sampling,
    StopFlag,
    context_length,
    cut,
    evaluation_mode,
    input_device,
    plain_generation,
    seeded,
)


def generate_answers(
    model: nn.Module,
    sources: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Iterable[int],
    sampling: Sampling | None = None,
    num_beams: int = 1,
    rows_per_batch: int = 16,
    progress: Progress | None = None,
    should_stop: StopFlag | None = None,
) -> list[Generated]:
    """Write at most `max_new_tokens` tokens to every source (token ids), in their order.

    Sources are batched by length; greedy output does not depend on the batch beyond rounding. `num_beams`
    above 1 keeps that many beginnings of each answer (no sampling then).

    Raises:
        ModelError: a causal model, an empty source, or one longer than the model's context.
    """
    require_encoder_decoder(model)
    limit = context_length(model)
    _require_usable(sources, limit)
    ends = frozenset(stop_ids)
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - 1)  # the start token takes one
    bos = getattr(getattr(model, "generation_config", None), "forced_bos_token_id", None)
    settings = _settings(model, room, ends, sampling, num_beams) | {"forced_bos_token_id": bos}
    results = [Generated((), "cancelled")] * len(sources)
    order = sorted(range(len(sources)), key=lambda index: (len(sources[index]), index))
    with evaluation_mode(model), plain_generation(model), seeded(model, sampling):
        for start in range(0, len(order), rows_per_batch):
            if should_stop is not None and should_stop():
                break
            batch = order[start : start + rows_per_batch]
            drawn = _write(model, [sources[index] for index in batch], settings)
            for index, tokens in zip(batch, drawn, strict=True):
                results[index] = cut(tokens, ends, room, max_new_tokens)
            if progress is not None:
                progress(start + len(batch), len(sources))
    return results


def _require_usable(sources: Sequence[Sequence[int]], limit: int | None) -> None:
    for number, source in enumerate(sources):
        if not len(source):
            raise ModelError(f"Source {number} is empty.", fix="Leave it out.")
        if limit is not None and len(source) > limit:
            raise ModelError(
                f"Source {number} has {len(source)} tokens; the model's context is {limit}.",
                fix="Encode with a smaller max_length, or leave the row out.",
            )


def _settings(
    model: Any, room: int, ends: frozenset[int], sampling: Sampling | None, num_beams: int
) -> dict[str, Any]:
    how: dict[str, Any] = {"do_sample": False, "num_beams": num_beams}
    if sampling is not None:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    pad = model.config.pad_token_id
    return {
        "max_new_tokens": room,
        "use_cache": True,
        "decoder_start_token_id": start_token(model),
        "pad_token_id": 0 if pad is None else pad,
        "eos_token_id": sorted(ends) or None,
        **how,
    }


def _write(model: Any, sources: Sequence[Sequence[int]], settings: dict[str, Any]) -> list[list[int]]:
    """New tokens to every source, still with whatever follows an end token."""
    from transformers import GenerationConfig

    longest, device = max(map(len, sources)), input_device(model)
    gaps = [longest - len(source) for source in sources]
    pairs = list(zip(sources, gaps, strict=True))
    pad = settings["pad_token_id"]
    ids = torch.tensor([[*source, *[pad] * gap] for source, gap in pairs], device=device)
    mask = torch.tensor([[1] * len(source) + [0] * gap for source, gap in pairs], device=device)
    config = GenerationConfig(**settings)
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    rows: list[list[int]] = output[:, 1:].tolist()  # behind the start token
    return rows
