"""Sections on what a task is judged by: its measures with intervals, and its labels one by one."""

from __future__ import annotations

from collections.abc import Sequence

from graftlm.evaluation.label_table import LabelLine, LabelTable
from graftlm.evaluation.measure_change import MeasureChange
from graftlm.evaluation.measure_text import range_of, shown, shown_difference
from graftlm.evaluation.report_charts import interval_chart
from graftlm.evaluation.report_text import count, percent, plain, text

MOST_LABELS = 40
"""Lines of the table of labels; with more labels, those that are found least often."""
_BETTER = {"higher": "Higher is better.", "lower": "Lower is better.", "neither": "Told, not judged."}


def measure_blocks(changes: Sequence[MeasureChange]) -> list[str]:
    """Each measure before and after, as blocks of one section."""
    return [_block(change) for change in changes]


def measure_tile(change: MeasureChange) -> tuple[str, str, str, str]:
    """Label, before, after and what stands below, of the figure that judges."""
    before, after = (plain(shown(one.value, change.unit)) for one in (change.before, change.after))
    return text(change.title), before, after, f"{count(change.rows)} rows never trained on"


def labels_section(table: LabelTable | None) -> str:
    """Every label's rows and how many are found; then what is taken for what."""
    if table is None:
        return ""
    lines = [line for line in table.lines if line.rows or line.predicted]
    note = ""
    if len(lines) > MOST_LABELS:
        note = f'<p class="note">The {MOST_LABELS} of {len(lines)} labels that are found least often.</p>'
        lines = sorted(lines, key=lambda line: line.found_after / max(1, line.rows))[:MOST_LABELS]
    numbers = "".join(f'<th class="n">{name}</th>' for name in ("Rows", "Found before", "Found", "Precision"))
    rows = "".join(_line(line) for line in lines)
    body = f"<table><tr><th>Label</th>{numbers}</tr>{rows}</table>{note}{_confused(table)}"
    return f'<section><h2>Labels</h2><div class="card">{body}</div></section>'


def _block(change: MeasureChange) -> str:
    difference = plain(shown_difference(change.difference.value, change.unit))
    about = f"95\u202f% interval {plain(range_of(change))}. {_BETTER[change.better]}"
    chart = interval_chart(change.before, change.after, lambda value: text(plain(shown(value, change.unit))))
    return (
        f'<div class="measure"><div><h3>{text(change.title)}</h3><p class="change">{text(difference)}</p>'
        f'<p class="note">{text(about)}</p><p class="note">{count(change.rows)} rows that were kept out of '
        f"training.</p></div>{chart}</div>"
    )


def _line(line: LabelLine) -> str:
    right = percent(line.found_after / line.predicted) if line.predicted else ""
    cells = (count(line.rows), _share(line.found_before, line), _share(line.found_after, line), right)
    numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
    return f"<tr><td>{text(line.label)}</td>{numbers}</tr>"


def _share(found: int, line: LabelLine) -> str:
    return percent(found / line.rows) if line.rows else ""


def _confused(table: LabelTable) -> str:
    if not table.confused:
        return ""
    rows = "".join(
        f"<tr><td>{text(each.label)}</td><td>{text(each.taken_for)}</td>"
        f'<td class="n">{count(each.rows)}</td></tr>'
        for each in table.confused
    )
    return f'<table><tr><th>Label</th><th>Taken for</th><th class="n">Rows</th></tr>{rows}</table>'
