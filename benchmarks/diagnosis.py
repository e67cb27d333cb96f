"""What the rules of `graft diagnose` recognise, and what they say where nothing is wrong.

    python benchmarks/diagnosis.py                every case and every clean run (30 to 60 minutes)
    python benchmarks/diagnosis.py --cases D05    the cases of one rule; --cases alone: of all
    python benchmarks/diagnosis.py --clean 3      the first three clean runs; --clean alone: all

A case makes one failure on purpose by a real run on a small base, asks all rules, follows the fix (where it
is a command, as it stands) and asks again. A clean run is made by defaults on real data. All rules are asked
every time: what others than the own one say is kept too. Rows go to `benchmarks/results/diagnosis.csv`, the
tables to docs/results/diagnosis.md by `benchmarks/diagnosis_page.py`. Models and data are found in
`../shared`, or where GRAFT_SHARED says; cases whose data are not there are left out, by name.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import results
from harness.writer import ROOT, SHARED

sys.path.insert(0, str(ROOT / "tests" / "diagnosis"))

from case import Case, judge
from cases.collected import every_case
from clean_runs import CLEAN, Clean

from graftlm.core.errors import GraftError
from graftlm.verbs.diagnose import Diagnosis, diagnose

RESULTS = results.FOLDER / "diagnosis.csv"
PACKAGES = ("torch", "transformers", "peft", "graftlm")


def case_row(case: Case) -> dict[str, Any]:
    """One failure, made and mended."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, _quiet() as said:
        try:
            found = judge(case, Path(folder))
        except (AssertionError, GraftError, pytest.skip.Exception) as error:
            outcome = "left out" if isinstance(error, pytest.skip.Exception) else "failed"
            why = str(error).splitlines()[0] if str(error) else said.getvalue()[-200:]
            return _row("case", case.rule, case.name, outcome, started, why=why)
    broken, fixed = found.of(case.rule)
    outcome = "missed" if broken is None else "not mended" if fixed is not None else "mended"
    return _row(
        "case", case.rule, case.name, outcome, started,
        confidence=broken.confidence if broken else "",
        others_before=_others(found.broken, case.rule), others_after=_others(found.fixed, case.rule),
    )  # fmt: skip


def clean_row(run: Clean) -> dict[str, Any]:
    """One run with nothing wrong."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, _quiet():
        try:
            found = diagnose(run.make(Path(folder), SHARED))
        except GraftError as error:
            return _row("clean", "", str(run), "failed", started, why=error.seen)
    alarms = _others(found, "")
    return _row("clean", "", str(run), "alarm" if alarms else "silent", started, others_after=alarms)


def _others(found: Diagnosis, own: str) -> str:
    return " ".join(sorted(finding.rule for finding in found.findings if finding.rule != own))


def _row(kind: str, rule: str, name: str, outcome: str, started: float, **more: Any) -> dict[str, Any]:
    seconds = round(time.monotonic() - started, 1)
    empty = {"confidence": "", "others_before": "", "others_after": "", "why": ""}
    known = {"kind": kind, "rule": rule, "name": name, "outcome": outcome}
    return {**known, **empty, **more, "seconds": seconds, **results.where(__file__, *PACKAGES)}


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """Runs say much; kept for what fails."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", nargs="?", const="", metavar="RULE", help="only cases, of one rule or all")
    parser.add_argument("--clean", nargs="?", const=len(CLEAN), type=int, metavar="N", help="only clean runs")
    given = parser.parse_args()
    everything = given.cases is None and given.clean is None
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cases: Sequence[Case] = every_case() if everything or given.cases is not None else ()
    runs = CLEAN if everything else CLEAN[: given.clean or 0]
    for case in (case for case in cases if case.rule.startswith(given.cases or "")):
        _keep(case_row(case))
    for run in runs:
        _keep(clean_row(run))


def _keep(row: dict[str, Any]) -> None:
    results.append(RESULTS, [row])
    shown = (row["rule"], row["name"], row["outcome"], row["others_after"], row["why"], f"{row['seconds']} s")
    print("  ".join(filter(None, shown)), flush=True)


if __name__ == "__main__":
    main()
