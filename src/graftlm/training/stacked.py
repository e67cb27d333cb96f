"""Several runs side by side over one base: one forward and one backward pass for a micro-batch of each.

Every member is a complete run of its own: its folder, log, checkpoints, batches, optimizer, schedule,
clipping and random numbers are those that it would have alone, and so are its weights, up to the rounding of
products with other numbers of rows. A run alone can go on with what a member's folder holds, and the reverse.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, Generic

from torch import nn

from graftlm.core.allocation import freed_memory_kept
from graftlm.core.errors import GraftError
from graftlm.data.forms import DOCUMENTS
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.lanes import Lanes
from graftlm.models.fusing.fused import fusable, fused
from graftlm.models.recompute.policy import Policy, recomputing
from graftlm.objectives.sft import attention_of
from graftlm.objectives.together import TogetherObjective
from graftlm.quant.facts import device_of
from graftlm.training.interfaces import B
from graftlm.training.loop import TrainResult, modes_kept
from graftlm.training.out_of_memory import memory_errors
from graftlm.training.signals import StopRequests
from graftlm.training.stacked_member import Member, MemberRun
from graftlm.training.start import require_owned
from graftlm.training.step import to_device


def train_together(
    model: nn.Module,
    adapters: AdapterSet,
    objective: TogetherObjective[B],
    members: Sequence[Member[B]],
    *,
    policy: Policy = "nothing",
    stop: StopRequests | None = None,
) -> dict[str, TrainResult | GraftError]:
    """Train several adapters of one model at the same time.

    Each leaves the stack when its own run ends: after its last step, by early stopping, by its `stop`, or by
    an error that is its own (steps that are not finite, a folder in use), which is given in place of its
    result. What concerns all (no memory, an interrupt) ends all of them.

    Args:
        adapters: of the model; those of the members are trained, no others.
        policy: what is computed again in backward, for all members.
        stop: a `StopRequests` that the caller has entered.

    Raises:
        AdapterError: an adapter that cannot share a batch. TrainingError: out of memory.
    """
    names = [member.name for member in members]
    with ExitStack() as opened:
        asked = stop if stop is not None else opened.enter_context(StopRequests())
        adapters.train_only(names)
        require_owned(model, {f"{m.name} {key}": p for m in members for key, p in m.parameters.items()})
        lanes = opened.enter_context(adapters.stacked(names))
        opened.enter_context(freed_memory_kept() if device_of(model).type == "cpu" else nullcontext())
        opened.enter_context(fused(fusable(model)))
        opened.enter_context(recomputing(model, policy))
        opened.enter_context(modes_kept(model))
        runs = [MemberRun(member, model, objective, adapters, lanes, asked) for member in members]
        for run in runs:
            run.enter(opened)
        model.train()
        _Stack(model, objective, lanes).run(runs)
        return {run.name: run.result for run in runs if run.result is not None}


class _Stack(Generic[B]):
    """The passes over the base that all members share."""

    def __init__(self, model: nn.Module, objective: TogetherObjective[B], lanes: Lanes) -> None:
        self.model, self.objective, self.lanes = model, objective, lanes
        self.device = device_of(model)

    def run(self, runs: Sequence[MemberRun[B]]) -> None:
        """Until every member has left."""
        while live := [run for run in runs if run.ready()]:
            try:
                with memory_errors(self.device):
                    for together in self._groups(live):
                        self._pass(together)
            except GraftError as error:
                for run in live:
                    run.fail(error)
                raise

    def _groups(self, live: Sequence[MemberRun[B]]) -> Iterable[list[MemberRun[B]]]:
        """Members whose micro-batches go through the model together: those with the same inputs. Padded rows
        also have one width, so that dropout finds each value in the place that it would have alone."""
        is_flat = attention_of(self.model) == DOCUMENTS
        groups = defaultdict[Any, list[MemberRun[B]]](list)
        for run in live:
            batch = run.batch
            width = 0 if is_flat else batch.labels.shape[1]
            groups[width, "attention_mask" in batch.inputs].append(run)
        return groups.values()

    def _pass(self, together: Sequence[MemberRun[B]]) -> None:
        batches = {run.name: to_device(run.batch, self.device) for run in together}
        parts = self.objective.together(self.model, batches, self.lanes)
        losses = [
            parts[run.name].loss_sum / run.planned() for run in together if parts[run.name].target_tokens
        ]
        if losses:
            with self.lanes.again():
                sum(losses[1:], losses[0]).backward()
        for run in together:
            run.took(parts[run.name])
