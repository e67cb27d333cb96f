"""Write the tables of docs/results/diagnosis.md from `results/diagnosis.csv`.

    python benchmarks/diagnosis_page.py            rewrite what stands between the page's markers
    python benchmarks/diagnosis_page.py --check    only say whether the page is as the results have it

The last row of a case or a clean run counts; all else on the page is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness import results
from harness.page import write_page

from graftlm.diagnosis.table import RULES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results" / "diagnosis.md"
RESULTS = results.FOLDER / "diagnosis.csv"
PLACE = re.compile(r"(<!-- results: ([\w-]+) -->)\n.*?(<!-- end -->)", re.DOTALL)
Row = Mapping[str, str]


def filled(text: str) -> str:
    """The page with every table as the results have it now."""
    rows = {(row["kind"], row["rule"], row["name"]): row for row in results.read(RESULTS)}
    cases = [row for (kind, _, _), row in rows.items() if kind == "case"]
    clean = [row for (kind, _, _), row in rows.items() if kind == "clean"]
    tables = {"summary": _summary(cases, clean), "rules": _rules(cases, clean), "clean": _clean(clean)}
    return PLACE.sub(lambda match: f"{match[1]}\n\n{tables[match[2]]}\n\n{match[3]}", text)


def _summary(cases: Sequence[Row], clean: Sequence[Row]) -> str:
    made = [row for row in cases if row["outcome"] != "left out"]
    if not made:
        return "not measured"
    seen = [row for row in made if row["outcome"] in ("mended", "not mended")]
    mended = [row for row in made if row["outcome"] == "mended"]
    alarms = [row for row in clean if row["outcome"] == "alarm"]
    where = dict.fromkeys((row["machine"], row["versions"], row["date"][:10]) for row in (*made, *clean))
    lines = [
        f"- {len(seen)} of {len(made)} failures recognised, of {len({row['rule'] for row in made})} rules "
        f"({_bound(len(made) - len(seen), len(made))}).",
        f"- {len(mended)} of {len(made)} gone after the fix.",
        f"- {len(alarms)} of {len(clean)} clean runs with a finding "
        f"({_bound(len(alarms), len(clean))}), {len(RULES)} rules asked of each.",
        f"- {'; '.join(', '.join(one) for one in where)}.",
    ]
    return "\n".join(lines)


def _bound(failures: int, trials: int) -> str:
    """The rule of three, where nothing failed."""
    if failures or not trials:
        return f"{failures} of {trials}"
    return f"at most {min(100.0, 100 * 3 / trials):.0f} % by the rule of three"


def _rules(cases: Sequence[Row], clean: Sequence[Row]) -> str:
    lines = [
        "| rule | failure | cases | recognised | gone after the fix | least sure | on clean runs |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for rule in RULES.values():
        own = [row for row in cases if row["rule"] == rule.id and row["outcome"] != "left out"]
        seen = [row for row in own if row["outcome"] in ("mended", "not mended")]
        sure = min((float(row["confidence"]) for row in seen), default=None)
        alarms = sum(rule.id in row["others_after"].split() for row in clean)
        gone = sum(row["outcome"] == "mended" for row in own)
        least = "" if sure is None else f"{sure:.2f}"
        lines.append(f"| {rule.id} | {rule.title} | {len(own)} | {len(seen)} | {gone} | {least} | {alarms} |")
    return "\n".join(lines)


def _clean(clean: Sequence[Row]) -> str:
    if not clean:
        return "not measured"
    lines = ["| run | findings |", "|---|---|"]
    return "\n".join(
        [*lines, *(f"| {row['name']} | {row['others_after'] or row['why'] or 'none'} |" for row in clean)]
    )


def main() -> None:
    write_page(__doc__, PAGE, filled)


if __name__ == "__main__":
    main()
