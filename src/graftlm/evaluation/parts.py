"""Several tasks in one evaluation: rows of all of them, each with the figures of its own task.

A figure or measure of a task bears the task's name: `intent/accuracy`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from graftlm.evaluation.measures import MEASURES, MeanOf, Measure, Rows
from graftlm.evaluation.runner import EvaluatedRow, Evaluation

LOSS = "loss"


def joined(name: str, parts: Mapping[str, Evaluation]) -> Evaluation:
    """One evaluation of all tasks; each is judged by what it is judged by alone, and by its loss."""
    rows = [_named(part, row) for part, found in parts.items() for row in found.rows]
    measures = [f"{part}/{one}" for part, found in parts.items() for one in (*found.measures, LOSS)]
    return Evaluation(
        name,
        tuple(rows),
        sum(found.seconds for found in parts.values()),
        all(found.complete for found in parts.values()),
        "; ".join(f"{part}: {found.logits_path}" for part, found in parts.items()),
        tuple(measures),
    )


def parted(evaluation: Evaluation) -> dict[str, Evaluation]:
    """The evaluation of each task: the inverse of `joined`, but for the time that each took."""
    found: dict[str, Evaluation] = {}
    for part in dict.fromkeys(name.partition("/")[0] for name in evaluation.measures):
        prefix, mark = f"{part}/", f"{part}/{LOSS}"
        own = [name.removeprefix(prefix) for name in evaluation.measures if name.startswith(prefix)]
        rows = tuple(
            replace(row, figures=_plain(row.figures, prefix))
            for row in evaluation.rows
            if mark in row.figures
        )
        found[part] = replace(evaluation, rows=rows, measures=tuple(name for name in own if name != LOSS))
    return found


def part_measure(name: str) -> Measure | None:
    """The measure `part/measure` of one task in such an evaluation; None where there is none.

    >>> row = EvaluatedRow(1, "", 0.0, 1, figures={"intent/accuracy": 1.0})
    >>> part_measure("intent/accuracy").value([row])
    1.0
    """
    part, separator, inner = name.partition("/")
    if not separator:
        return None
    if inner == LOSS:
        return Measure(name, f"{part}: loss", _loss, "lower", "nats", figures=(name,))
    found = MEASURES.get(inner)
    if found is None:
        return None
    is_name = found.title[:2].isupper()  # KL, F1
    title = f"{part}: {found.title if is_name else found.title[:1].lower() + found.title[1:]}"
    if isinstance(found.value, MeanOf):
        return replace(found, name=name, title=title, value=MeanOf(f"{part}/{found.value.name}"))
    own = tuple(f"{part}/{figure}" for figure in found.figures)
    return replace(found, name=name, title=title, value=_without_name(part, found.value), figures=own)


def _named(part: str, row: EvaluatedRow) -> EvaluatedRow:
    own = {f"{part}/{name}": value for name, value in row.figures.items()}
    return replace(row, figures={**own, f"{part}/{LOSS}": row.loss})


def _loss(rows: Rows) -> float:
    """Per target, as training has it."""
    return sum(row.loss_sum for row in rows) / sum(row.tokens for row in rows)


def _without_name(part: str, value: Callable[[Rows], float]) -> Callable[[Rows], float]:
    """The measure of a task, of rows whose figures bear the task's name."""
    prefix = f"{part}/"

    def found(rows: Rows) -> float:
        return value([replace(row, figures=_plain(row.figures, prefix)) for row in rows])

    return found


def _plain(figures: Mapping[str, float], prefix: str) -> dict[str, float]:
    own = {key.removeprefix(prefix): value for key, value in figures.items() if key.startswith(prefix)}
    return {key: value for key, value in own.items() if key != LOSS}
