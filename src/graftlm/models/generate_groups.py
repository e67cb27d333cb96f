"""Several drawn answers to each prompt: its keys are computed once, and finished answers leave the batch.

`transformers`' `generate` computes a prompt anew for each of its answers and carries finished ones to the end
of the longest. This loop does neither. Whether a model takes it is found out by a probe, once: where the
loop's likeliest tokens are not those of `generate`, `generate` writes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.core.errors import GraftError
from graftlm.models.generate import (
    Generated,
    Sampling,
    StopFlag,
    context_length,
    cut,
    evaluation_mode,
    generate_ids,
    input_device,
    seeded,
)

PROBE, PROBED = ((3, 5, 7, 4), (6, 4)), 3
"""Prompts of the probe, and how many tokens are written to them."""
SHRINK = 0.75
"""The batch is made smaller when no more than this share of it is still written to."""


class GroupWriter:
    """Draws answers for groups, in the way that the model takes; `why` says why it is not the loop."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.why = _obstacle(model)

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        count: int,
        *,
        max_new_tokens: int,
        stop_ids: Iterable[int],
        sampling: Sampling,
        rows_per_batch: int,
        should_stop: StopFlag,
    ) -> list[Generated]:
        """`count` answers to every prompt, those of the first one first.

        `sampling.seed`, prompts, `count` and `rows_per_batch` fix the draw; the global random state is left
        as it was. Answers not yet begun when `should_stop` says so are "cancelled".

        Raises:
            ModelError: as `generate_ids`.
        """
        limit, ends = context_length(self.model), frozenset(stop_ids)
        rooms = [max_new_tokens if limit is None else min(max_new_tokens, limit - len(p)) for p in prompts]
        if self.why or min(rooms, default=1) < max_new_tokens or not all(prompts):
            return generate_ids(
                self.model,
                [prompt for prompt in prompts for _ in range(count)],
                max_new_tokens=max_new_tokens,
                stop_ids=ends,
                sampling=sampling,
                rows_per_batch=rows_per_batch,
                should_stop=should_stop,
            )
        found: dict[int, list[Generated]] = {}
        with evaluation_mode(self.model), seeded(self.model, sampling):
            for places in _batches(prompts, max(1, rows_per_batch // count)):
                if should_stop():
                    break
                some = [prompts[place] for place in places]
                for row, tokens in enumerate(
                    _written(self.model, some, count, max_new_tokens, ends, sampling)
                ):
                    answer = cut(tokens, ends, max_new_tokens, max_new_tokens)
                    found.setdefault(places[row // count], []).append(answer)
        nothing = [Generated((), "cancelled")] * count
        return [*chain.from_iterable(found.get(place, nothing) for place in range(len(prompts)))]


def _batches(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Places of prompts of like length."""
    order = sorted(range(len(prompts)), key=lambda place: (len(prompts[place]), place))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _written(
    model: Any,
    prompts: Sequence[Sequence[int]],
    count: int,
    new_tokens: int,
    ends: frozenset[int],
    sampling: Sampling | None,
) -> list[list[int]]:
    """New tokens of each answer, up to its end token; the likeliest ones without `sampling`."""
    from transformers import DynamicCache

    ids, mask = _padded(prompts, input_device(model))
    cache = DynamicCache(config=model.config)
    logits = _next_logits(model, ids, mask, cache)
    if count > 1:
        cache.batch_repeat_interleave(count)
        logits, mask = (values.repeat_interleave(count, dim=0) for values in (logits, mask))
    stops = torch.tensor(sorted(ends), dtype=torch.long, device=mask.device)
    rows: list[list[int]] = [[] for _ in range(len(logits))]
    places = torch.arange(len(rows), device=mask.device)  # of the answers in the batch
    is_open = torch.ones_like(places, dtype=torch.bool)
    for step in range(new_tokens):
        chosen = _chosen(logits, sampling)
        for place, token, goes_on in zip(places.tolist(), chosen.tolist(), is_open.tolist(), strict=True):
            if goes_on:
                rows[place].append(token)
        is_open &= ~torch.isin(chosen, stops)
        left = int(is_open.sum())
        if left == 0 or step + 1 == new_tokens:
            break
        if left <= SHRINK * len(is_open):
            index = is_open.nonzero().flatten()
            cache.batch_select_indices(index)
            places, chosen, mask, is_open = (v[index] for v in (places, chosen, mask, is_open))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = _next_logits(model, chosen.unsqueeze(1), mask, cache)
    return rows


def _next_logits(model: Any, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
    """Logits behind the last token of each row, in float32. Shape: [rows, vocabulary]."""
    positions = (mask.cumsum(-1) - 1).clamp_(min=0)[:, -ids.shape[1] :]
    known: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
    taken = inspect.signature(model.forward).parameters
    extra = {name: value for name, value in known.items() if name in taken}
    found = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
    logits: Tensor = found.logits[:, -1].float()
    return logits


def _chosen(logits: Tensor, sampling: Sampling | None) -> Tensor:
    """A token for each row: drawn, or the likeliest. Shape: [rows]."""
    if sampling is None:
        return logits.argmax(-1)
    shares = (logits / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, places = shares.sort(dim=-1, descending=True)
        # What stands before a token decides: the likeliest one always stays.
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= sampling.top_p, 0.0)
        shares = torch.zeros_like(shares).scatter_(-1, places, ordered)
    return torch.multinomial(shares, 1).squeeze(1)


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [rows, longest], padded on the left."""
    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _obstacle(model: Any) -> str:
    """Why the loop does not do for this model; "" where it gives what `generate` gives."""
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 8))
    prompts = [[token % vocabulary for token in prompt] for prompt in PROBE]
    try:
        with evaluation_mode(model):
            ours = _written(model, prompts, 2, PROBED, frozenset(), None)
    except GraftError as error:
        return error.seen.rstrip(".")
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError) as error:
        return f"its cache is of another kind: {type(error).__name__}"
    theirs = generate_ids(model, prompts, max_new_tokens=PROBED, stop_ids=())
    same = all(list(each.token_ids) == ours[2 * place + twin]
               for place, each in enumerate(theirs) for twin in (0, 1))  # fmt: skip
    return "" if same else "it writes other tokens than generate"
