"""Real micro-batches correct a plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graftlm.core.errors import UsageError
from graftlm.planning.base_facts import base_facts
from graftlm.planning.choice import choose
from graftlm.planning.gpus import gpu_named
from graftlm.planning.hardware import this_machine
from graftlm.planning.machine import Machine
from graftlm.planning.option import Choice
from graftlm.planning.requirements import Requirements
from graftlm.tasks.table import task_of
from graftlm.training.recipe import make_recipe
from graftlm.verbs.calibrate import calibrated
from graftlm.verbs.row_lengths import row_lengths


def _rows(folder: Path, **columns: str) -> Path:
    path = folder / "rows.jsonl"
    lines = [{key: f"{text} {number}" for key, text in columns.items()} for number in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _machine() -> Machine:
    """This one, as if it had been measured."""
    machine = this_machine(calibrate=False)
    return replace(machine, rates=replace(machine.rates, is_measured=True))


def _choice(data: Path, machine: Machine) -> Choice:
    sections = {"model": "sprout", "data": {"path": str(data), "max_length": 64}, "method": "lora"}
    recipe = make_recipe(sections, ["model.quantization=none"])
    task = task_of(recipe)
    task.read()
    facts = base_facts("sprout", task.ending)
    rows, recipe = row_lengths(task, task.recipe, facts)
    return choose(recipe, Requirements(), facts, rows, machine)


def test_the_first_option_is_corrected_and_the_others_by_the_same_factor(tmp_path: Path) -> None:
    before = _choice(_rows(tmp_path, prompt="What is", completion="It is"), _machine())
    before = replace(before, options=(before.options[0], before.options[0]))
    state = torch.get_rng_state()
    after = calibrated(before)
    torch.set_rng_state(state)
    first, second = (option.fit.time for option in after.options)
    known = before.options[0].fit.time
    factor = first.step_seconds / known.step_seconds
    assert factor > 0
    assert first.is_calibrated
    assert not second.is_calibrated
    assert second.step_seconds == pytest.approx(first.step_seconds)
    assert f"{factor:.2f} times" in after.notes[-1]
    assert [option.label for option in after.options] == [option.label for option in before.options]


def test_a_machine_elsewhere_cannot_be_calibrated(tmp_path: Path) -> None:
    choice = _choice(_rows(tmp_path, prompt="What is", completion="It is"), gpu_named("rtx4090").machine)
    with pytest.raises(UsageError, match="is not this machine"):
        calibrated(choice)
    with pytest.raises(UsageError, match="nothing to calibrate"):
        calibrated(replace(choice, options=()))


def test_a_task_that_looks_at_all_rows_first_is_refused(tmp_path: Path) -> None:
    data = _rows(tmp_path, prompt="What is", chosen="It is", rejected="No")
    with pytest.raises(UsageError, match="not calibrated"):
        calibrated(_choice(data, _machine()))
