"""One call of a stack of layers with virtual tokens: its arguments before, what it returns after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache

from graftlm.core.errors import AdapterError, ModelError
from graftlm.methods.virtual.cache import Recording, States, is_filled, new_cache, prefixed
from graftlm.methods.virtual.checkpointing import is_checkpointed
from graftlm.methods.virtual.masks import (
    is_flat,
    mask_of_packed,
    real_positions,
    virtual_positions,
    with_columns,
)
from graftlm.methods.virtual.output import in_order, without_front
from graftlm.methods.virtual.rows import Layout, Rows, joined
from graftlm.methods.virtual.stacks import Facts

HELD = "graft_virtual_states"
"""On a cache: keys and values of the input's virtual tokens, by group; the cache does not count them."""

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """A call in progress, and what its caller must not see of it."""

    rows: Rows
    cache: Cache | None
    """Holds the real tokens afterwards."""
    view: Cache | None
    """Stands in for it."""
    recording: Recording | None
    fresh: int
    """Virtual positions in front of the input."""
    length: int
    """Real positions of the input."""
    shift: Tensor | None
    """[B, 1] columns that a row lacks in front, where the stack must read every row from its first on."""
    positions: Tensor | None
    """[B, length] where the stack would count the same positions for every row."""

    def result(self, output: Any, kept: int, *, is_whole: bool, pools_first: bool) -> Any:
        """The output as without virtual tokens, but for the last `kept` of them; `is_whole`: for all."""
        if self.recording is not None:
            setattr(self.cache, HELD, _held(self.rows, self.recording))
        total = self.fresh + self.length
        order = None if self.shift is None or pools_first else _columns(total, -self.shift)
        hidden = 0 if is_whole or pools_first else self.fresh - kept
        return without_front(output, hidden, total, order=order, view=self.view, cache=self.cache)


def begin(stack: nn.Module, facts: Facts, rows: Rows, given: Arguments) -> Call:
    """Edit the arguments of a call so that every row finds its virtual tokens in front.

    Raises:
        AdapterError: a batch other than what was routed, or a cache that was begun without the prompt.
        ModelError: a mask or positions of a kind that leaves open what virtual tokens see.
    """
    inputs: Tensor = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
    batch, length = inputs.shape[:2]
    if rows.index is not None and len(rows.index) != batch:
        raise AdapterError(f"The stack got {batch} rows, but {len(rows.index)} were routed.")
    own: Cache | None = given.get("past_key_values")
    is_start = not is_filled(own)
    prefixes = [joined([part.states() for part in group.cached], 3) for group in rows.groups]
    prompts = _embeddings(rows)
    prefix = rows.layout([_count(one, 3) for one in prefixes], inputs.device)
    prompt = rows.layout([_count(one, 0) for one in prompts], inputs.device)
    fresh = prompt.width if is_start else 0
    cache = _cache_of(stack, facts, given)
    shape = (batch, _past(own) + length)
    positions = _positions(facts, given, prefix, prompt, fresh, shape, inputs)
    given["attention_mask"] = _mask(stack, facts, given, (prefix, prompt), fresh, shape, cache)
    if "position_ids" in facts.arguments:
        given["position_ids"] = positions
    states = _by_layer(rows.spread(prefixes, 3))
    if not is_start:
        states = _one_after_the_other(states, _held_states(rows, own))
    recording = Recording(fresh) if fresh and cache is not None else None
    view = None
    if states or recording is not None:
        view = given["past_key_values"] = prefixed(cache, states, recording, is_decoder=facts.is_decoder)
    if fresh:
        _put_in_front(stack, given, rows.spread(prompts, 0))
    shift = None
    if fresh and not facts.is_causal and isinstance(prompt.count, Tensor):
        shift = fresh - prompt.count
        _start_at_first(given, _columns(fresh + length, shift))
    counted = None
    if "position_ids" not in facts.arguments and isinstance(prefix.count, Tensor):
        counted = torch.arange(length, device=inputs.device) + (prefix.count + _past(own))
    return Call(rows, cache, view, recording, fresh, length, shift, counted)


def _embeddings(rows: Rows) -> list[Tensor | None]:
    return [joined([part.embeddings() for part in group.inputs], 0) for group in rows.groups]


def _by_layer(states: Tensor | None) -> dict[int, States]:
    """[rows, layers, 2, heads, tokens, head dim] as keys and values of each layer."""
    layers = () if states is None else states.unbind(1)
    return {number: (layer[:, 0], layer[:, 1]) for number, layer in enumerate(layers)}


def _held_states(rows: Rows, cache: Cache | None) -> dict[int, States]:
    """Keys and values of each row's prompt by layer, as they were when the cache was begun."""
    held: dict[tuple[str, ...], dict[int, States]] = getattr(cache, HELD, {})
    prompted = [group.name for group in rows.groups if group.inputs]
    missing = [name for name in prompted if name not in held]
    if missing:
        raise AdapterError(
            f"The cache was not begun with the prompt of {', '.join(map(repr, missing[0]))}.",
            meaning="A prompt stands before the first token, and that was read without it.",
            fix="Begin a new cache where the active adapters change.",
        )
    found: dict[int, States] = {}
    for layer in held[prompted[0]] if prompted else ():
        own = [held[group.name][layer] if group.inputs else None for group in rows.groups]
        keys = rows.spread([None if one is None else one[0] for one in own], 1)
        values = rows.spread([None if one is None else one[1] for one in own], 1)
        assert keys is not None and values is not None
        found[layer] = (keys, values)
    return found


