from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from graftlm.core.errors import DataError
from graftlm.evaluation.compare import SampleChange, compare, forgetting
from graftlm.evaluation.report import read_report, report_json, write_report
from graftlm.evaluation.report_charts import Series, interval_chart, line_chart, smoothed, thinned, ticks
from graftlm.evaluation.report_data import (
    Curves,
    DataFacts,
    Fact,
    MergeCheck,
    NextStep,
    Notice,
    ReportData,
    Sheet,
    SiteGroup,
    TrainingFacts,
    curves_from_events,
)
from graftlm.evaluation.report_page import page
from graftlm.evaluation.report_style import DARK, GRAPHIC_PAIRS, LIGHT, TEXT_PAIRS, contrast, style_sheet
from graftlm.evaluation.runner import EvaluatedRow, Evaluation
from graftlm.evaluation.verdict import verdict

HOSTILE = (
    "<script>alert('x')</script>",
    "\"'><img src=x onerror=alert(1)> &amp; </div></main></html>",
    "\U0001f469\u200d\U0001f52c \U0001f389 \ud800",
    "\u0645\u0631\u062d\u0628\u0627 123 abc \u202eevil",
    "x" * 100_000,
    "\x00\x1b[31m\r\n\ttab",
    "-->]]></style><style>body{display:none}",
)
VOID = {"meta"}


