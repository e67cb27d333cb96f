"""`graft demo`: the whole life of an adapter on the embedded base, offline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftlm.core.progress import say
from graftlm.models.sprout import demo_data_path
from graftlm.verbs.merge import merge
from graftlm.verbs.outputs import next_free, require_new_output
from graftlm.verbs.run_folder import RUNS
from graftlm.verbs.tune import tune
from graftlm.verbs.tune_result import TuneResult

SETTINGS: Mapping[str, Any] = {
    "data.eval_fraction": 0.15,
    "data.max_length": 256,
    "train.num_train_epochs": 3,
    "train.learning_rate": 8e-4,
    "eval.metrics": ["loss", "exact_match"],
    "eval.max_forgetting": 0.05,
}
"""The learning rate trades answers against forgetting; figures in examples/sprout/README.md."""


def demo(out: str | Path | None = None) -> TuneResult:
    """Tune sprout on messages to a shop, measure what it gained and forgot, merge, and prove the merge.

    The folder `out` (new) gets the raw data, the run and the merged model.
    """
    folder = Path(out) if out is not None else next_free(RUNS, "demo")
    require_new_output(folder)
    folder.mkdir(parents=True)
    data = folder / "messages.jsonl"
    shutil.copyfile(demo_data_path(), data)
    first = json.loads(data.read_text(encoding="utf-8").splitlines()[0])
    say("sprout is a small model made for this demo; real work names a real model.")
    say(f"Task   {first['prompt']!r}\n    -> {first['completion']!r}")
    overrides = [f"{key}={json.dumps(value)}" for key, value in SETTINGS.items()]
    result = tune(data, model="sprout", task="sft", out=folder / "run", overrides=overrides)
    merged = merge(result.run, folder / "merged")
    lines = (*result.lines, *merged.lines)
    figures = {**result.figures, "merged": merged.as_dict()}
    return replace(result, lines=lines, figures=figures)
