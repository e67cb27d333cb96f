"""Predicted time: against arithmetic written down elsewhere, kept measurements, and in its directions."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from graftlm.planning.base_facts import BaseFacts, base_facts
from graftlm.planning.cost import cost
from graftlm.planning.estimates import TimeEstimate
from graftlm.planning.gpus import gpu_named
from graftlm.planning.machine import Machine, Rates
from graftlm.planning.setting import computes_in, load_of, setting_of
from graftlm.planning.speed import RUN_PARTS, estimate_time
from graftlm.planning.step_work import (
    ADAPTER,
    ATTENTION,
    BASE,
    COLD,
    HEAD,
    HEAD_ARITHMETIC,
    THIN,
    training_work,
)
from graftlm.planning.work import ATTENTION_START
from graftlm.planning.workload import Workload
from graftlm.training.recipe import Recipe, make_recipe

TWO_CORES = Machine(
    "two cores", "cpu", 24 * 2**30, 24 * 2**30, 2, ("AVX-512 BF16", "AMX BF16"),
    Rates({"bfloat16": 2.7e12, "float32": 4e11}, 2.6e10, 1.15e-5, 1e9, True,
          {"bfloat16": 1.56e12, "float32": 8e10}, 1.5e10),
    "written down from kept measurements",
)  # fmt: skip


def _recipe(*overrides: str, name: str = "sprout", method: Any = "lora") -> Recipe:
    return make_recipe({"model": {"name": name}, "data": {"path": "d.jsonl"}, "method": method}, overrides)


def _workload(tokens: int = 2048, length: int = 512, **changes: Any) -> Workload:
    plain = Workload(
        train_rows=1000, held_out_rows=100, train_tokens=1000 * length, target_share=1.0,
        held_out_tokens=100 * length, mean_row_tokens=length, batch_tokens=tokens, mean_batch_tokens=tokens,
        mean_document=length, micro_batches=1, steps=100, eval_steps=100, save_steps=100,
    )  # fmt: skip
    return replace(plain, **changes)


def _estimate(*overrides: str, name: str = "sprout", method: Any = "lora", recompute: str = "nothing",
              machine: Machine = TWO_CORES, **workload: Any) -> TimeEstimate:  # fmt: skip
    recipe = _recipe(*overrides, name=name, method=method)
    return estimate_time(recipe, base_facts(name), _workload(**workload), machine, recompute=recompute)


def _parts(estimate: TimeEstimate) -> dict[str, float]:
    return {part.name: part.amount for part in estimate.step_parts}


def test_arithmetic_of_a_token_is_that_of_the_theory() -> None:
    """4 (linear + head) + 6 adapter + 3.5 attention: 32.15 GFLOP for Llama-3.1-8B at 2,048 tokens."""
    facts = base_facts("meta-llama/Llama-3.1-8B")
    setting = setting_of(_recipe(name=facts.name), facts, _workload(2048, 2048), TWO_CORES, "nothing")
    work = training_work(
        facts, setting.sites, setting.shape, load_of(setting), "nothing", is_native=True, is_full=False
    )
    attention = work[ATTENTION].attention * 2048 / (2048 + ATTENTION_START)
    products = work[BASE].flops / COLD + work[ADAPTER].flops / THIN + work[HEAD].flops / HEAD_ARITHMETIC
    assert (products + attention) / 2048 / 1e9 == pytest.approx(32.15, rel=0.005)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


def _facts(shape: str, folders: Path) -> BaseFacts:
    """Of a shape of the benchmarks, from its config alone."""
    from harness.shapes import shape_of

    folder = folders / shape
    if not folder.is_dir():
        config = shape_of(shape).config(16384)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        save_file({"none": torch.zeros(1, dtype=torch.bfloat16)}, folder / "model.safetensors")
    return base_facts(str(folder))


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _kept(repository: Path) -> Iterator[tuple[dict[str, str], str, float]]:
    """Rows that were measured on a quiet machine with two cores: row, method, seconds of a step."""
    folder = repository / "benchmarks" / "results"
    for row in _rows(folder / "growth.csv"):
        if row["side"] == "Graft" and row["curve"] not in ("adapters", "active"):
            yield row, "lora", float(row["seconds"])
    for row in _rows(folder / "tuning.csv"):
        if row["side"] == "Graft" and not row["data"] and row["date"].startswith("2026-11-22 15"):
            yield row, row["method"], statistics.median(map(float, row["seconds"].split()[1:]))


def test_kept_measurements_are_met(repository: Path, folders: Path) -> None:
    """The factors of `step_work` were fitted to these rows: whoever changes the model sees what it costs."""
    errors = []
    for row, method, seconds in _kept(repository):
        rank = {"r": int(row["rank"])} if method in ("lora", "dora") else {}
        quantization = row.get("quantization", "none")
        recipe = _recipe(f"model.quantization={quantization}", method={"type": method, **rank})
        rows, length = int(row["rows"]), int(row["length"])
        policy = "everything" if row.get("recompute") == "everything" else "nothing"
        facts, workload = _facts(row["shape"], folders), _workload(rows * length, length)
        found = estimate_time(recipe, facts, workload, TWO_CORES, recompute=policy)
        errors.append(abs(found.step_seconds / seconds - 1))
    assert len(errors) >= 35
    assert statistics.median(errors) < 0.06
    assert max(errors) < 0.25


def test_the_parts_of_an_estimate_are_the_whole() -> None:
    estimate = _estimate()
    assert [part.name for part in estimate.parts] == list(RUN_PARTS)
    assert all(part.amount > 0 for part in estimate.parts)
    assert sum(_parts(estimate).values()) == pytest.approx(estimate.step_seconds)
    steps = next(part.amount for part in estimate.parts if part.name == "steps")
    assert steps == pytest.approx(100 * estimate.step_seconds)
    assert not estimate.is_calibrated
    assert 0 < estimate.base_seconds < next(part.amount for part in estimate.parts if part.name == "evaluate")


@settings(max_examples=30, deadline=None)
@given(st.integers(64, 8192), st.integers(1, 8), st.sampled_from(["lora", "dora", "ia3", "prefix", "full"]))
def test_more_work_takes_longer(tokens: int, times: int, method: str) -> None:
    one = _estimate(method=method, tokens=tokens, length=min(tokens, 512))
    more = _estimate(method=method, tokens=2 * tokens, length=min(tokens, 512))
    assert one.step_seconds < more.step_seconds < 2 * one.step_seconds
    several = _estimate(method=method, tokens=tokens, length=min(tokens, 512), micro_batches=times)
    assert several.step_seconds <= times * one.step_seconds + 1e-12
    assert several.step_seconds >= one.step_seconds


def test_what_each_choice_adds() -> None:
    plain = _estimate()
    for name, other in {
        "rank": _estimate(method={"type": "lora", "r": 256}),
        "recomputation": _estimate(recompute="everything"),
        "packed": _estimate("model.quantization=nf4"),
        "a longer document": _estimate(mean_document=4096),
        "float32": _estimate("model.dtype=float32"),
    }.items():
        assert other.step_seconds > plain.step_seconds, name
    assert _estimate(recompute="cheap").step_seconds < _estimate(recompute="feed_forward").step_seconds
    assert _estimate(recompute="auto") == plain
    assert _estimate(target_share=0.2).step_seconds < plain.step_seconds, "the head sees labelled rows only"
    top = _estimate(method={"type": "lora", "layers_to_transform": [3]})
    assert top.step_seconds < plain.step_seconds, "no gradient below the first adapter"
    assert "decoding of a packed base" in _parts(_estimate("model.quantization=nf4"))
    assert "weights on their way" in _parts(_estimate("model.placement=disk"))


def test_answers_are_written_only_where_they_are_short() -> None:
    short = _estimate(length=60, target_share=0.3)
    long = _estimate(length=600, target_share=0.3, held_out_tokens=6000)
    asked = _estimate("eval.metrics=[exact_match]", length=600, target_share=0.3, held_out_tokens=6000)
    estimates = (short, long, asked)
    seconds = [{part.name: part.amount for part in each.parts}["evaluate"] for each in estimates]
    assert seconds[1] < min(seconds[0], seconds[2])


def test_a_gpu_that_waits_for_its_host_is_as_slow_for_a_smaller_model() -> None:
    card = gpu_named("h200").machine
    small = _estimate(name="Qwen/Qwen3-0.6B", machine=card, tokens=4096, length=2048)
    larger = _estimate(name="Qwen/Qwen3-1.7B", machine=card, tokens=4096, length=2048)
    assert larger.step_seconds < 1.3 * small.step_seconds, "both have 28 layers to ask for"
    eight = _estimate(name="Qwen/Qwen3-8B", machine=card, tokens=16384, length=2048)
    assert 8_000 < 16384 / eight.step_seconds < 25_000, "tokens per second of published runs and their bound"


def test_the_dtype_is_that_of_the_run() -> None:
    sprout, no_half = base_facts("sprout"), replace(TWO_CORES, instruction_sets=("AVX2",))
    assert computes_in(_recipe(), sprout, TWO_CORES) == sprout.dtype == "bfloat16"
    assert computes_in(_recipe(), sprout, no_half) == "float32"
    assert computes_in(_recipe("model.dtype=float32"), sprout, TWO_CORES) == "float32"
    assert computes_in(_recipe("model.quantization=nf4"), sprout, no_half) == "float32"
    assert computes_in(_recipe(), sprout, gpu_named("t4").machine) == "float32"
    assert computes_in(_recipe(), sprout, gpu_named("l4").machine) == "bfloat16"


def test_cost_needs_a_price() -> None:
    assert cost(7200, TWO_CORES) is None
    assert cost(7200, replace(TWO_CORES, price_per_hour=1.5)) == 3.0