class Reader(HTMLParser):
    """Checks nesting, collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def evaluation(name: str, loss: float, answer: str | None) -> Evaluation:
    rows = []
    for number in range(1, 41):
        texts = {} if answer is None else {"prompt": "Name it.", "prediction": answer, "reference": "this"}
        rows.append(EvaluatedRow(number, f"{number:x}", (loss + number / 100) * 8, 8, **texts))
    return Evaluation(name, tuple(rows), 1.0, True, "head in chunks")


@pytest.fixture(scope="module")
def data() -> ReportData:
    found = compare(evaluation("base", 2.0, "that"), evaluation("adapter", 0.9, "this"))
    known = forgetting(
        evaluation("base", 1.5, None), evaluation("adapter", 1.51, None), source="text of the base"
    )
    events = [{"kind": "start", "total_steps": 60}]
    for step in range(1, 61):
        events.append(
            {"kind": "step", "step": step, "loss": 3 / step, "learning_rate": 1e-4, "grad_norm": 0.7}
        )
    events += [{"kind": "evaluate", "step": 30, "loss": 1.25}, {"kind": "skipped", "step": 31}]
    return ReportData(
        title="sql on sprout",
        created="2026-11-22 04:00 UTC",
        verdict=verdict(found, known),
        notices=(Notice("torch.compile is off."), Notice("3 rows were cut.", "warning", "graft check x")),
        comparison=found,
        forgetting=known,
        curves=curves_from_events(events),
        training=TrainingFacts(
            base="sprout",
            method="lora",
            trainable=46_240,
            total=306_272,
            sites=(SiteGroup("q_proj", 5, "64 x 64", 5120),),
            seconds=75.0,
            tokens_per_second=5120.4,
            peak_memory_bytes=3 * 2**30,
        ),
        merge=MergeCheck(64, 3.1e-9, 0.9987, "bfloat16", True, 2.4e-5),
        data=DataFacts("train.jsonl", "messages", 1500, 120, target_share=0.41, sha256="ab" * 32),
        sheets=(Sheet("Serving", (Fact("Requests", "17"),)),),
        next_steps=(NextStep("Talk to it", "graft chat run"),),
        recipe_yaml="model:\n  name: sprout\n",
        environment=(Fact("torch", "2.13.0"),),
    )


def test_the_page_shows_the_figures(data: ReportData) -> None:
    reader = read(page(data))
    shown = " ".join(reader.text)
    for figure in (
        "sql on sprout",
        "PASS",
        "\u22121.10",  # the difference
        "100\u202f%",  # answers after
        "46,240",
        "15.098\u202f%",
        "1\u202fmin 15\u202fs",
        "5,120",
        "3.0\u202fGiB",
        "99.87\u202f%",
        "3.1e\u22129 nats",
        "1,500",
        "41\u202f%",
        "3 rows were cut.",
        "Serving",
        "graft chat run",
        "name: sprout",
        "2.13.0",
        "Improved most",
        "step 30: training 0.1, held out 1.25",
        "not finite: 1.",
    ):
        assert figure in shown, figure
    assert reader.tags.count("svg") > 6


def test_the_page_shows_what_a_task_is_judged_by(data: ReportData) -> None:
    """Measures, labels and curves of a classifier, whose labels somebody else wrote."""
    label = HOSTILE[0]
    rows = tuple(
        replace(row, reference=label, prediction=label if row.row > 10 else "that",
                figures={"accuracy": float(row.row > 10)})
        for row in evaluation("adapter", 0.5, "this").rows
    )  # fmt: skip
    after = replace(
        evaluation("adapter", 0.5, "this"), rows=rows, measures=("accuracy",), labels=(label, "that")
    )
    before = replace(
        after, rows=tuple(replace(row, prediction="that", figures={"accuracy": 0.0}) for row in rows)
    )
    events = [
        {"kind": kind, "step": step, "loss": 1.0, "metrics": {"accuracy": step / 10}}
        for step in (1, 2)
        for kind in ("step", "evaluate")
    ]
    found = compare(before, after)
    made = replace(data, comparison=found, verdict=verdict(found), curves=curves_from_events(events))
    assert made.curves is not None and made.curves.metrics[0].held_out == ((1.0, 0.1), (2.0, 0.2))
    reader = read(page(made))
    shown = " ".join(reader.text)
    for figure in ("Accuracy", "75.0\u202f%", "+75.0 points", "Taken for", "training 0.2, held out 0.2"):
        assert figure in shown, figure
    assert "Exact answers" not in shown  # accuracy says it
    assert label in shown and "script" not in reader.tags
    assert json.loads(report_json(made))["comparison"]["labels"]["confused"][0]["rows"] == 10


def test_the_page_opens_offline(data: ReportData) -> None:
    html = page(data)
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    assert "@import" not in html
    reader = read(html)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(reader.tags)
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in reader.attributes}
    assert not [name for name, _ in reader.attributes if name.startswith("on")]


def hostile(data: ReportData) -> ReportData:
    """The same report with such text wherever a user, a file or a model has a say."""
    assert data.comparison is not None
    assert data.training is not None
    assert data.data is not None
    samples = tuple(SampleChange(1, 1.0, 0.5, text, text, text, text) for text in HOSTILE)
    script = HOSTILE[0]
    return replace(
        data,
        title=script,
        created=HOSTILE[1],
        notices=tuple(Notice(text, "warning", text) for text in HOSTILE),
        comparison=replace(data.comparison, before=script, after=HOSTILE[1], gains=samples),
        training=replace(
            data.training, base=script, method=script, device=script, sites=(SiteGroup(script, 1, script, 1),)
        ),
        merge=MergeCheck(1, math.nan, math.inf, script, False, note=HOSTILE[1]),
        data=replace(data.data, path=script, format=script, sha256=script),
        sheets=(Sheet(script, (Fact(script, HOSTILE[1]),), script),),
        next_steps=(NextStep(script, HOSTILE[1]),),
        recipe_yaml=HOSTILE[6],
        environment=(Fact(script, HOSTILE[1]),),
    )


def test_hostile_text_is_shown_and_never_run(data: ReportData) -> None:
    html = page(hostile(data))
    html.encode("utf-8")
    reader = read(html)
    assert not {"script", "img"} & set(reader.tags)
    assert reader.tags.count("style") == 1
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    shown = "".join(reader.text)
    assert HOSTILE[0] in shown
    assert "<img src=x onerror=alert(1)> &amp; </div>" in shown
    assert "98,500 more characters" in shown
    assert "[U+202E]evil" in shown
    assert not re.search("[\x00\x1b\u202e\ud800]", shown)
    policy = dict(reader.attributes)["content"]
    assert policy.startswith("default-src 'none'")


def test_long_texts_do_not_blow_the_page_up(data: ReportData) -> None:
    assert data.comparison is not None
    long = tuple(SampleChange(1, 1.0, 0.5, *["y" * 1_000_000] * 4) for _ in range(3))
    html = page(replace(data, comparison=replace(data.comparison, gains=long)))
    assert len(html) < 300_000


def test_files_round_trip(data: ReportData, tmp_path: Path) -> None:
    beside = write_report(tmp_path / "report.html", data)
    assert beside == tmp_path / "report.json"
    assert read_report(beside) == data
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page(data)


def test_hostile_text_and_odd_numbers_survive_json(data: ReportData, tmp_path: Path) -> None:
    found = read_report(write_report(tmp_path / "report.html", hostile(data)))
    assert found.title == HOSTILE[0]
    assert found.merge is not None
    assert math.isnan(found.merge.mean_kl)
    assert found.merge.top1_agreement == math.inf
    json.loads(report_json(hostile(data)), parse_constant=pytest.fail)


def test_what_is_not_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No file"):
        read_report(tmp_path / "report.json")
    (tmp_path / "report.json").write_text('{"title": 3}')
    with pytest.raises(DataError, match="not a report") as caught:
        read_report(tmp_path / "report.json")
    assert any("created" in problem for problem in caught.value.problems)


def test_sections_without_data_are_left_out() -> None:
    reader = read(page(ReportData("empty", "today")))
    assert "h2" not in reader.tags
    assert "svg" not in reader.tags


def test_running_text_has_samples_without_answers(data: ReportData) -> None:
    found = compare(evaluation("base", 2.0, None), evaluation("adapter", 1.0, None))
    assert "no answers" in " ".join(read(page(replace(data, comparison=found))).text)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_have_enough_contrast(palette: dict[str, str]) -> None:
    for ink, ground in TEXT_PAIRS:
        assert contrast(palette[ink], palette[ground]) >= 4.5, (ink, ground)
    for mark, ground in GRAPHIC_PAIRS:
        assert contrast(palette[mark], palette[ground]) >= 3.0, (mark, ground)


def test_the_style_sheet_uses_only_colours_of_the_palette() -> None:
    sheet = style_sheet()
    assert set(re.findall(r"var\(--([a-z-]+)\)", sheet)) <= {*LIGHT, "tone", "tone-soft", "mark"}
    assert LIGHT.keys() == DARK.keys()
    for needed in ("prefers-color-scheme:dark", "@media print", "max-width:720px"):
        assert needed in sheet


def test_curves_read_the_last_event_of_a_step() -> None:
    events: list[dict[str, Any]] = [
        {"kind": "step", "step": 1, "loss": 3.0, "grad_norm": None},
        {"kind": "step", "step": 2, "loss": 2.0},
        {"kind": "step", "step": 2, "loss": 2.5},
        {"kind": "step", "step": 3, "loss": math.nan},
        {"kind": "notice", "text": "loss"},
    ]
    assert curves_from_events(events) == Curves(loss=((1.0, 3.0), (2.0, 2.5)))


def test_charts_cope_with_one_point_and_flat_lines() -> None:
    assert line_chart("Loss", [Series("loss", ())]) == ""
    for points in (((1.0, 2.0),), ((1.0, 0.0), (2.0, 0.0)), tuple((float(s), 5.0) for s in range(500))):
        chart = line_chart("Loss", [Series("loss", points, marks="smoothed")], from_zero=True)
        read(chart)
        assert "nan" not in chart


def test_thinning_keeps_spikes() -> None:
    points = tuple((float(step), 100.0 if step == 777 else 1.0) for step in range(5000))
    thin = thinned(points)
    assert len(thin) <= 240
    assert (777.0, 100.0) in thin
    assert list(thin) == sorted(thin)


def test_smoothing_keeps_straight_lines_and_ends() -> None:
    points = tuple((float(step), 3.0 * step) for step in range(200))
    assert [value for _, value in smoothed(points)] == pytest.approx([value for _, value in points])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.97, 1.03), (1e-6, 2e-4), (-3, 7), (0, 12345)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-9 <= mark <= high + 1e-9 for mark in found)


def test_interval_charts_say_their_numbers(data: ReportData) -> None:
    assert data.comparison is not None
    loss = data.comparison.loss
    chart = interval_chart(loss.before, loss.after, lambda value: f"{value:.2f}")
    read(chart)
    assert f"after: {loss.after.value:.2f}" in chart
    assert interval_chart(replace(loss.before, high=math.inf), loss.after, str) == ""
