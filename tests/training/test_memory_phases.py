"""Peaks by phase, and what the tensors weigh, against figures known from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rig import RowBatches, Settings, make_evaluate, make_model, make_rows, objective, trainable

from graftlm.core.allocation import return_freed
from graftlm.core.events import read_events
from graftlm.training.loop import train
from graftlm.training.memory import peak_bytes, reset_peak
from graftlm.training.memory_classes import tensor_classes
from graftlm.training.memory_phases import MemoryPhases, PhasePeak, highest
from graftlm.training.optim import make_optimizer

CPU = torch.device("cpu")
MIB = 2**20
needs_reset = pytest.mark.skipif(
    not reset_peak(CPU), reason="this system does not let a process reset its peak"
)


def block(mib: int) -> torch.Tensor:
    return torch.ones(mib * MIB, dtype=torch.uint8)


@needs_reset
def test_each_phase_has_its_own_peak() -> None:
    return_freed()  # of whatever ran in this process before
    phases = MemoryPhases(CPU)
    with phases.during("large"):
        block(200)
    with phases.during("small"):
        block(40)  # the allocator keeps what is smaller than 32 MiB, and takes it from there
    with phases.during("large"):
        block(100)
    large, small = (peak.resident for peak in phases.peaks() if peak.phase in ("large", "small"))
    assert phases.is_exact
    assert large - small == pytest.approx(160 * MIB, abs=8 * MIB)
    assert [peak.phase for peak in phases.peaks()] == ["start", "large", "small"]


@needs_reset
def test_a_phase_within_a_phase_counts_for_both_sides() -> None:
    phases = MemoryPhases(CPU)
    with phases.during("outer"):
        held = block(100)
        with phases.during("inner"):
            block(50)
        del held
    outer, inner = (peak.resident for peak in phases.peaks() if peak.phase in ("outer", "inner"))
    assert inner - outer == pytest.approx(50 * MIB, abs=8 * MIB)


@needs_reset
def test_the_peak_of_the_process_survives_resets() -> None:
    block(300)
    before = peak_bytes(CPU)
    assert reset_peak(CPU)
    assert peak_bytes(CPU) == before


def test_where_nothing_can_be_reset_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftlm.training.memory_phases.reset_peak", lambda device: False)
    phases = MemoryPhases(CPU)
    with phases.during("load"):
        pass
    assert not phases.is_exact
    assert phases.peaks()[1].resident > MIB


def test_peaks_of_two_processes() -> None:
    one = [PhasePeak("load", 5), PhasePeak("forward", 9, 3, 4)]
    other = [PhasePeak("forward", 7, 8, 9), PhasePeak("save", 1)]
    assert highest([one, other]) == (
        PhasePeak("load", 5),
        PhasePeak("forward", 9, 8, 9),
        PhasePeak("save", 1),
    )


def test_a_run_logs_phases_and_classes(tmp_path: Path) -> None:
    model: Any = make_model(quantization="nf4", width=64)
    settings: Any = Settings(max_steps=3, save_steps=1, eval_steps=2)
    train(
        model, objective, RowBatches(make_rows(7)), trainable(model), settings, run=tmp_path,
        evaluate=make_evaluate(model), memory=MemoryPhases(CPU),
    )  # fmt: skip
    events = read_events(tmp_path / "events.jsonl")
    classes, phases = (event for event in events if event["kind"] == "memory")
    assert classes["step"] == 1 and phases["step"] == 3
    named = [peak["phase"] for peak in phases["phases"]]
    assert named == ["start", "forward", "backward", "update", "save", "evaluate"]
    assert all(peak["resident"] > MIB for peak in phases["phases"])
    assert {item["name"] for item in classes["classes"]} >= {"quantised linears", "trained", "gradients"}
    assert events[-1]["kind"] == "end"


@pytest.mark.parametrize(
    ("quantization", "bits"), [("nf4", 4 + 8 / 64 + 32 / (64 * 256)), ("int8", 8 + 32 / 128)]
)
def test_bits_are_counted_from_the_tensors(quantization: str, bits: float) -> None:
    model: Any = make_model(quantization=quantization, width=128, rank=32)
    own = trainable(model)
    optimizer = make_optimizer(own, Settings())
    for item in own.values():
        item.grad = torch.ones_like(item)
    optimizer.step()
    found = {item.name: item for item in tensor_classes(model, own, optimizer)}
    trained = sum(item.numel() for item in own.values())
    layers = 2 * (128 * 128 + 128 * 64 + 256 * 128)
    assert found["quantised linears"].parameters == layers
    assert found["quantised linears"].bits == pytest.approx(bits, rel=0.02)
    assert (found["trained"].parameters, found["trained"].bits) == (trained, 32)
    assert found["gradients"].bytes == 4 * trained
    assert found["optimizer state"].bits == pytest.approx(64, rel=0.01)
    whole = sum(item.numel() for item in model.parameters() if not item.requires_grad)
    dense = ("dense linears", "embeddings", "output head", "norms")
    assert sum(found[name].parameters for name in dense) == whole


def test_a_tied_head_counts_once() -> None:
    model: Any = make_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    own = trainable(model)
    found = {item.name: item for item in tensor_classes(model, own, make_optimizer(own, Settings()))}
    assert "output head" not in found and "optimizer state" not in found
    assert found["embeddings"].parameters == 32 * 16


def test_states_in_8_bits_weigh_a_quarter() -> None:
    pytest.importorskip("bitsandbytes")
    model: Any = make_model(width=64, rank=64)
    own = {name: item for name, item in trainable(model).items() if item.numel() >= 4096}
    optimizer = make_optimizer(own, Settings(optim="adamw_8bit"))
    for item in own.values():
        item.grad = torch.ones_like(item)
    optimizer.step()
    found = {item.name: item for item in tensor_classes(model, own, optimizer)}
    tables = 8 * 2 * 256 * 4 / found["trained"].parameters
    assert found["optimizer state"].bits == pytest.approx(16 + 2 * 32 / 256 + tables, rel=0.01)
