from __future__ import annotations

import re
from pathlib import Path

import pytest

from graftlm.diagnosis.finding import Finding, Plot
from graftlm.evaluation.report import read_report, write_report
from graftlm.evaluation.report_data import ReportData
from graftlm.evaluation.report_findings import MOST_BARS, findings_section
from graftlm.evaluation.report_page import page

CURVE = Plot("Held-out loss", "step", "nats", {"held out": ((1.0, 2.0), (2.0, 1.0), (3.0, 3.0))}, 1.5)
FOUND = Finding(
    "D99",
    "Something <b>bad</b>",
    "warning",
    0.87,
    seen="seen & done",
    meaning="meaning",
    fix="fix",
    command="graft tune x",
    figures={"a": 1.0},
    plot=CURVE,
)


def test_a_finding_is_whole_and_escaped() -> None:
    shown = findings_section([FOUND])
    for text in (
        "Something &lt;b&gt;bad",
        "seen &amp; done",
        "meaning",
        "graft tune x",
        "87",
        "D99",
        "Warning",
    ):
        assert text in shown
    assert "<b>bad" not in shown


def test_its_curve_has_a_threshold_and_its_own_axis() -> None:
    axis = Plot("Spectrum", "directions", "share", {"middle": ((0.0, 1.0), (1.0, 0.1))}, 0.01)
    shown = findings_section([Finding(**{**vars(FOUND), "plot": axis})])
    assert "directions</text>" in shown and ">step<" not in shown
    assert "threshold" in shown and 'class="limit"' in shown


def test_of_many_bars_the_largest_are_shown() -> None:
    bars = tuple((float(n), float(n)) for n in range(40))
    names = tuple(f"layer {n}" for n in range(40))
    plot = Plot("Norms", "layer", "norm", {"norm": bars}, None, "bars", names)
    shown = findings_section([Finding(**{**vars(FOUND), "plot": plot})])
    assert len(re.findall(r"<rect class=\"bar\"", shown)) == MOST_BARS
    assert "layer 39" in shown and "layer 5<" not in shown and "of 40" in shown


@pytest.mark.parametrize("plot", [None, Plot("Nothing", "step", "", {})], ids=["none", "empty"])
def test_without_a_picture(plot: Plot | None) -> None:
    assert "<figure" not in findings_section([Finding(**{**vars(FOUND), "plot": plot})])


def test_no_findings_no_section() -> None:
    assert findings_section([]) == ""
    assert "Findings" not in page(ReportData("a", "today"))


def test_they_come_back_from_the_file(tmp_path: Path) -> None:
    data = ReportData("a", "today", findings=(FOUND,))
    beside = write_report(tmp_path / "report.html", data)
    assert read_report(beside).findings == (FOUND,)
