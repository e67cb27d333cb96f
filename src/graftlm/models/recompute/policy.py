"""What a training step computes again in backward: five policies, from nothing to everything.

| policy | kept of a layer | computed again |
|---|---|---|
| nothing | all that backward reads | nothing |
| cheap | no outputs of norms, no gated products | those: no matrix products |
| feed_forward | in the feed-forward part its input only | all of it but its last product |
| everything | its input | the layer |
| offload | nothing: its input is in host memory | the layer |
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal, get_args

from torch import nn

from graftlm.core.errors import ConfigError
from graftlm.kernels.sources import recomputing_cheap_parts
from graftlm.models.recompute.feed_forward import recomputed_feed_forwards
from graftlm.models.recompute.layers import recomputed_layers
from graftlm.models.recompute.offload import HostCopies
from graftlm.models.recompute.places import Places, places_of
from graftlm.models.recompute.tiles import tiled_feed_forwards
from graftlm.quant.facts import device_of

Policy = Literal["nothing", "cheap", "feed_forward", "everything", "offload"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
"""In the order of what they cost, and of what they save."""


@contextmanager
def recomputing(model: nn.Module, policy: Policy, *, tiled_from: int | None = None) -> Iterator[None]:
    """Inside, training steps of `model` follow the policy; outside all is as before.

    Entered inside `models.fusing.fused.fused`: what is recomputed is what runs. Gradients are those of
    "nothing" to the bit, but for feed-forward parts that are taken in tiles: from so many rows on.

    Raises:
        ConfigError: this model on this device cannot follow the policy.
    """
    require_possible(model, policy)
    places = places_of(model)
    with ExitStack() as stack:
        if policy in ("cheap", "feed_forward"):
            stack.enter_context(recomputing_cheap_parts())
        if policy == "feed_forward":
            stack.enter_context(recomputed_feed_forwards(places.feed_forwards))
        elif policy in ("everything", "offload"):
            keep = {"keep_inputs": HostCopies().around} if policy == "offload" else {}
            stack.enter_context(recomputed_layers(places.layers, **keep))
            stack.enter_context(tiled_feed_forwards(places.feed_forwards, tiled_from))
        yield


def require_possible(model: nn.Module, policy: Policy) -> None:
    """Refuse a policy that this model on this device cannot follow.

    Raises:
        ConfigError: with the reason, and what is possible.
    """
    if (problem := obstacle(model, policy)) is not None:
        possible = [other for other in POLICIES if obstacle(model, other) is None]
        raise ConfigError(
            f"train.recompute: {policy} is not possible here: {problem}.",
            fix=f"Leave it at auto, or choose one of: {', '.join(possible)}.",
        )


def obstacle(model: nn.Module, policy: Policy) -> str | None:
    """Why this model on this device cannot follow a policy; None where it can."""
    return _obstacle(places_of(model), device_of(model).type, policy)


def _obstacle(places: Places, device: str, policy: Policy) -> str | None:
    if policy == "feed_forward" and not places.feed_forwards:
        return "its feed-forward parts are not modules of their own"
    if policy in ("everything", "offload") and not places.layers:
        return "its layers have no switch for checkpointing"
    if policy == "offload" and device != "cuda":
        return f"activations on {device} are in host memory already"
    return None
