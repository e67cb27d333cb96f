"""The section on where the memory of a run went."""

from __future__ import annotations

from graftlm.evaluation.report_charts import bar_chart
from graftlm.evaluation.report_data import MemoryFacts
from graftlm.evaluation.report_text import count, number, size, text

_NAMES = {
    "start": "before loading",
    "load": "load the base",
    "attach": "attach the adapter",
    "update": "optimizer step",
}


def memory_section(facts: MemoryFacts | None) -> str:
    """Peaks by phase as bars, tensors by kind as a table."""
    if facts is None or not (facts.peaks or facts.classes):
        return ""
    on_gpu = any(peak.allocated is not None for peak in facts.peaks)
    bars = [(_NAMES.get(peak.phase, peak.phase), float(peak.resident)) for peak in facts.peaks]
    charts = bar_chart("Peak of the process by phase" if on_gpu else "Peak by phase", bars, size)
    if on_gpu:
        own = [(_NAMES.get(peak.phase, peak.phase), float(peak.allocated or 0)) for peak in facts.peaks]
        charts = bar_chart("Peak on the GPU by phase", own, size) + charts
    note = (
        "Peaks are of resident memory, the interpreter and its libraries included; what an allocator keeps "
        "after a phase counts in the next one too."
        if facts.is_exact
        else "This system cannot count peaks afresh: a phase shows the highest peak up to its end."
    )
    body = f'{charts}{_classes(facts)}<p class="note">{note}</p>'
    return f'<section><h2>Memory</h2><div class="card">{body}</div></section>'


def _classes(facts: MemoryFacts) -> str:
    rows = "".join(
        f'<tr><td>{text(item.name)}</td><td class="n">{count(item.parameters)}</td>'
        f'<td class="n">{number(8 * item.bytes / item.parameters) if item.parameters else ""}</td>'
        f'<td class="n">{size(item.bytes)}</td></tr>'
        for item in facts.classes
    )
    if not rows:
        return ""
    total = sum(item.bytes for item in facts.classes)
    numbers = "".join(f'<th class="n">{name}</th>' for name in ("Parameters", "Bits each", "Size"))
    foot = f'<tr><td>together</td><td class="n"></td><td class="n"></td><td class="n">{size(total)}</td></tr>'
    return f"<table><tr><th>Tensors</th>{numbers}</tr>{rows}{foot}</table>"
