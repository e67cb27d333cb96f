"""`report.html` of a search: one page that opens offline, drawn from what the search found."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from graftlm.evaluation.measure_text import shown
from graftlm.evaluation.report_charts import bar_chart
from graftlm.evaluation.report_data import NextStep
from graftlm.evaluation.report_facts import next_section, recipe_section
from graftlm.evaluation.report_results import verdict_section
from graftlm.evaluation.report_style import style_sheet
from graftlm.evaluation.report_text import count, duration, percent, precise, size, text
from graftlm.evaluation.search_charts import (
    STYLE,
    Axis,
    Kind,
    Mark,
    Path,
    front_chart,
    halving_chart,
    parallel_chart,
    parameter_count,
)
from graftlm.evaluation.verdict import Verdict
from graftlm.search.decisions import spent
from graftlm.search.scores import noise
from graftlm.search.trials import Trial
from graftlm.verbs.references import RECIPE
from graftlm.verbs.searching.finish import Outcome, chosen_text
from graftlm.verbs.searching.result import SearchResult
from graftlm.verbs.searching.saying import point_text
from graftlm.verbs.searching.search import Searching

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_COST_NAMES = {"parameters": "parameters trained", "memory": "peak memory", "seconds": "seconds of a run"}
_COST_SHOWN = {"parameters": parameter_count, "memory": size, "seconds": lambda value: f"{value:.3g} s"}


def page(search: Searching, found: Outcome, result: SearchResult) -> str:
    """The whole document."""
    title = text(f"{search.folder.path.resolve().name}: search on {search.settings.recipe['model']['name']}")
    sections = (
        _summary(search, found),
        _charts(search, found),
        _finals(search, found),
        _table(search, found),
        _importance(found),
        next_section(_next(search)),
        recipe_section((search.folder.path / RECIPE).read_text(encoding="utf-8")),
    )
    verdict = Verdict("PASS" if result.passed else "INSUFFICIENT", result.verdict)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{title} \u00b7 Graft report</title><style>{style_sheet()}{STYLE}</style></head>\n<body>"
        f'<header><p class="eyebrow">Graft search</p><h1 dir="auto">{title}</h1>'
        f'<p class="meta">{text(datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))}</p>'
        f"{verdict_section(verdict)}</header>\n<main>"
        + "\n".join(section for section in sections if section)
        + "</main>\n<footer>This file holds everything it shows and opens without a network. "
        "The same figures for machines: result.json beside it.</footer></body></html>\n"
    )


def _summary(search: Searching, found: Outcome) -> str:
    used, whole = spent(found.trials), sum(trial.state == "whole" for trial in found.trials)
    tiles = (
        ("Trials", count(len(found.trials)), f"{whole} trained to their end"),
        ("Chosen", f"trial {found.chosen}", "of those equal to the best, the cheapest"),
        ("Equal to the best", count(len(found.equal)), "within the noise of the rows"),
        ("Time", duration(used.seconds), f"{count(used.tokens)} tokens"),
    )
    drawn = "".join(
        f'<div class="card tile"><p class="label">{text(label)}</p><p class="figure">{text(figure)}</p>'
        f'<p class="sub">{text(sub)}</p></div>'
        for label, figure, sub in tiles
    )
    return f'<div class="tiles">{drawn}</div><p class="note after">{text(chosen_text(search, found))}.</p>'


def _charts(search: Searching, found: Outcome) -> str:
    metric = search.metric
    marks = [_mark(search, found, trial) for trial in found.trials if trial.rungs]
    name = search.settings.costs[0] if search.settings.costs else "parameters"
    band = _band(search, found)
    charts = (
        front_chart(
            f"{metric.title} against {_COST_NAMES[name]}", marks, band, (_COST_NAMES[name], metric.title),
            (_COST_SHOWN[name], precise),
        ),
        halving_chart("How trials went on, and where they were stopped", _paths(search, found), precise),
        _parallel(search, found),
    )  # fmt: skip
    body = "".join(charts)
    note = (
        "The band is what rows do not tell from the best trial. Whiskers are 95 % intervals of each figure; "
        "differences between trials are surer, because all were measured on the same rows. Trials that were "
        "stopped early are drawn where they stood, after fewer steps."
    )
    return (
        f'<section><h2>Trials</h2><div class="charts">{body}</div><p class="note after">{note}</p></section>'
    )


def _mark(search: Searching, found: Outcome, trial: Trial) -> Mark:
    rung, roles = trial.rungs[-1], _roles(found, trial.number)
    name = search.settings.costs[0] if search.settings.costs else "parameters"
    return Mark(
        number=trial.number,
        cost=rung.costs[name],
        value=search.metric.shown(rung.score.value),
        error=rung.score.error,
        kind=_kind(found, trial),
        name=", ".join(roles),
        title=_title(search, trial),
    )


def _title(search: Searching, trial: Trial) -> str:
    rung = trial.rungs[-1]
    value = shown(search.metric.shown(rung.score.value), search.metric.unit)
    return f"trial {trial.number}: {point_text(trial.fields)}: {value} after {rung.step:,} steps"


def _roles(found: Outcome, number: int) -> list[str]:
    roles = (("chosen", found.chosen), ("best", found.best), ("knee", found.knee))
    return [role for role, holder in roles if holder == number]


def _kind(found: Outcome, trial: Trial) -> Kind:
    if any(one.number == trial.number for one in found.front):
        return "front"
    return "whole" if trial.state == "whole" else "stopped"


def _band(search: Searching, found: Outcome) -> tuple[float, float] | None:
    """Around the best: the typical noise of a difference to it."""
    leader = next(one for one in found.whole if one.number == found.best)
    others = [noise(one.score, leader.score) for one in found.whole if one is not leader]
    if not others:
        return None
    width = sorted(others)[len(others) // 2]
    value = search.metric.shown(leader.score.value)
    return value - width, value + width


def _paths(search: Searching, found: Outcome) -> list[Path]:
    return [
        Path(
            trial.number,
            tuple(
                (rung.step / trial.steps[-1], search.metric.shown(rung.score.value)) for rung in trial.rungs
            ),
            _kind(found, trial),
            _title(search, trial),
        )
        for trial in found.trials
        if trial.rungs
    ]


def _parallel(search: Searching, found: Outcome) -> str:
    trials = [trial for trial in found.trials if trial.rungs]
    names = dict.fromkeys(name for trial in trials for name in trial.fields)
    axes = [_axis(name, [trial.fields.get(name) for trial in trials]) for name in names]
    values = [search.metric.shown(trial.rungs[0].score.value) for trial in trials]
    share = trials[0].rungs[0].step / trials[0].steps[-1] if trials else 1.0
    after = "" if share == 1 else f" at {share:.0%}"
    axes.append(_axis(f"{search.metric.title}{after}", values))
    kinds = [_kind(found, trial) for trial in trials]
    return parallel_chart("Settings of every trial", axes, kinds, [_title(search, one) for one in trials])


def _axis(name: str, values: Sequence[Any]) -> Axis:
    known = [value for value in values if value is not None]
    label = name.rpartition(".")[2]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        scale = math.log if min(known) > 0 and max(known) >= 8 * min(known) else float
        low, high = scale(min(known)), scale(max(known))
        width = (high - low) or 1.0
        places = tuple(None if value is None else (scale(value) - low) / width for value in values)
        distinct = sorted(set(known))
        marks = distinct if len(distinct) <= 6 else [distinct[0], distinct[len(distinct) // 2], distinct[-1]]
        return Axis(label, places, tuple(((scale(one) - low) / width, precise(one)) for one in marks))
    options = sorted({json.dumps(value) for value in known})
    spot = {one: index / max(1, len(options) - 1) for index, one in enumerate(options)}
    places = tuple(None if value is None else spot[json.dumps(value)] for value in values)
    return Axis(label, places, tuple((place, one.strip('"')) for one, place in spot.items()))


def _finals(search: Searching, found: Outcome) -> str:
    metric = search.metric
    rows = []
    for one in found.finals:
        trial, change = found.trial(one.number), one.change
        selected = shown(metric.shown(trial.rungs[-1].score.value), metric.unit)
        low, high = (shown(end, metric.unit) for end in (change.after.low, change.after.high))
        rows.append(
            f'<tr><td class="role">trial {one.number} ({text(", ".join(_roles(found, one.number)))})</td>'
            f'<td class="n">{selected}</td><td class="n">{shown(change.after.value, metric.unit)}</td>'
            f'<td class="n">{low.split(" ")[0]} to {high}</td>'
            f'<td class="n">{shown(change.before.value, metric.unit)}</td>'
            f'<td class="n">{text(metric.span(change.difference))}</td></tr>'
        )
    head = (
        '<tr><th></th><th class="n">to select by</th><th class="n">final</th><th class="n">95 %</th>'
        '<th class="n">base</th><th class="n">change, 95 %</th></tr>'
    )
    note = (
        "Trials were compared on the rows to select by, which makes the winner look better than it is. The "
        "final rows were used for nothing but this table."
    )
    return (
        f'<section><h2>On rows that nothing was chosen by</h2><div class="card scroll"><table>{head}'
        f'{"".join(rows)}</table></div><p class="note after">{note}</p></section>'
    )


def _table(search: Searching, found: Outcome) -> str:
    order = {one.number: place for place, one in enumerate(sorted(found.whole, key=lambda w: w.score.value))}
    trials = sorted(
        found.trials,
        key=lambda trial: (order.get(trial.number, len(order)), -trial.reached, _last(trial), trial.number),
    )
    rows = "".join(_row(search, found, trial) for trial in trials)
    head = (
        f'<tr><th>trial</th><th>settings</th><th class="n">{text(search.metric.title)}</th>'
        '<th class="n">steps</th><th class="n">parameters</th><th class="n">a whole run</th><th></th></tr>'
    )
    return (
        f'<section><h2>Every trial</h2><div class="card scroll"><table>{head}{rows}</table></div></section>'
    )


def _last(trial: Trial) -> float:
    return trial.rungs[-1].score.value if trial.rungs else math.inf


def _row(search: Searching, found: Outcome, trial: Trial) -> str:
    state: Mapping[str, str] = {"stopped": "stopped early", "failed": f"failed: {trial.why}"}
    roles = _roles(found, trial.number)
    if trial.state == "whole" and not roles and trial.number in found.equal:
        roles = ["equal to the best"]
    told = ", ".join(roles) or state.get(trial.state, "")
    style = ' class="is-chosen"' if trial.number == found.chosen else ""
    opening = f'<tr{style}><td>{trial.number}</td><td class="fields">{text(point_text(trial.fields))}</td>'
    if not trial.rungs:
        return f'{opening}<td></td><td></td><td></td><td></td><td class="role">{text(told)}</td></tr>'
    rung = trial.rungs[-1]
    value = shown(search.metric.shown(rung.score.value), search.metric.unit)
    return (
        f'{opening}<td class="n">{value}</td><td class="n">{count(rung.step)}</td>'
        f'<td class="n">{count(rung.costs["parameters"])}</td>'
        f'<td class="n">{duration(rung.costs["seconds"])}</td><td class="role">{text(told)}</td></tr>'
    )


def _importance(found: Outcome) -> str:
    if not found.importance:
        return ""
    bars = [
        (f"{one.name.rpartition('.')[2]}{'' if one.is_clear else ' (chance?)'}", one.share)
        for one in found.importance
    ]
    chart = bar_chart("Share of the differences that one setting explains alone", bars, lambda s: percent(s))
    note = (
        f"Ranks of {found.importance[0].trials} trials at their first measurement, each predicted from the "
        "others. What chance shows as often as one time in twenty is marked; interactions are not counted."
    )
    body = f'<div class="card">{chart}<p class="note">{note}</p></div>'
    return f"<section><h2>Settings that matter</h2>{body}</section>"


def _next(search: Searching) -> tuple[NextStep, ...]:
    folder = search.folder.path
    return (
        NextStep("Talk to the chosen adapter", f"graft chat {folder}"),
        NextStep("Train it again with a full report", f"graft tune {folder / RECIPE}"),
        NextStep("Repeat one trial", f"graft tune {folder}/trials/000/{RECIPE}"),
        NextStep("Make one dense model of base and adapter", f"graft merge {folder} --out {folder}-merged"),
    )
