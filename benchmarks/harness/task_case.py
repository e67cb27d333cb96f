"""One case of a task's results: what is tuned, and the rows that a finished run gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from harness import results
from harness.writer import SHARED

PACKAGES = ("torch", "transformers", "graftlm")


@dataclass(frozen=True)
class TaskCase:
    """A run of `graft tune`.

    base, data: a folder of `../shared/models`, a file of `../shared/data`; another path or name as it is.
    method: its name in the tables. recipe: sections of a recipe (`model` and `data.path` are filled in from
    base and data; `train.seed` from seed; `data.eval_path` is found in `../shared/data` too). Data that a
    case makes itself are given as `path`, with `data` for the tables.
    """

    task: str
    base: str
    data: str
    method: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 42
    path: Path | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """What tells a case from another in the results."""
        return (self.task, self.base, self.data, self.method, str(self.seed))

    def as_recipe(self) -> dict[str, Any]:
        """The recipe as `graft tune` reads it."""
        given = self.recipe
        sections: dict[str, Any] = {"method": {"type": self.method}, "task": self.task, **given}
        sections["model"] = {"name": str(_shared("models", self.base)), **given.get("model", {})}
        sections["data"] = {"path": str(self.path or _shared("data", self.data)), **given.get("data", {})}
        if "eval_path" in sections["data"]:
            sections["data"]["eval_path"] = str(_shared("data", sections["data"]["eval_path"]))
        sections["train"] = {"seed": self.seed, "save_steps": 100_000, **given.get("train", {})}
        sections["output"] = {"report_to": "none", **given.get("output", {})}
        return sections


def _shared(kind: str, name: str) -> Path | str:
    found = SHARED / kind / name
    return found if found.exists() else name


def run_case(case: TaskCase, *, threads: int | None = None) -> list[dict[str, Any]]:
    """Tune in a process of its own; one row for each measure.

    Raises:
        SystemExit: the run failed; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as scratch:
        recipe, out = Path(scratch) / "recipe.yaml", Path(scratch) / "run"
        recipe.write_text(yaml.safe_dump(case.as_recipe()), encoding="utf-8")
        command = [sys.executable, "-m", "graftlm", "tune", str(recipe), "--out", str(out), "--json"]
        env = {**os.environ, "COLUMNS": "100", **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        # A run that made things worse leaves with 1, and is a result all the same.
        if not (out / "report.json").is_file():
            raise SystemExit(f"{' '.join(case.key)}\n{done.stderr[-3000:]}")
        figures = json.loads(done.stdout.strip().splitlines()[-1])
        plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    return rows_of(case, figures, plan)


def rows_of(case: TaskCase, figures: Mapping[str, Any], plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the results file keeps of a finished run: one row for each measure."""
    fixed = {
        "task": case.task,
        "base": case.base,
        "data": case.data,
        "method": case.method,
        "seed": case.seed,
        "trainable": plan["trainable"],
    }
    shared = {
        "steps": figures["steps"],
        "seconds": round(float(figures["seconds"]), 1),
        "peak_memory_bytes": figures["peak_memory_bytes"],
        "held_out_rows": figures["after"]["held_out_rows"],
        "machine": results.machine(),
        "versions": results.versions(*PACKAGES),
        "date": results.today(),
    }
    return [
        {
            **fixed,
            "measure": name,
            **_ends("before", found.get("before") or ("", "", "")),
            **_ends("after", found["after"]),
            **shared,
        }
        for name, found in figures["measures"].items()
    ]


def _ends(when: str, interval: Sequence[Any]) -> dict[str, Any]:
    value, low, high = (f"{end:.6g}" if end != "" else "" for end in interval)
    return {when: value, f"{when}_low": low, f"{when}_high": high}