def _held(rows: Rows, recording: Recording) -> dict[tuple[str, ...], dict[int, States]]:
    """The recorded states by group and layer, [heads, tokens, head dim]: rows of a group have the same."""
    found = {}
    for group in rows.groups:
        count = sum(len(part.embeddings()) for part in group.inputs)
        if count:
            start, row = recording.width - count, group.first_row
            found[group.name] = {
                layer: (keys[row, :, start:], values[row, :, start:])
                for layer, (keys, values) in recording.layers.items()
            }
    return found


def _one_after_the_other(first: dict[int, States], then: dict[int, States]) -> dict[int, States]:
    if not first or not then:
        return first or then
    return {
        layer: (_joined(first[layer][0], k), _joined(first[layer][1], v)) for layer, (k, v) in then.items()
    }


def _joined(first: Tensor, then: Tensor) -> Tensor:
    """Along the tokens; one row stands for all."""
    rows = max(len(first), len(then))
    return torch.cat([one.expand(rows, -1, -1, -1) for one in (first, then)], dim=2)


def _cache_of(stack: nn.Module, facts: Facts, given: Arguments) -> Cache | None:
    """What is to hold the real tokens: the caller's cache, a new one as the stack would make it, or none."""
    cache: Cache | None = given.get("past_key_values")
    use = given.get("use_cache")
    use = getattr(stack.config, "use_cache", False) if use is None else use
    if not facts.is_causal or is_checkpointed(stack) or not (use or cache is not None):
        return None
    return new_cache(stack.config, is_decoder=facts.is_decoder) if cache is None else cache


def _positions(
    facts: Facts,
    given: Arguments,
    prefix: Layout,
    prompt: Layout,
    fresh: int,
    shape: tuple[int, Any],
    inputs: Tensor,
) -> Tensor | None:
    """Position ids with virtual tokens first; None where the stack itself counts right."""
    length, device = inputs.shape[1], inputs.device
    positions, start = given.get("position_ids"), 0
    count = prefix.count + prompt.count
    if positions is None:
        counted = real_positions(given.get("attention_mask"), length) if facts.is_causal else None
        if counted is None and isinstance(count, int):
            return None
        start = facts.first_position
        plain = torch.arange(length, device=device).unsqueeze(0) + (shape[1] - length + start)
        positions = plain if counted is None else counted
        if counted is not None and isinstance(count, Tensor):
            positions = torch.where(count > 0, counted, plain)  # rows of the base count as the base does
    elif positions.dim() != 2:
        raise ModelError(
            f"Virtual tokens need position_ids of shape [batch, tokens], not {list(positions.shape)}.",
            fix="Leave position_ids out.",
        )
    positions = positions + count
    if fresh:
        virtual = virtual_positions(fresh, start + prefix.count, prompt.count, device)
        batch = max(len(virtual), len(positions))
        positions = torch.cat((virtual.expand(batch, -1), positions.expand(batch, -1)), dim=1)
    return positions


def _mask(
    stack: nn.Module,
    facts: Facts,
    given: Arguments,
    layouts: tuple[Layout, Layout],
    fresh: int,
    shape: tuple[int, Any],
    cache: Cache | None,
) -> Any:
    mask, positions = given.get("attention_mask"), given.get("position_ids")  # as the caller gave them
    if mask is None and is_flat(stack, given):
        return None  # its attention knows where documents start, and shows each of them what stands before
    before = sum(layout.width for layout in layouts)
    seen = _seen(layouts, shape[0])
    if mask is None and facts.is_causal and cache is None and positions is not None:
        mask = mask_of_packed(stack, positions.expand(shape[0], -1), before)
    if mask is None and seen is not None:
        mask = torch.ones(shape[0], int(shape[1]), dtype=torch.long, device=seen.device)
    return None if mask is None else with_columns(mask, before, fresh, seen, is_causal=facts.is_causal)


def _seen(layouts: Sequence[Layout], batch: int) -> Tensor | None:
    """Which of all virtual columns each row has."""
    some = next((layout.seen for layout in layouts if layout.seen is not None), None)
    if some is None:
        return None
    every = [some.new_ones(batch, one.width) if one.seen is None else one.seen for one in layouts]
    return torch.cat(every, dim=1)


def _put_in_front(stack: Any, given: Arguments, virtual: Tensor | None) -> None:
    assert virtual is not None
    real = given.get("inputs_embeds")
    if real is None:
        real = stack.get_input_embeddings()(given["input_ids"])
    virtual = virtual.to(real.device, real.dtype).expand(real.shape[0], -1, -1)
    given["inputs_embeds"], given["input_ids"] = torch.cat((virtual, real), dim=1), None
    if given.get("token_type_ids") is not None:
        given["token_type_ids"] = F.pad(given["token_type_ids"], (virtual.shape[1], 0))


def _start_at_first(given: Arguments, order: Tensor) -> None:
    """Move what a row lacks from the front to the end, like padding: the first may mean something."""
    for name, dim in (("inputs_embeds", 1), ("token_type_ids", 1), ("position_ids", 1)):
        if given.get(name) is not None:
            given[name] = in_order(given[name].expand(len(order), *given[name].shape[1:]), order, dim)
    mask, total = given["attention_mask"], order.shape[1]
    before = mask.shape[1] - total
    given["attention_mask"] = torch.cat((mask[:, :before], in_order(mask[:, before:], order, 1)), dim=1)


def _columns(total: int, shift: Tensor) -> Tensor:
    """Column numbers [B, total], each row's turned left by its `shift`."""
    return (torch.arange(total, device=shift.device) + shift) % total


def _count(tokens: Tensor | None, dim: int) -> int:
    return 0 if tokens is None else tokens.shape[dim]


def _past(cache: Cache | None) -> Any:
    return 0 if cache is None else cache.get_seq_length()
