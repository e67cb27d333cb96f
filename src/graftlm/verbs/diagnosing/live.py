"""Known failures while a run goes on: the rules that are cheap are asked at steps that grow rarer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

from graftlm.core.config import read_yaml
from graftlm.core.errors import TrainingError
from graftlm.core.events import read_events, surviving_events
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.finding import Finding
from graftlm.diagnosis.table import RULES, diagnose
from graftlm.training.callbacks import Event
from graftlm.verbs.diagnosing.data import data_facts
from graftlm.verbs.diagnosing.gather import read_json
from graftlm.verbs.diagnosing.subject import Subject
from graftlm.verbs.diagnosing.update_size import UpdateSize
from graftlm.verbs.references import RECIPE
from graftlm.verbs.run_folder import PLAN, RunFolder

LIVE = tuple(rule for rule in RULES.values() if rule.is_live)


def is_due(step: int) -> bool:
    """Whether to look after this step: 8 to 16 times for every doubling of the steps.

    >>> [step for step in range(1, 41) if is_due(step)][14:]
    [15, 16, 18, 20, 22, 24, 26, 28, 30, 32, 36, 40]
    """
    return step % max(1, 1 << max(0, step.bit_length() - 4)) == 0


class LiveDiagnosis:
    """Called by `training.loop.train` with every event. A finding is said once, or when it is worse."""

    def __init__(
        self,
        folder: RunFolder,
        measure: Callable[[], UpdateSize],
        on_failure: Literal["warn", "stop"],
    ) -> None:
        """`measure` is called when the run has its first weights."""
        self._folder, self._make, self._on_failure = folder, measure, on_failure
        self._measured: UpdateSize | None = None
        self._known = Evidence()
        self._events: list[dict[str, Any]] = []
        self._begun = 0
        self._said: set[tuple[str, str]] = set()

    def __call__(self, event: Event) -> Iterator[Event]:
        """Further events: what was measured, and what was found.

        Raises:
            TrainingError: something was found, and the run is to stop then.
        """
        if event.kind == "start":
            self._begin(int(event.fields["start_step"]))
        else:
            self._events.append({"kind": event.kind, **event.fields})
        step = int(event.fields.get("step") or self._begun)
        if event.kind == "step":
            if not is_due(step):
                return
            yield self._measurement(step)
        elif event.kind not in ("start", "evaluate", "skipped"):
            return
        for finding in self._ask():
            yield Event("finding", {"step": step, **finding.as_dict()})
            if self._on_failure == "stop" and finding.severity != "note":
                raise self._refusal(finding)

    def _begin(self, step: int) -> None:
        folder = self._folder.path
        self._events, self._begun = surviving_events(read_events(self._folder.events)), step
        self._said = {(old["rule"], old["severity"]) for old in self._events if old["kind"] == "finding"}
        self._known = Evidence(
            recipe=read_yaml(folder / RECIPE),
            plan=read_json(folder / PLAN) or {},
            data=data_facts(Subject(folder, run=folder)),
        )
        self._measured = self._make()

    def _measurement(self, step: int) -> Event:
        assert self._measured is not None, "a step before the start"
        event = Event("adapter", {"step": step, "done": step - self._begun, **self._measured.measure()})
        self._events.append({"kind": event.kind, **event.fields})
        return event

    def _ask(self) -> list[Finding]:
        found = diagnose(replace(self._known, events=self._events), LIVE)
        new = [one for one in found if (one.rule, one.severity) not in self._said]
        self._said |= {(one.rule, one.severity) for one in new}
        return new

    def _refusal(self, finding: Finding) -> TrainingError:
        return TrainingError(
            f"{finding.rule}, {finding.title}: {finding.seen}",
            meaning=f"{finding.meaning} The run stops, as train.on_failure says; its checkpoints are sound.",
            fix=f"{finding.fix} Go on all the same: {self._folder.resume_command} "
            "--set train.on_failure=warn",
        )
