"""Which activations a run computes again: chosen from free memory and from what a step really keeps.

What is kept depends on the architecture, the adapter and the kernels at work, so it is counted, not written
down: two short forward passes under a policy give bytes per token, and a micro-batch has so many tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.core.errors import ConfigError
from graftlm.core.seeding import capture_rng, restore_rng
from graftlm.models.recompute.kept import counted
from graftlm.models.recompute.places import places_of
from graftlm.models.recompute.policy import POLICIES, Policy, obstacle, recomputing, require_possible
from graftlm.models.recompute.tiles import FROM
from graftlm.models.streaming.streamed import HOST, placement_of
from graftlm.quant.facts import device_of
from graftlm.training.memory import free_bytes
from graftlm.training.train_section import TrainSection

SAFETY = 0.8
"""Share of the free memory that may be planned with: allocators fragment."""
PROBE = 96
"""Tokens of the longer probe; the shorter one has a third."""

Probe = Callable[[int], object]
"""The loss of one row of so many tokens, with its graph."""


@dataclass(frozen=True)
class RecomputeChoice:
    """The policy of a run, with the figures behind it."""

    policy: Policy
    activation_bytes: int
    """Predicted: what a micro-batch keeps for backward, and what one layer takes while gradients pass it."""
    free_bytes: int
    """Free when the choice was made; 0 where the system does not tell."""
    why: str


def choose(
    model: nn.Module, probe: Probe, section: TrainSection, *, tokens: int, started_with: Policy | None = None
) -> RecomputeChoice:
    """The policy that the recipe names, that a resumed run began with, or the cheapest one that fits.

    Called with the adapter attached and the faster parts in use, as in the step. `tokens`: of a micro-batch.

    Raises:
        ConfigError: the policy is not possible for this model on this device.
    """
    asked, from_recipe = _asked(model, section)
    named = started_with or (None if asked == "auto" else asked)
    free = free_bytes(device_of(model))
    if named is not None:
        require_possible(model, named)
        why = "the run began with it" if started_with else from_recipe
        return RecomputeChoice(named, needed_bytes(model, probe, tokens, named), free, why)
    room = SAFETY * free - _state_bytes(model)
    tried: list[str] = []
    policy: Policy = "nothing"
    needed = 0
    for policy in (each for each in POLICIES if obstacle(model, each) is None):
        needed = needed_bytes(model, probe, tokens, policy)
        tried.append(f"{policy} takes about {_mib(needed)}")
        if needed <= room:
            break
    why = f"{', '.join(tried)}; {_mib(room)} of {_mib(free)} are free for it"
    return RecomputeChoice(policy, needed, free, why)


def _asked(model: nn.Module, section: TrainSection) -> tuple[Policy | Literal["auto"], str]:
    """What the recipe names; weights that leave the device after the forward pass leave only one choice."""
    if placement_of(model)[0] != HOST or section.recompute in ("everything", "offload"):
        return section.recompute, "the recipe says so"
    if section.recompute == "auto":
        return "everything", "weights that lie in host memory are brought anew for the backward pass"
    raise ConfigError(
        f"train.recompute: {section.recompute} is not possible with model.placement: host.",
        meaning="What backward reads of a layer is gone from the device by then.",
        fix="Leave it at auto.",
    )


def needed_bytes(model: nn.Module, probe: Probe, tokens: int, policy: Policy) -> int:
    """Predicted bytes of a micro-batch: what is kept, and one layer while gradients pass it."""
    layers = max(1, len(places_of(model).layers))
    # Of a layer in tiles, what attention needs is there as a whole; its feed-forward part never is.
    at_work: Policy = "feed_forward" if _is_tiled(model, tokens, policy) else "nothing"
    whole = kept_bytes(model, probe, tokens, at_work)
    kept = whole if policy == at_work else kept_bytes(model, probe, tokens, policy)
    return kept + whole // layers


def _is_tiled(model: nn.Module, tokens: int, policy: Policy) -> bool:
    return policy in ("everything", "offload") and tokens >= FROM and not obstacle(model, "feed_forward")


def kept_bytes(model: nn.Module, probe: Probe, tokens: int, policy: Policy) -> int:
    """Bytes that a forward pass over `tokens` keeps for its backward, from two short passes."""
    longer = max(2, min(PROBE, tokens))
    shorter = max(1, longer // 3)
    tiled_from = shorter if _is_tiled(model, tokens, policy) else None
    with recomputing(model, policy, tiled_from=tiled_from), _as_in_training(model):
        low, high = (_count(model, probe, length) for length in (shorter, longer))
    return round(high + (high - low) / (longer - shorter) * (tokens - longer))


def _count(model: nn.Module, probe: Probe, length: int) -> int:
    with counted(model) as found:
        loss = probe(length)
    del loss
    return found.total


@contextmanager
def _as_in_training(model: nn.Module) -> Iterator[None]:
    """Random state and modes are put back afterwards."""
    random_state, modes = capture_rng(), [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        restore_rng(random_state)
        for module, training in modes:
            module.training = training


def _state_bytes(model: nn.Module) -> int:
    """Gradients and the two moments of AdamW, which are not there yet."""
    trained: list[Tensor] = [each for each in model.parameters() if each.requires_grad]
    return sum(each.numel() * (each.itemsize + 2 * torch.float32.itemsize) for each in trained)


def _mib(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"
