"""How rules show what they saw: row numbers, shares, bars, and the command to train anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.finding import Plot


def bars(title: str, y: str, values: Mapping[str, float], threshold: float | None = None) -> Plot:
    """One bar for each name."""
    points = tuple((float(place), float(value)) for place, value in enumerate(values.values()))
    return Plot(title, "", y, {y: points}, threshold, "bars", tuple(values))


def percent(share: float) -> str:
    """
    >>> percent(0.5), percent(0.004), percent(0.0)
    ('50 %', '0.4 %', '0 %')
    """
    return f"{100 * share:.1f} %" if 0 < share < 0.1 else f"{100 * share:.0f} %"


def of_rows(count: int, rows: int, examples: Sequence[int] = ()) -> str:
    """
    >>> of_rows(3, 1200, (4, 9, 11)), of_rows(40, 80, (1, 2))
    ('3 of 1,200 rows (rows 4, 9, 11)', '40 of 80 rows (rows 1, 2 ...)')
    """
    shown = ", ".join(map(str, examples)) + (" ..." if count > len(examples) else "")
    return f"{count:,} of {rows:,} rows" + (f" (rows {shown})" if examples else "")


def again(evidence: Evidence, name: str, **settings: object) -> str:
    """The command that repeats the run with other settings, dots in their names as `__`; of rows and adapters
    that another trainer made, the one that trains such an adapter here.

    >>> again(Evidence(recipe={"task": "sft"}), "longer", data__max_length=512)
    'graft tune RUN/recipe.yaml --set data.max_length=512 --out RUN-longer'
    """
    begin = "graft tune RUN/recipe.yaml" if evidence.recipe else "graft tune ROWS.jsonl --model MODEL"
    ours = {key: value for key, value in settings.items() if evidence.recipe or key.startswith("method__")}
    said = [f"--set {key.replace('__', '.')}={value}" for key, value in ours.items()]
    return " ".join([begin, *said, f"--out RUN-{name}"])
