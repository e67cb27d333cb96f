"""Everything that can be known of a run or an adapter after the fact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from graftlm.core.config import read_yaml
from graftlm.core.errors import FormatError
from graftlm.core.events import read_events, surviving_events
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.facts.behaviour import BehaviourFacts
from graftlm.verbs.diagnosing.adapter import adapter_facts
from graftlm.verbs.diagnosing.data import data_facts
from graftlm.verbs.diagnosing.structure import structure_facts
from graftlm.verbs.diagnosing.subject import Subject
from graftlm.verbs.references import RECIPE
from graftlm.verbs.run_folder import PLAN, REPORT_JSON, RunFolder


def evidence_of(subject: Subject, *, deep: bool = False) -> Evidence:
    """Read what lies in the folders; with `deep` base and adapter are also loaded and run.

    Raises:
        GraftError: a file is damaged, or a base cannot be loaded.
    """
    log = _of_run(subject.run) if subject.run is not None else {}
    adapter = adapter_facts(subject)
    if adapter is not None and adapter.not_finite:
        return Evidence(**log, adapter=adapter, data=data_facts(subject))  # nobody can use such an adapter
    return Evidence(
        **log,
        adapter=adapter,
        data=data_facts(subject),
        structure=structure_facts(subject),
        behaviour=_behaviour(subject) if deep else None,
    )


def _behaviour(subject: Subject) -> BehaviourFacts | None:
    # What loads models is read only where it is asked for: every run ends with a diagnosis.
    from graftlm.verbs.diagnosing.behaviour import behaviour_facts

    return behaviour_facts(subject)


def _of_run(run: Path) -> dict[str, Any]:
    folder = RunFolder(run)
    events = surviving_events(read_events(folder.events)) if folder.events.is_file() else []
    ends = [event for event in events if event["kind"] in ("start", "interrupted", "end")]
    return {
        "recipe": read_yaml(run / RECIPE),
        "plan": read_json(run / PLAN) or {},
        "events": events,
        "report": read_json(run / REPORT_JSON),
        "is_over": bool(ends) and ends[-1]["kind"] == "end" and ends[-1]["why"] != "interrupted",
    }


def read_json(path: Path) -> dict[str, Any] | None:
    """An object in a file of a run; None where there is no such file.

    Raises:
        FormatError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(
            f"{path} is not valid JSON: {error}.",
            meaning="The file was edited or damaged.",
            fix="Remove it; the run's adapter and events do not depend on it.",
        ) from None
    return content if isinstance(content, dict) else None
