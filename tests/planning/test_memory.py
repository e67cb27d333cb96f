"""Predicted phases of runs that are small enough to be quick."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.models.load import load_model
from graftlm.planning.base_facts import base_facts
from graftlm.planning.estimates import MemoryEstimate
from graftlm.planning.hardware import described
from graftlm.planning.machine import Machine, Rates
from graftlm.planning.memory import estimate_memory
from graftlm.planning.workload import Workload
from graftlm.training.memory_classes import tensor_classes
from graftlm.training.recipe import make_recipe

LAPTOP = Machine(
    "laptop", "cpu", 16 * 2**30, 16 * 2**30, 4, ("AVX-512 BF16",), Rates({}, 1.0, 1.0, 1.0), "a test",
    idle_bytes=300 * 2**20,
)  # fmt: skip
WORK = Workload(
    100, 30, 10_000, 0.5, 3000, 100, 1024, 1000, 120, 2, 10, 100, 100, longest_row=200, longest_held_out=200
)


def estimate(base: str, *settings: str, machine: Machine = LAPTOP, work: Workload = WORK) -> MemoryEstimate:
    recipe = make_recipe({"model": {"name": base}, "data": {"path": "data.jsonl"}}, settings)
    return estimate_memory(recipe, base_facts(base), work, machine, recompute=recipe.train.recompute)


def parts(found: MemoryEstimate, phase: str) -> dict[str, float]:
    return {part.name: part.amount for one in found.phases if one.name == phase for part in one.parts}


@pytest.mark.parametrize("settings", [(), ("method.type=ia3",), ("model.quantization=nf4",)])
def test_what_stays_is_what_a_run_counts(settings: tuple[str, ...]) -> None:
    """Against the tensors of the real model with its real optimizer."""
    recipe = make_recipe({"model": {"name": "sprout"}, "data": {"path": "data.jsonl"}}, settings)
    kind = recipe.model.quantization
    model, _ = load_model("sprout", device="cpu", dtype="bfloat16", quantization=kind)
    adapters = attach(model, recipe.method.config, storage=FOLDER)
    trained = adapters.named_parameters("default")
    optimizer = torch.optim.AdamW(list(trained.values()))
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    found = parts(estimate("sprout", *settings), "backward")
    for one in tensor_classes(model, trained, optimizer):
        assert found[one.name] == one.bytes, one.name


def test_phases_have_the_names_of_the_log() -> None:
    names = [phase.name for phase in estimate("sprout").phases]
    assert names == ["load", "evaluate", "attach", "forward", "backward", "update", "save", "verify"]


def test_rows_longer_than_the_context_are_cut() -> None:
    long = replace(WORK, longest_held_out=5000)
    facts: Any = base_facts("sprout")
    assert (
        estimate("sprout", work=long).peak
        == estimate("sprout", work=replace(WORK, longest_held_out=facts.context)).peak
    )


def test_layers_on_the_host_are_not_on_the_card() -> None:
    card = described(gpu=None, memory="12GB")
    base = "meta-llama/Llama-3.2-1B"
    whole, streamed = (
        parts(estimate(base, f"model.placement={place}", machine=card), "backward")
        for place in ("resident", "host")
    )
    assert streamed["dense linears"] == pytest.approx(whole["dense linears"] * 2 / 16)


def test_a_quantised_optimizer_holds_a_quarter() -> None:
    plain = parts(estimate("sprout", "method.r=64"), "backward")
    small = parts(estimate("sprout", "method.r=64", "train.optim=adamw_8bit"), "backward")
    assert small["optimizer state"] < 0.3 * plain["optimizer state"]
