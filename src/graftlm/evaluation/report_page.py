"""The page as one HTML text: no script, no reference to anything outside the file."""

from __future__ import annotations

from graftlm.evaluation.report_data import ReportData
from graftlm.evaluation.report_facts import (
    curves_section,
    data_section,
    environment_section,
    merge_section,
    next_section,
    notices_section,
    recipe_section,
    sheet_section,
    training_section,
)
from graftlm.evaluation.report_findings import findings_section
from graftlm.evaluation.report_measures import labels_section
from graftlm.evaluation.report_memory import memory_section
from graftlm.evaluation.report_prediction import prediction_section
from graftlm.evaluation.report_results import before_and_after, samples_section, tiles, verdict_section
from graftlm.evaluation.report_style import style_sheet
from graftlm.evaluation.report_text import text

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Should anything slip through escaping, the browser still runs and loads nothing."""


def page(data: ReportData) -> str:
    """The whole document; sections without data are left out."""
    sections = [
        tiles(data),
        notices_section(data.notices),
        findings_section(data.findings),
        before_and_after(data.comparison, data.forgetting),
        labels_section(data.comparison.labels if data.comparison else None),
        curves_section(data.curves),
        samples_section(data.comparison),
        training_section(data.training),
        memory_section(data.memory),
        prediction_section(data.predictions),
        merge_section(data.merge),
        data_section(data.data),
        *(sheet_section(sheet) for sheet in data.sheets),
        next_section(data.next_steps),
        recipe_section(data.recipe_yaml),
        environment_section(data.environment),
    ]
    title = text(data.title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{title} \u00b7 Graft report</title><style>{style_sheet()}</style></head>\n<body>"
        f'<header><p class="eyebrow">Graft report</p><h1 dir="auto">{title}</h1>'
        f'<p class="meta">{_meta(data)}</p>'
        f"{verdict_section(data.verdict)}</header>\n<main>"
        + "\n".join(section for section in sections if section)
        + "</main>\n<footer>This file holds everything it shows and opens without a network. "
        "The same figures for machines: report.json beside it.</footer></body></html>\n"
    )


def _meta(data: ReportData) -> str:
    parts = [data.created]
    if data.training is not None:
        parts = [data.training.base, data.training.method, data.created]
    return " \u00b7 ".join(map(text, parts))
