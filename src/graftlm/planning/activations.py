"""What a step keeps and takes at its worst moment, at any depth and batch: rehearsed, then on lines.

Layers of one kind add the same bytes each, and so does each row of a batch: two shallow rehearsals tell the
slope in depth, two batches that in rows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from graftlm.core.errors import GraftError
from graftlm.models.recompute.policy import Policy
from graftlm.planning.memory_setup import Setup
from graftlm.planning.rehearsal import Load, Stage, StepBytes

SHALLOW, DEEPER = 2, 4
"""Layers of the two rehearsals; a base of no more than twice as many is rehearsed as it is."""
MOST_STAGES = 12
FULL_ROWS = 2
"""Batches of one base, method and policy that are rehearsed; further ones lie on the line through them."""

T = TypeVar("T", StepBytes, float)


@dataclass
class _Known:
    """The stages of one base with one adapter."""

    stages: tuple[tuple[int, Stage], ...]
    """Number of layers, and the model."""
    layers: int
    steps: dict[tuple[Load, Policy, bool], StepBytes] = field(default_factory=dict)
    others: dict[tuple[str, int, int], float] = field(default_factory=dict)


_known: OrderedDict[tuple[str, ...], _Known] = OrderedDict()


def step_bytes(setup: Setup, policy: Policy) -> StepBytes:
    """Of one micro-batch, beyond the model's own tensors."""
    known = _stages(setup)
    key = (setup.load, policy, setup.is_first)
    if key not in known.steps:
        like = [one for one in known.steps if _differs_in_rows(one, key)]
        known.steps[key] = _on_line(known, key, like) if len(like) >= FULL_ROWS else _rehearsed(known, key)
    return known.steps[key]


def layer_bytes(setup: Setup) -> float:
    """What one layer keeps for backward where nothing is recomputed."""
    return step_bytes(setup, "nothing").kept / max(1, _stages(setup).layers)


def evaluation_bytes(setup: Setup, rows: int, length: int) -> float:
    """The most at a time while the loss of held-out rows is measured."""
    return _other(setup, "evaluation", rows, length, lambda stage: float(stage.evaluation(rows, length)))


def reading_bytes(setup: Setup, rows: int, length: int) -> float:
    """The most at a time while text is read and all its logits are formed."""
    return _other(setup, "reading", rows, length, lambda stage: float(stage.reading(rows, length)))


def possible_policies(setup: Setup) -> list[Policy]:
    """What can be recomputed in this model, from the cheapest on."""
    return _stages(setup).stages[0][1].policies()


def _rehearsed(known: _Known, key: tuple[Load, Policy, bool]) -> StepBytes:
    load, policy, is_first = key
    found = [(count, stage.step(load, policy, is_first=is_first)) for count, stage in known.stages]
    if len(found) == 1:
        return found[0][1]
    (low, one), (high, two) = found
    return one.between(two, (known.layers - low) / (high - low))


def _other(setup: Setup, what: str, rows: int, length: int, ask: Callable[[Stage], float]) -> float:
    """Of the base alone: an adapter changes little where nothing is kept."""
    known = _stages(replace(setup, config=None))
    key = (what, rows, length)
    if key not in known.others:
        found = [(count, ask(stage)) for count, stage in known.stages]
        low, one = found[0]
        high, two = found[-1]
        share = (known.layers - low) / (high - low) if high > low else 0.0
        known.others[key] = one + share * (two - one)
    return known.others[key]


def _differs_in_rows(one: tuple[Load, Policy, bool], other: tuple[Load, Policy, bool]) -> bool:
    return one[1:] == other[1:] and replace(one[0], rows=other[0].rows) == other[0]


def _on_line(
    known: _Known, key: tuple[Load, Policy, bool], like: list[tuple[Load, Policy, bool]]
) -> StepBytes:
    first, *_, last = sorted(like, key=lambda one: one[0].rows)
    share = (key[0].rows - first[0].rows) / (last[0].rows - first[0].rows)
    return known.steps[first].between(known.steps[last], share)


def _stages(setup: Setup) -> _Known:
    key = setup.key
    if key not in _known:
        _known[key] = _made(setup)
        while len(_known) > MOST_STAGES:
            _known.popitem(last=False)
    _known.move_to_end(key)
    return _known[key]


def _made(setup: Setup) -> _Known:
    depth = setup.facts.layers // (2 if setup.facts.is_encoder_decoder else 1)

    def stage(layers: int | None) -> Stage:
        return Stage(setup.facts, setup.config, setup.scheme, setup.dtype, layers=layers)

    if depth > 2 * DEEPER:
        try:
            return _Known(((SHALLOW, stage(SHALLOW)), (DEEPER, stage(DEEPER))), depth)
        except GraftError:  # an adapter of certain layers needs them all
            pass
    return _Known(((depth, stage(None)),), depth)
