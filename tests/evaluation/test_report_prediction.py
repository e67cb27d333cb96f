"""Predicted beside actual on the page."""

from __future__ import annotations

from pathlib import Path

from graftlm.evaluation.report import read_report, write_report
from graftlm.evaluation.report_data import PredictedFigure, Predictions, ReportData
from graftlm.evaluation.report_prediction import prediction_section

FOUND = Predictions(
    (PredictedFigure("load", 2**30, 1.25 * 2**30), PredictedFigure("<verify>", 2**20)),
    (PredictedFigure("steps", 120.0, 100.0), PredictedFigure("save", 1.0)),
    "Corrected by 3 earlier runs",
)


def test_a_section_shows_both_and_by_how_much_they_differ() -> None:
    shown = prediction_section(FOUND)
    assert "load the base" in shown and "1.2\u202fGiB" in shown and "\u221220\u202f%" in shown
    assert "+20\u202f%" in shown and "2\u202fmin 0\u202fs" in shown and "Corrected by 3" in shown
    assert "<verify>" not in shown and "&lt;verify&gt;" in shown
    assert prediction_section(None) == ""


def test_it_is_read_back(tmp_path: Path) -> None:
    data = ReportData("title", "now", predictions=FOUND)
    assert read_report(write_report(tmp_path / "report.html", data)) == data
