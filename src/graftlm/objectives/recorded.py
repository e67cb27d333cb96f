"""Forward and backward of a micro-batch recorded once and played again: a small model's step on a GPU is many
small kernels, and the host takes longer to start them than the device to run them.

What is recorded are kernels with the addresses that they read and write. So every tensor of a batch is copied
to the same place first, the shapes are few (`data.fixed`), and nothing in the step may ask the device for a
number. Gradients are played, too: autograd sees one node.

Not measured: written without a GPU at hand. The recording of the tests is a traced graph on the CPU, in which
host values are fixed in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graftlm.core.errors import TrainingError
from graftlm.data.batches import Batch
from graftlm.data.fixed import Fixed, Shape, fixed
from graftlm.objectives.base import LossParts
from graftlm.objectives.sft import SftObjective

MOST_SHAPES = 8
"""Recordings that are kept; batches of further shapes are computed step by step."""
WARM_UPS = 3
"""Passes before a recording: libraries choose their ways and take their workspaces in the first ones."""

Step = Callable[[dict[str, Tensor]], list[Tensor | None]]
"""From the tensors of a batch to its loss and the gradients of what is trained, None where none arrives."""


Play = Callable[[], Sequence[Tensor | None]]
"""Computes the same on what lies in the places of the tensors now."""


class Recorder(Protocol):
    """Makes something that can be played."""

    def record(self, step: Step, places: dict[str, Tensor]) -> Play:
        """Record `step` on these tensors; each call of the result computes it on what they hold then."""
        ...


class CudaRecorder:
    """Records CUDA graphs, which share their memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, step: Step, places: dict[str, Tensor]) -> Play:
        """As `Recorder`; a step that asks the device for a number raises, as do others that CUDA refuses."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step(places)
        torch.cuda.current_stream().wait_stream(side)
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            found = step(places)
        self._pool = graph.pool() if self._pool is None else self._pool

        def play() -> Sequence[Tensor | None]:
            graph.replay()
            return found

        return play


@dataclass
class _Recording:
    """The places that its batches are copied to, and how it is played."""

    places: dict[str, Tensor]
    play: Play


class RecordedSft(SftObjective):
    """Supervised fine-tuning with recorded micro-batches; the same sums and gradients."""

    def __init__(
        self,
        plain: SftObjective,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        tokens: int,
        recorder: Recorder,
    ) -> None:
        """`tokens`: what every batch is filled up to, which none exceeds."""
        self.path, self.why, self.tokens = plain.path, plain.why, tokens
        self._model, self._parameters = model, list(parameters)
        self._recorder, self._recordings = recorder, dict[Shape, _Recording]()
        self.played = 0

    def __call__(self, model: nn.Module, batch: Batch) -> LossParts:
        flattened = self.flattened(model, batch)
        if model is not self._model or not (model.training and torch.is_grad_enabled()):
            return self.computed(model, flattened)
        play = self._ready(fixed(flattened, self.tokens))
        self.played += 1
        loss: Tensor = _Played.apply(self, play, *self._parameters)  # type: ignore[no-untyped-call]
        return LossParts(loss, batch.target_tokens)

    def _ready(self, batch: Fixed) -> Play:
        """What computes this batch: the recording for its shape, its places filled. A batch of one shape too
        many is computed by the same operations, so that what was recorded before changes no value."""
        found = self._recordings.get(batch.shape)
        if found is None and len(self._recordings) == MOST_SHAPES:
            return partial(self._step, batch.tensors)
        if found is None:
            places = {name: tensor.clone() for name, tensor in batch.tensors.items()}
            found = self._recordings[batch.shape] = _Recording(places, self._recorded(places))
        for name, tensor in batch.tensors.items():
            found.places[name].copy_(tensor, non_blocking=True)
        return found.play

    def _recorded(self, places: dict[str, Tensor]) -> Play:
        try:
            return self._recorder.record(self._step, places)
        except RuntimeError as error:  # of CUDA and of torch, for whatever cannot be recorded
            raise TrainingError(
                f"A step of this model cannot be recorded: {str(error).strip().splitlines()[0]}",
                meaning="It asks the device for a number, or does something else that is not a kernel.",
                fix="train.recorded_steps: off",
            ) from error

    @torch.enable_grad()
    def _step(self, tensors: dict[str, Tensor]) -> list[Tensor | None]:
        inputs = {name: tensor for name, tensor in tensors.items() if name not in ("index", "targets")}
        loss = self.of_fixed(self._model, Fixed(inputs, tensors["index"], tensors["targets"]))
        return [loss.detach(), *torch.autograd.grad(loss, self._parameters, allow_unused=True)]


class _Played(torch.autograd.Function):
    """One node for a whole micro-batch: its gradients are there when its loss is."""

    @staticmethod
    def forward(ctx: Any, owner: RecordedSft, play: Play, *parameters: Tensor) -> Tensor:
        loss, *ctx.gradients = play()
        assert loss is not None
        ctx.owner, ctx.number = owner, owner.played
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.owner.played != ctx.number:
            raise TrainingError(
                "A recorded micro-batch was played again before its gradients were taken.",
                meaning="They lie where the next one's are written.",
                fix="Call backward() before the next forward pass, or set train.recorded_steps: off.",
            )
        return None, None, *(None if each is None else grads[0] * each for each in ctx.gradients)
