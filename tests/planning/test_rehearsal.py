"""A rehearsed step against the same step with values, as PyTorch's own profiler counts it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.bottleneck import BottleneckConfig
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lora import LoraConfig
from graftlm.methods.prefix import PrefixTuningConfig
from graftlm.models.fusing.fused import fusable, fused
from graftlm.models.load import load_model
from graftlm.models.recompute.policy import Policy, recomputing
from graftlm.planning.base_facts import base_facts
from graftlm.planning.ledger import Ledger
from graftlm.planning.rehearsal import Load, Stage, batch_of, objective_of
from graftlm.quant.scheme import Scheme

CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=8, target_modules="all-linear"),
    "dora": LoraConfig(r=8, target_modules="all-linear", use_dora=True),
    "ia3": IA3Config(),
    "bottleneck": BottleneckConfig(),
    "prefix": PrefixTuningConfig(num_virtual_tokens=8),
}
LOAD = Load(rows=2, length=256, documents=2, share=0.5)
CLOSE = 0.05
"""Relative: operators take and give back memory inside that no tensor stands for."""


def peak_by_profiler(config: Any, scheme: str | None, policy: Policy) -> int:
    """Bytes that one micro-batch takes at most, gradients of an earlier one waiting."""
    model, _ = load_model("sprout", device="cpu", quantization=scheme)
    attach(model, config, storage=FOLDER)
    facts = base_facts("sprout")
    objective, found = objective_of(model, facts), fusable(model)
    model.train()
    batch = batch_of(objective, LOAD)
    with fused(found), recomputing(model, policy):
        objective(model, batch).loss_sum.backward()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            objective(model, batch).loss_sum.backward()
    results: Any = seen.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in results.events() if event.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def rehearsed(config: Any, scheme: str | None, policy: Policy) -> float:
    stage = Stage(base_facts("sprout"), config, Scheme.parse(scheme) if scheme else None, torch.bfloat16)
    step = stage.step(LOAD, policy, is_first=False)
    waiting = sum(p.numel() * p.element_size() for p in stage.model.parameters() if p.requires_grad)
    return max(step.forward, step.backward) - waiting  # these were there before the profiler looked


@pytest.mark.parametrize("method", CONFIGS)
def test_a_rehearsal_takes_what_a_step_takes(method: str) -> None:
    assert rehearsed(CONFIGS[method], None, "nothing") == pytest.approx(
        peak_by_profiler(CONFIGS[method], None, "nothing"), rel=CLOSE
    )


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["cheap", "feed_forward", "everything"])
def test_with_recomputation(policy: Policy) -> None:
    config = CONFIGS["lora"]
    assert rehearsed(config, None, policy) == pytest.approx(
        peak_by_profiler(config, None, policy), rel=2 * CLOSE
    )


def test_on_a_packed_base() -> None:
    config = CONFIGS["lora"]
    assert rehearsed(config, "nf4", "nothing") == pytest.approx(
        peak_by_profiler(config, "nf4", "nothing"), rel=CLOSE
    )


def test_layers_lie_on_a_line() -> None:
    facts = base_facts("meta-llama/Llama-3.2-1B")
    steps = [
        Stage(facts, CONFIGS["lora"], None, torch.bfloat16, layers=layers).step(LOAD, "cheap", is_first=True)
        for layers in (2, 4, 6)
    ]
    assert steps[0].between(steps[1], 2.0).backward == pytest.approx(steps[2].backward, rel=0.01)


def test_no_memory_is_taken() -> None:
    facts = base_facts("meta-llama/Llama-3.1-70B")
    stage = Stage(facts, CONFIGS["lora"], Scheme.parse("nf4"), torch.bfloat16, layers=2)
    step = stage.step(Load(rows=1, length=2048), "everything", is_first=True)
    assert step.forward > 100 * 2**20


def test_the_ledger_counts_a_storage_once() -> None:
    with Ledger() as ledger:
        whole = torch.empty(1000, dtype=torch.float32)
        part = whole[10:20]
        again = whole.view(10, 100)
    assert (ledger.live, ledger.peak) == (4000, 4000)
    del whole, part, again
    assert ledger.live == 0
