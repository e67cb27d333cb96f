"""`graft diagnose`: known failures of a run or an adapter, with evidence and the command that fixes them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graftlm.core.errors import UsageError
from graftlm.core.files import write_atomic
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.finding import Finding
from graftlm.diagnosis.table import RULES
from graftlm.diagnosis.table import diagnose as findings_of
from graftlm.evaluation.report import read_report, write_report
from graftlm.verbs.diagnosing.depth import Depth, depth_of
from graftlm.verbs.diagnosing.gather import evidence_of
from graftlm.verbs.diagnosing.subject import Subject, subject_of
from graftlm.verbs.run_folder import REPORT, REPORT_JSON

DIAGNOSIS = "diagnosis.json"
SCHEMA = 1


@dataclass(frozen=True)
class Diagnosis:
    """What was found, and what was looked at."""

    folder: Path
    findings: tuple[Finding, ...]
    asked: int
    """Rules."""
    looked_at: tuple[str, ...]
    not_looked_at: tuple[str, ...]
    """And how to have it looked at."""
    written: Path | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing found is an error."""
        return all(finding.severity != "error" for finding in self.findings)

    @property
    def verdict(self) -> str:
        """One sentence."""
        if not self.findings:
            return f"None of {self.asked} known failures."
        counts = {
            kind: sum(one.severity == kind for one in self.findings) for kind in ("error", "warning", "note")
        }
        return (
            ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items() if count) + "."
        )

    @property
    def line(self) -> str:
        """For the lines of a run."""
        named = ", ".join(f"{one.rule} {one.title}" for one in self.findings)
        return f"Diagnose: {named or f'none of {self.asked} known failures'} -> {self.written}"

    def as_dict(self) -> dict[str, Any]:
        """For `--json` and `diagnosis.json`."""
        return {
            "schema": SCHEMA,
            "passed": self.passed,
            "verdict": self.verdict,
            "findings": [finding.as_dict() for finding in self.findings],
            "rules_asked": self.asked,
            "looked_at": list(self.looked_at),
            "not_looked_at": list(self.not_looked_at),
        }


def diagnose(
    reference: str | Path,
    *,
    base: str | None = None,
    data: str | Path | None = None,
    deep: bool = False,
    adapter: str | Path | None = None,
    beside: Sequence[str | Path] = (),
    served: str | None = None,
    safety: str | Path | None = None,
    known: str | Path | None = None,
    rules: Sequence[str] | None = None,
) -> Diagnosis:
    """Ask every rule about a run, an adapter folder or a merged model.

    A run keeps what was found in `diagnosis.json`, and its report shows it.

    Args:
        base: the base, where the files do not say or it moved.
        data: what an adapter from elsewhere was trained on; a run knows its own.
        deep: load base and adapter, and look at what they do.
        adapter: the run or adapter that a merged model was made of, where its files do not say.
        beside: other runs or adapters that are served together with this one, each under its run's name.
        served: address of an OpenAI-compatible server that serves them, to be asked too.
        safety: prompts with a `label`, safe or unsafe, which base and adapter are asked.
        known: text that the base should still know. Each of these four implies `deep`.
        rules: ids, such as `D05`; all by default.

    Raises:
        FormatError: nothing there can be diagnosed. UsageError: an unknown rule.
    """
    asked = _rules(rules)
    subject = subject_of(reference, base=base, data=None if data is None else str(data))
    subject = replace(subject, depth=depth_of(adapter, beside, served, safety, known))
    evidence = evidence_of(subject, deep=deep or subject.merged is not None or subject.depth != Depth())
    found = [
        _addressed(finding, subject) for finding in findings_of(evidence, [RULES[name] for name in asked])
    ]
    looked, rest = _looked_at(evidence, subject)
    result = Diagnosis(subject.folder, tuple(found), len(asked), looked, rest)
    if subject.run is None or rules is not None:
        return result
    return keep(result, subject.run)


def keep(found: Diagnosis, run: Path) -> Diagnosis:
    """Write `diagnosis.json` into the run, and its report anew with the findings in it."""
    path = run / DIAGNOSIS
    write_atomic(path, json.dumps(found.as_dict(), indent=1, ensure_ascii=False, default=str) + "\n")
    if (run / REPORT_JSON).is_file():
        data = read_report(run / REPORT_JSON)
        if data.findings != found.findings:
            write_report(run / REPORT, replace(data, findings=found.findings))
    return replace(found, written=path)


def _rules(names: Sequence[str] | None) -> list[str]:
    if names is None:
        return list(RULES)
    if unknown := [name for name in names if name not in RULES]:
        raise UsageError(f"There is no rule {', '.join(unknown)}.", fix=f"The rules are {', '.join(RULES)}.")
    return list(names)


def _addressed(finding: Finding, subject: Subject) -> Finding:
    """The command with the folder in the place of `RUN`."""
    folder = subject.run if subject.run is not None else subject.folder
    quoted = shlex.quote(str(folder))
    return replace(finding, command=re.sub(r"\bRUN\b", lambda _: quoted, finding.command))


def _looked_at(evidence: Evidence, subject: Subject) -> tuple[tuple[str, ...], tuple[str, ...]]:
    states = {
        "the recipe": (bool(evidence.recipe), ""),
        "events": (bool(evidence.events), ""),
        "the rows": (evidence.data is not None, "" if subject.run is not None else "--data FILE"),
        "the adapter": (evidence.adapter is not None, ""),
        "what base and adapter do": (evidence.behaviour is not None, "--deep"),
    }
    rest = [f"{name} ({how})" if how else name for name, (is_there, how) in states.items() if not is_there]
    return tuple(name for name, (is_there, _) in states.items() if is_there), tuple(rest)
