"""The optimizers of bitsandbytes: the same groups, the same numbers as there, saved and resumed exactly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import Settings, contents, make_model, trainable
from safetensors.torch import load_file
from torch import nn

from graftlm.core.errors import CheckpointError, ConfigError, MissingDependency
from graftlm.core.notices import forget_notices, notices_to
from graftlm.training.checkpoint import OPTIMIZER, checkpoint_path, save
from graftlm.training.low_bit_optim import FORMS, require_optimizer
from graftlm.training.optim import make_optimizer, set_learning_rate
from graftlm.training.optimizer_state import state_tensors
from graftlm.training.progress import Progress
from graftlm.training.restore import restore
from graftlm.training.tensors import tensor_bytes

bitsandbytes = pytest.importorskip("bitsandbytes")

# 7 rows: 2 windows of 2 micro-batches an epoch, 6 steps. Matrices of 64 x 64 have states in 8 bits.
WIDE: dict[str, Any] = {"width": 64, "rank": 64, "quantization": "nf4"}
SETTINGS: dict[str, Any] = {"num_train_epochs": 3, "save_steps": 2, "model": WIDE}


def parameters() -> dict[str, nn.Parameter]:
    """A matrix with its state in 8 bits, one that does not fill its last block, a small one, a vector."""
    draw = torch.Generator().manual_seed(5)
    shapes = {"a": (64, 128), "odd": (67, 71), "b": (8, 16), "vector": (24,)}
    return {name: nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in shapes.items()}


def updated(
    named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: int, seed: int = 9
) -> None:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for item in named.values():
            item.grad = torch.randn(item.shape, generator=draw)
        optimizer.step()


def same(one: dict[str, nn.Parameter], other: dict[str, nn.Parameter]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", FORMS)
def test_updates_are_those_of_bitsandbytes(name: str) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = make_optimizer(ours, Settings(optim=name, weight_decay=0.1, learning_rate=1e-2))
    kind = bitsandbytes.optim.AdamW32bit if "32bit" in name else bitsandbytes.optim.AdamW8bit
    matrices = [item for item in theirs.values() if item.ndim >= 2]
    reference = kind(
        [{"params": matrices, "weight_decay": 0.1}, {"params": [theirs["vector"]], "weight_decay": 0.0}],
        lr=1e-2,
    )
    updated(ours, optimizer, 4)
    updated(theirs, reference, 4)
    assert same(ours, theirs)


def test_only_large_tensors_have_states_in_8_bits() -> None:
    named = parameters()
    optimizer = make_optimizer(named, Settings(optim="adamw_8bit"))
    updated(named, optimizer, 1)
    stored = state_tensors(named, optimizer)
    kinds = {name: stored[f"state1/{name}"].dtype for name in named}
    assert kinds == {
        "a": torch.uint8, "odd": torch.uint8, "b": torch.float32, "vector": torch.float32,
    }  # fmt: skip
    assert [key for key in stored if "/" not in key] == ["qmap1", "qmap2"], "shared tables are stored once"
    plain = make_optimizer(named, Settings())
    updated(named, plain, 1)
    assert tensor_bytes(stored) < 0.35 * tensor_bytes(state_tensors(named, plain))


def test_steps_are_deterministic() -> None:
    results = []
    for _ in range(2):
        named = parameters()
        updated(named, make_optimizer(named, Settings(optim="adamw_8bit")), 20)
        results.append(named)
    assert same(*results)


@pytest.mark.parametrize("name", FORMS)
def test_decay_and_lora_plus_and_rates(name: str) -> None:
    named = trainable(make_model())
    b = [key for key in named if key.endswith(".lora_B")]
    settings = Settings(optim=name, loraplus_lr_ratio=16.0, weight_decay=0.1)
    optimizer = make_optimizer(named, settings, lora_b=b)
    set_learning_rate(optimizer, 1e-4)
    for group in optimizer.param_groups:
        for item in group["params"]:
            key = next(key for key, own in named.items() if own is item)
            assert group["lr"] == pytest.approx(16e-4 if key in b else 1e-4)
            assert group["weight_decay"] == (0.1 if item.ndim >= 2 else 0.0)


def test_states_in_8_bits_learn_as_those_in_32() -> None:
    """Least squares from the same start: both come as far."""
    losses = {}
    for name in ("adamw", "adamw_8bit"):
        draw = torch.Generator().manual_seed(1)
        x, goal = torch.randn(256, 64, generator=draw), torch.randn(64, 64, generator=draw)
        weight = nn.Parameter(torch.zeros(64, 64))
        optimizer = make_optimizer({"w": weight}, Settings(optim=name, learning_rate=3e-2, weight_decay=0.0))
        for _ in range(150):
            loss = (x @ (weight - goal)).square().mean()
            weight.grad = torch.autograd.grad(loss, weight)[0]
            optimizer.step()
        losses[name] = float(loss.detach())
    assert losses["adamw_8bit"] < 0.05 * float(goal.square().mean()) * 64
    assert losses["adamw_8bit"] < 1.5 * losses["adamw"] + 0.05


@pytest.mark.parametrize("name", FORMS)
def test_what_is_saved_is_restored(name: str, tmp_path: Path) -> None:
    settings = Settings(optim=name, learning_rate=1e-2)
    whole, stopped, resumed = parameters(), parameters(), parameters()
    optimizer = make_optimizer(whole, settings)
    updated(whole, optimizer, 3)
    half = make_optimizer(stopped, settings)
    updated(stopped, half, 3)
    path = save(
        tmp_path, parameters=stopped, optimizer=half, progress=Progress().advanced(step=3), identity={}
    )
    again = make_optimizer(resumed, settings)
    restore(path, parameters=resumed, optimizer=again, identity={})
    updated(whole, optimizer, 3, seed=10)
    updated(resumed, again, 3, seed=10)
    assert same(whole, resumed)
    before, after = state_tensors(whole, optimizer), state_tensors(resumed, again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    tables = [again.state[item]["qmap1"] for item in resumed.values() if "qmap1" in again.state[item]]
    assert all(table is tables[0] for table in tables)


def test_a_parameter_without_gradient_has_no_state(tmp_path: Path) -> None:
    named, fresh = parameters(), parameters()
    optimizer = make_optimizer(named, Settings(optim="adamw_8bit"))
    for name, item in named.items():
        item.grad = None if name == "odd" else torch.ones_like(item)
    optimizer.step()
    path = save(
        tmp_path, parameters=named, optimizer=optimizer, progress=Progress().advanced(step=1), identity={}
    )
    again = make_optimizer(fresh, Settings(optim="adamw_8bit"))
    restore(path, parameters=fresh, optimizer=again, identity={})
    assert fresh["odd"] not in again.state
    assert len(again.state) == 3


@pytest.mark.parametrize(("written", "read"), [("adamw", "adamw_8bit"), ("adamw_8bit", "adamw")])
def test_the_state_of_another_optimizer_is_refused(written: str, read: str, tmp_path: Path) -> None:
    named, fresh = parameters(), parameters()
    optimizer = make_optimizer(named, Settings(optim=written))
    updated(named, optimizer, 1)
    path = save(
        tmp_path, parameters=named, optimizer=optimizer, progress=Progress().advanced(step=1), identity={}
    )
    again = make_optimizer(fresh, Settings(optim=read))
    with pytest.raises(CheckpointError, match="does not fit what is trained now"):
        restore(path, parameters=fresh, optimizer=again, identity={})
    assert not again.state
    assert same(fresh, parameters())


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for start in (lambda: require_optimizer("adamw_8bit"), lambda: make("paged_adamw_8bit")):
        with pytest.raises(MissingDependency) as refused:
            start()
        assert refused.value.fix == "pip install 'graftlm[quant]'"
        assert refused.value.exit_code == 2
    require_optimizer("adamw")
    make("adamw")


def make(name: str) -> torch.optim.Optimizer:
    return make_optimizer(parameters(), Settings(optim=name))


@pytest.mark.parametrize("name", FORMS)
def test_without_cuda_nothing_is_paged_and_it_is_said(name: str) -> None:
    forget_notices()
    heard: list[str] = []
    with notices_to(heard.append):
        optimizer: Any = make(name)
    assert not optimizer.is_paged
    assert [text.partition(" ")[0] for text in heard] == ([name] if "paged" in name else [])


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'adamw_8bit'"):
        make("adamw8bit")


@pytest.fixture(scope="module")
def uninterrupted(worker: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    runs = {}
    for name in ("adamw_8bit", "paged_adamw_32bit"):
        runs[name] = tmp_path_factory.mktemp(name)
        report = worker(runs[name], **SETTINGS, optim=name)
        assert report["code"] == 0 and report["step"] == 6, report
    return runs


STOPS = {
    "asked to stop, mid-accumulation": {"phase": "forward", "calls": [6], "signal": "SIGTERM"},
    "killed, mid-accumulation": {"phase": "backward", "calls": [6], "signal": "SIGKILL"},
    "killed after an update": {"phase": "step", "calls": [3], "signal": "SIGKILL"},
}


@pytest.mark.parametrize(
    ("name", "stop"),
    [*(("adamw_8bit", stop) for stop in STOPS), ("paged_adamw_32bit", "killed, mid-accumulation")],
)
def test_a_qlora_run_resumes_bit_exactly(
    worker: Any, tmp_path: Path, uninterrupted: dict[str, Path], name: str, stop: str
) -> None:
    first = worker(tmp_path, **SETTINGS, optim=name, signal_at=STOPS[stop])
    assert first["code"] == (143 if "asked" in stop else -9)
    second = worker(tmp_path, **SETTINGS, optim=name)
    assert (second["code"], second["why"], second["step"]) == (0, "finished", 6)
    assert contents(tmp_path) == contents(uninterrupted[name])


def test_a_qlora_run_resumes_in_a_fresh_interpreter(
    worker: Any, tmp_path: Path, uninterrupted: dict[str, Path]
) -> None:
    name = "adamw_8bit"
    worker(tmp_path, **SETTINGS, optim=name, signal_at=STOPS["killed, mid-accumulation"])
    job = json.dumps({**SETTINGS, "optim": name, "run": str(tmp_path)})
    command = [sys.executable, str(Path(__file__).with_name("worker.py")), "run", job]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run(command, env=environment, capture_output=True, timeout=120, check=True)
    assert contents(tmp_path) == contents(uninterrupted[name])
    stored = load_file(checkpoint_path(tmp_path, 6) / OPTIMIZER)
    assert {tensor.dtype for tensor in stored.values()} >= {torch.uint8}


def test_another_optimizer_on_resume_is_refused(worker: Any, tmp_path: Path) -> None:
    worker(tmp_path, **SETTINGS, optim="adamw_8bit", signal_at=STOPS["asked to stop, mid-accumulation"])
    refused = worker(tmp_path, **SETTINGS, optim="adamw")
    assert refused["error"] == "CheckpointError"
    assert "optim: was 'adamw_8bit', is 'adamw'" in refused["problems"]
