"""The section on memory: bars by phase, a table of tensors, and what it says where peaks cannot be reset."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from graftlm.evaluation.report import read_report, write_report
from graftlm.evaluation.report_charts import bar_chart
from graftlm.evaluation.report_data import MemoryClass, MemoryFacts, MemoryPeak, ReportData
from graftlm.evaluation.report_memory import memory_section

GIB = 2**30
FACTS = MemoryFacts(
    classes=(
        MemoryClass("quantised linears", 1000, 516),
        MemoryClass("optimizer state", 100, 800),
        MemoryClass("<b>", 1, 1),
    ),
    peaks=(MemoryPeak("start", GIB // 2), MemoryPeak("load", 6 * GIB), MemoryPeak("update", 7 * GIB)),
)


def test_bars_and_bits() -> None:
    page = memory_section(FACTS)
    assert "before loading" in page and "optimizer step" in page
    assert '<td>quantised linears</td><td class="n">1,000</td><td class="n">4.13</td>' in page
    assert '<td>optimizer state</td><td class="n">100</td><td class="n">64.00</td>' in page
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert "together" in page and "1.3\u202fKiB" in page
    ElementTree.fromstring(page)


def test_bars_are_in_proportion() -> None:
    root = ElementTree.fromstring(bar_chart("Peaks", [("a", 1.0), ("b", 4.0)], str))
    widths = [float(bar.attrib["width"].rstrip("%")) for bar in root.iter("rect")]
    assert widths == [20.0, 80.0]
    assert bar_chart("Nothing", [], str) == ""


def test_a_gpu_has_bars_of_its_own() -> None:
    on_gpu = MemoryFacts((), (MemoryPeak("forward", GIB, 5 * GIB, 6 * GIB),))
    page = memory_section(on_gpu)
    assert page.index("Peak on the GPU by phase") < page.index("Peak of the process by phase")
    assert "5.0\u202fGiB" in page


def test_upper_bounds_are_called_so() -> None:
    page = memory_section(MemoryFacts((), FACTS.peaks, is_exact=False))
    assert "a phase shows the highest peak up to its end" in page
    assert "a phase shows" not in memory_section(FACTS)


def test_nothing_measured_is_left_out() -> None:
    assert memory_section(None) == memory_section(MemoryFacts((), ())) == ""


def test_it_is_written_and_read_back(tmp_path: Path) -> None:
    data = ReportData(title="a", created="now", memory=FACTS)
    assert read_report(write_report(tmp_path / "report.html", data)) == data
    assert "<h2>Memory</h2>" in (tmp_path / "report.html").read_text(encoding="utf-8")
