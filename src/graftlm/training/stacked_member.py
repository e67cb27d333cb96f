"""One of several runs that are trained side by side (`training.stacked`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

import torch
from torch import nn

from graftlm.core.errors import GraftError
from graftlm.core.seeding import capture_rng, restore_rng
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.lanes import Lanes
from graftlm.objectives.base import LossParts
from graftlm.training.callbacks import Callback, Watch
from graftlm.training.gradient_check import FirstStep
from graftlm.training.interfaces import B, BatchSource, Evaluate, HeldOut, Objective, StopAsked, TrainSettings
from graftlm.training.loop import TrainResult, ended, failure_logged, opened_session
from graftlm.training.session import Session
from graftlm.training.signals import StopRequests
from graftlm.training.start import Resume, begin
from graftlm.training.step import Done, updated
from graftlm.training.timeline import Step


@dataclass(frozen=True)
class Member(Generic[B]):
    """One of the runs: the adapter `name` of the model, at its start. All else is as of `loop.train`."""

    name: str
    batches: BatchSource[B]
    parameters: Mapping[str, nn.Parameter]
    settings: TrainSettings
    run: Path
    resume: Resume = "never"
    identity: Mapping[str, Any] | None = None
    evaluate: Evaluate | None = None
    callbacks: Sequence[Callback] = ()
    lora_b: Callable[[str], bool] | Collection[str] = ()
    scales: Mapping[str, float] | None = None
    stop: StopAsked | None = None
    """Asked between steps, besides the `stop` of all: True lets this member leave, as if interrupted."""
    watch: Watch | None = None


class _Stop(StopRequests):
    """That of one member: the stop of all, or its own."""

    def __init__(self, of_all: StopRequests, own: StopAsked | None) -> None:
        super().__init__()
        self._of_all, self._own = of_all, own

    def __call__(self) -> bool:
        return self._of_all() or (self._own is not None and self._own())

    @property
    def exit_code(self) -> int:
        """As of `StopRequests`."""
        return self._of_all.exit_code


@dataclass
class _Open(Generic[B]):
    """A step that is being taken."""

    step: Step[B]
    left: list[B]
    """Micro-batches with targets that are still to come."""
    planned: int
    """Targets of the whole window."""
    random_state: torch.Tensor
    """Of the member's generator, as it was before."""
    first: FirstStep | None
    watching: ExitStack
    done: list[Done] = field(default_factory=list)


class MemberRun(Generic[B]):
    """A member while it is in the stack: its session, its random numbers, and the step that it is in."""

    def __init__(
        self,
        member: Member[B],
        model: nn.Module,
        objective: Objective[B],
        adapters: AdapterSet,
        lanes: Lanes,
        stop: StopRequests,
    ) -> None:
        self.member, self.name = member, member.name
        self.result: TrainResult | GraftError | None = None
        """How it ended; None while it goes on."""
        self._model, self._objective, self._adapters, self._lanes = model, objective, adapters, lanes
        self._stop = _Stop(stop, member.stop)
        self._generator = lanes.generators[member.name]
        self._random_state: dict[str, Any] = {}
        self._open: _Open[B] | None = None
        self._started = time.monotonic()
        self._session: Session[B]

    def enter(self, stack: ExitStack) -> None:
        """Open its folder, and start afresh or go on from its newest checkpoint."""
        with self._own_errors():
            self._session = stack.enter_context(self._opened())
            with failure_logged(self._session, self._started), self._own_random_numbers():
                begin(self._session, self.member.resume)

    @property
    def batch(self) -> B:
        """Its next micro-batch with targets; only while it is in a step."""
        assert self._open is not None
        return self._open.left[0]

    def ready(self) -> bool:
        """Whether a micro-batch is next. What is due between steps is done before: evaluation, saving, the
        end of the run."""
        if self.result is None and self._open is not None and self._session.stop():
            self._leave_step()
        with self._own_errors():
            while self.result is None and self._open is None:
                with failure_logged(self._session, self._started):
                    self._between_steps()
        return self.result is None

    def planned(self) -> int:
        """Targets of the window that its micro-batch belongs to."""
        assert self._open is not None
        return self._open.planned

    def took(self, parts: LossParts) -> None:
        """Its micro-batch went through the model and back; after the last one of a window, the update."""
        opened = self._open
        assert opened is not None
        opened.left.pop(0)
        opened.done.append(Done(parts.loss_sum.detach(), parts.target_tokens, parts.metrics))
        if not opened.left:
            with self._own_errors(), failure_logged(self._session, self._started):
                self._finish(opened)

    def fail(self, error: GraftError) -> None:
        """What ends all ends this one; its log says so."""
        with self._own_errors(), failure_logged(self._session, self._started):
            raise error

    def _between_steps(self) -> None:
        session, why = self._session, None
        if session.is_between:
            with self._own_random_numbers():
                why = session.prepared()
        if why is not None:
            self.result = ended(session, why, self._started)
            return
        before, step = self._generator.get_state(), session.begun()
        left = [batch for batch in step.batches if batch.target_tokens]
        watching = ExitStack()
        first = watching.enter_context(session.watching()) if left else None
        planned = sum(batch.target_tokens for batch in left)
        self._open = _Open(step, left, planned, before, first, watching)
        if not left:
            self._finish(self._open)

    def _finish(self, opened: _Open[B]) -> None:
        session = self._session
        self._open = None
        opened.watching.close()
        limit = self.member.settings.max_grad_norm
        try:
            stats = updated(
                opened.step.batches,
                opened.done,
                session.parameters,
                session.optimizer,
                max_grad_norm=limit,
            )
        finally:
            session.optimizer.zero_grad(set_to_none=True)
        session.finish(opened.step, stats, opened.first)

    def _leave_step(self) -> None:
        """As if its window had never begun."""
        assert self._open is not None
        self._open.watching.close()
        self._generator.set_state(self._open.random_state)
        self._session.optimizer.zero_grad(set_to_none=True)
        self._open = None

    def _opened(self) -> Any:
        member = self.member
        return opened_session(
            self._model, self._objective, member.batches, member.parameters, member.settings,
            run=member.run, identity=member.identity, evaluate=self._alone(member.evaluate),
            callbacks=member.callbacks, stop=self._stop, lora_b=member.lora_b, scales=member.scales,
            watch=member.watch,
        )  # fmt: skip

    def _alone(self, evaluate: Evaluate | None) -> Evaluate | None:
        """The evaluation with this adapter active, and no other."""
        if evaluate is None:
            return None

        def evaluate_alone(stop: StopAsked) -> HeldOut | None:
            with self._lanes.paused(), self._adapters.activated(self.name):
                return evaluate(stop)

        return evaluate_alone

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        """What goes wrong in this run alone is its result."""
        try:
            yield
        except GraftError as error:
            self.result = error
            if self._open is not None:
                self._leave_step()

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """Inside, the generators of the process stand where this run's stand, for checkpoints and resumes."""
        outside = capture_rng()
        if self._random_state:
            restore_rng(self._random_state)
            torch.set_rng_state(self._generator.get_state())
        try:
            yield
        finally:
            self._random_state = capture_rng()
            self._generator.set_state(torch.get_rng_state())
            restore_rng(outside)
