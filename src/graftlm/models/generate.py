"""Text from a causal model: batched, left-padded, with the KV cache, the same whatever the batch.

Decoding is `transformers`' own `generate`, so every architecture and every adapter that works there works
here. What this file adds: plain settings whatever the model's `generation_config` recommends, the context
limit, batches of like length, and cutting at end tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from graftlm.core.allocation import return_freed
from graftlm.core.errors import ModelError
from graftlm.methods.attach import adapters_of
from graftlm.methods.virtual.stacks import first_position
from graftlm.quant.facts import device_of

Finish = Literal["end", "length", "context", "cancelled"]
Progress = Callable[[int, int], None]
"""Called with (rows done, rows in all)."""
StopFlag = Callable[[], bool]

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|return|>", "<|end_of_turn|>")
"""Tokens that end an answer in the common chat templates; base models seldom list them as end tokens."""


@dataclass(frozen=True)
class Sampling:
    """Draw tokens instead of taking the likeliest; `seed`, prompts and batch size fix the draw."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """New token ids of one prompt, without the end token, why they end there, and the end token if one came.

    `finish`: "end" (end token), "length" (`max_new_tokens`), "context" (the model's context is full),
    "cancelled" (the stop flag was raised before this prompt's turn).
    """

    token_ids: tuple[int, ...]
    finish: Finish
    end_id: int | None = None


def generate_text(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    stop_ids: Iterable[int] | None = None,
    sampling: Sampling | None = None,
    rows_per_batch: int = 16,
) -> list[str]:
    """The decoded continuation of every prompt (token ids), in their order; greedy without `sampling`.

    Raises:
        ModelError: see `generate_ids`.
    """
    ends = stop_token_ids(model, tokenizer) if stop_ids is None else tuple(stop_ids)
    results = generate_ids(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=ends,
        sampling=sampling,
        rows_per_batch=rows_per_batch,
    )
    return [decode(tokenizer, result.token_ids) for result in results]


def generate_ids(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Iterable[int],
    sampling: Sampling | None = None,
    rows_per_batch: int = 16,
    progress: Progress | None = None,
    should_stop: StopFlag | None = None,
) -> list[Generated]:
    """Continue every prompt by at most `max_new_tokens` tokens.

    Prompts are batched by length and padded on the left; greedy output does not depend on the batch
    beyond rounding. The model's training flags, `generation_config` and the global random state are left
    as they were.

    Raises:
        ModelError: an empty prompt, a prompt that leaves no room in the context, or an encoder-decoder model.
    """
    limit = context_length(model)
    _require_usable(model, prompts, limit)
    ends = frozenset(stop_ids)
    results = [Generated((), "cancelled")] * len(prompts)
    done = 0
    with evaluation_mode(model), plain_generation(model), seeded(model, sampling):
        for batch, new_tokens in _batches(prompts, max_new_tokens, limit, rows_per_batch):
            if should_stop is not None and should_stop():
                break
            drawn = _decode_batch(model, [prompts[i] for i in batch], new_tokens, ends, sampling)
            for index, tokens in zip(batch, drawn, strict=True):
                room = _room(len(prompts[index]), max_new_tokens, limit)
                results[index] = cut(tokens, ends, room, max_new_tokens)
            done += len(batch)
            return_freed()  # a cache that grew token by token leaves holes that the next one does not fit
            if progress is not None:
                progress(done, len(prompts))
    return results


def stop_token_ids(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends an answer: the tokenizer's, the generation config's, the chat templates'."""
    config = getattr(model, "generation_config", None)
    listed = getattr(config, "eos_token_id", None)
    found = set(listed if isinstance(listed, list | tuple) else [listed])
    found.add(getattr(tokenizer, "eos_token_id", None))
    special = tokenizer.get_added_vocab()
    found.update(special[name] for name in END_OF_TURN if name in special)
    return tuple(sorted(int(token) for token in found if token is not None))


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Token ids to text: special tokens dropped, spaces untouched."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


def context_length(model: nn.Module) -> int | None:
    """How many positions are there for text; None where the model's config does not say.

    Those that active adapters occupy (prompts and prefixes) do not count.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(text, "max_position_embeddings", None)
    adapters = adapters_of(model)
    taken = sum(adapters.config(name).positions_taken for name in adapters.active) if adapters else 0
    taken += first_position(getattr(model, "base_model", model))
    return int(length) - taken if isinstance(length, int) and length > 0 else None


def input_device(model: nn.Module) -> torch.device:
    """The device on which token ids are expected."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    source = embeddings if isinstance(embeddings, nn.Module) else model
    return device_of(source if next(source.parameters(), None) is not None else model)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout; every module's own training flag comes back afterwards.

    Inside, the output head reads its rows one after another. Torch multiplies a frozen weight with a slice
    of three dimensions, such as the last token of each row, by copying the weight once for every row.
    """
    training = [module for module in model.modules() if module.training]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    hook = head.register_forward_pre_hook(_one_after_another) if isinstance(head, nn.Module) else None
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if hook is not None:
            hook.remove()
        for module in training:
            module.training = True


def _one_after_another(_head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not inputs or not isinstance(inputs[0], torch.Tensor) or inputs[0].dim() < 3:
        return None
    states, *rest = inputs
    return (states.flatten(0, -2).contiguous().view(states.shape), *rest)


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Hide the model's recommended settings: `generate` would fill every unset field from them."""
    from transformers import GenerationConfig

    recommended = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = recommended


@contextmanager
def seeded(model: nn.Module, sampling: Sampling | None) -> Iterator[None]:
    """Draws inside depend on the seed alone; the global random state is left as it was."""
    if sampling is None:
        yield
        return
    device = input_device(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        yield


def _require_usable(model: nn.Module, prompts: Sequence[Sequence[int]], limit: int | None) -> None:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder model.",
            meaning="A prompt that is continued needs a causal model.",
            fix="Load a causal model; models.generate_answers writes for encoder-decoders.",
        )
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ModelError(
                f"Prompt {number} is empty.", fix="Start it with the begin token, or leave it out."
            )
        if limit is not None and len(prompt) >= limit:
            raise ModelError(
                f"Prompt {number} has {len(prompt)} tokens; the model's context is {limit}.",
                meaning="No room is left for an answer.",
                fix="Encode with a smaller max_length, or leave the row out.",
            )


def _room(length: int, wanted: int, limit: int | None) -> int:
    return wanted if limit is None else min(wanted, limit - length)


def _batches(
    prompts: Sequence[Sequence[int]], wanted: int, limit: int | None, rows: int
) -> Iterator[tuple[list[int], int]]:
    """Indices by length, with the tokens that the batch may generate; no row is run past the context."""
    batch: list[int] = []
    new_tokens = 0
    for index in sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i)):
        length = len(prompts[index])
        needed = max(new_tokens, _room(length, wanted, limit))
        if batch and (len(batch) == rows or (limit is not None and length + needed > limit)):
            yield batch, new_tokens
            batch, needed = [], _room(length, wanted, limit)
        batch.append(index)
        new_tokens = needed
    if batch:
        yield batch, new_tokens


def _decode_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    ends: frozenset[int],
    sampling: Sampling | None,
) -> list[list[int]]:
    """New tokens of every prompt, still with whatever follows an end token."""
    from transformers import GenerationConfig

    longest = max(map(len, prompts))
    device = input_device(model)
    last = {prompt[-1] for prompt in prompts}
    pad = next(token for token in (*sorted(ends), *range(len(last) + 1)) if token not in last)
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    how: dict[str, Any] = {"do_sample": False}
    if sampling is not None:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        num_beams=1,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=sorted(ends) or None,
        **how,
    )
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    rows: list[list[int]] = output[:, longest:].tolist()
    return rows


def cut(tokens: Sequence[int], ends: frozenset[int], room: int, wanted: int) -> Generated:
    """The tokens before the first end token, at most `room`; `wanted` would have been allowed."""
    for place, token in enumerate(tokens[:room]):
        if token in ends:
            return Generated(tuple(tokens[:place]), "end", token)
    return Generated(tuple(tokens[:room]), "length" if room == wanted else "context")
