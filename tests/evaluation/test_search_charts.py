"""Charts of a search: well-formed, escaped, and with every trial in its place."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

from graftlm.evaluation.report_text import precise
from graftlm.evaluation.search_charts import (
    Axis,
    Mark,
    Path,
    front_chart,
    halving_chart,
    parallel_chart,
    parameter_count,
)

HOSTILE = '<script>alert("x")</script>'


def marks(count: int = 9) -> list[Mark]:
    kinds = ("front", "whole", "stopped")
    return [
        Mark(n, 10.0**n, 1.0 + n / 10, 0.05, kinds[n % 3], name=HOSTILE if n == 0 else "", title=HOSTILE)  # type: ignore[arg-type]
        for n in range(count)
    ]


def parsed(chart: str) -> ElementTree.Element:
    """The figure as XML: what is not well-formed raises."""
    return ElementTree.fromstring(chart)


def test_every_trial_is_drawn_once_and_nothing_escapes() -> None:
    chart = front_chart("Loss", marks(), (0.9, 1.1), ("parameters", "Loss"), (parameter_count, precise))
    assert len(parsed(chart).findall(".//circle")) == 9
    assert "<script" not in chart and HOSTILE.replace("<", "&lt;").split("&")[1][:9] in chart


def test_a_diverged_trial_stays_at_the_edge_and_moves_no_other() -> None:
    def places(chart: str) -> list[float]:
        return [float(y) for y in re.findall(r'class="mark[^"]*" cx="[\d.]+%" cy="([\d.]+)%"', chart)]

    calm = marks(6)
    wild = [*calm, Mark(9, 10.0, 1e6, 0.0, "stopped")]
    shows = (parameter_count, precise)
    before = places(front_chart("Loss", calm, None, ("parameters", "Loss"), shows))
    after = places(front_chart("Loss", wild, None, ("parameters", "Loss"), shows))
    assert all(0 <= y <= 100 for y in after)
    spread = max(before) - min(before)
    assert max(sorted(after)[1:]) - min(sorted(after)[1:]) > spread / 6


def test_charts_without_content_are_left_out() -> None:
    shows = (parameter_count, precise)
    assert front_chart("Loss", [], None, ("parameters", "Loss"), shows) == ""
    nan = [Mark(0, 10.0, math.nan, 0.0, "whole")]
    assert front_chart("Loss", nan, None, ("parameters", "Loss"), shows) == ""
    one_leg = [Path(0, ((1.0, 2.0),), "whole", "")]
    assert halving_chart("Rungs", one_leg, precise) == ""
    assert parallel_chart("Settings", [Axis("r", (0.5,), ())], ["front"], [""]) == ""


def test_a_single_trial_can_be_drawn() -> None:
    chart = front_chart("Loss", marks(1), (1.0, 1.0), ("parameters", "Loss"), (parameter_count, precise))
    assert len(parsed(chart).findall(".//circle")) == 1


def test_threads_leave_out_what_a_trial_does_not_have() -> None:
    axes = [
        Axis("type", (0.0, 1.0), ((0.0, "lora"), (1.0, HOSTILE))),
        Axis("r", (0.5, None), ((0.5, "8"),)),
        Axis("loss", (0.2, 0.9), ()),
    ]
    chart = parallel_chart("Settings", axes, ["front", "stopped"], ["one", "other"])
    lines = [line.get("points", "") for line in parsed(chart).findall(".//polyline")]
    assert sorted(len(line.split()) for line in lines) == [2, 3]


def test_rungs_are_drawn_by_the_share_of_the_steps() -> None:
    paths = [
        Path(0, ((0.11, 3.0), (0.33, 2.0), (1.0, 1.0)), "front", "trial 0"),
        Path(1, ((0.11, 4.0),), "stopped", "trial 1"),
    ]
    chart = halving_chart("Rungs", paths, precise)
    assert len(parsed(chart).findall(".//circle")) == 4
    for share in ("11%", "33%", "100%"):
        assert f">{share}<" in chart
