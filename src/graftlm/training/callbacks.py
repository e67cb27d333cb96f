"""What a run says while it goes: events, and who listens to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from graftlm.core.events import EventLog

Kind = Literal[
    "start", "step", "evaluate", "checkpoint", "skipped", "notice", "memory", "adapter", "finding",
    "interrupted", "end",
]  # fmt: skip


@dataclass(frozen=True)
class Event:
    """One thing that happened; `fields` are the ones of the same event in `events.jsonl`.

    start {run, total_steps, start_step, trainable}; step {step, epoch, loss, learning_rate, grad_norm,
    target_tokens, real_tokens, tokens_per_second, seconds, memory_bytes}; evaluate {step, loss, tokens,
    rows}; checkpoint {step, path}; skipped {step, why, rows}; notice {text}; memory {step, classes} and
    memory {step, phases} where it is measured; adapter {step, done, moved, still, median, largest,
    largest_at}; finding {step, rule, seen, fix, ...}; interrupted {step}; end {step, seconds, why}, of a
    failure with {error, phase}. Where the task has figures of its own, step and evaluate have them as
    metrics {name: value}. Seconds are wall time, memory is the peak so far in bytes.
    """

    kind: Kind
    fields: Mapping[str, Any]


class Callback(Protocol):
    """Called in the training process for every event, in order; an exception ends the run."""

    def __call__(self, event: Event, /) -> None: ...


Watch = Callable[[Event], Iterable[Event]]
"""Looks at every event after all others have it; its answers are announced too. An exception ends the run."""


class EventWriter:
    """Writes every event to the run's log."""

    def __init__(self, log: EventLog) -> None:
        self._log = log

    def __call__(self, event: Event) -> None:
        self._log.append(event.kind, **event.fields)


class Announcer:
    """Hands each event to every listener, the durable log first."""

    def __init__(self, listeners: Sequence[Callback], watch: Watch | None = None) -> None:
        self._listeners, self._watch = tuple(listeners), watch

    def __call__(self, kind: Kind, **fields: Any) -> None:
        event = Event(kind, fields)
        self._tell(event)
        for answer in self._watch(event) if self._watch is not None else ():
            self._tell(answer)

    def _tell(self, event: Event) -> None:
        for listener in self._listeners:
            listener(event)
