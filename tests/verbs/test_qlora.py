"""`graft tune --method qlora`, from the command to the report: a base in few bits, resumed and proved."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SETTINGS, Outcome, assignments, files_of

from graftlm.core.config import read_yaml
from graftlm.core.errors import ConfigError, MissingDependency
from graftlm.core.events import read_events
from graftlm.evaluation.report import read_report
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import adapters_of, attach
from graftlm.models.recompute.policy import Policy, recomputing
from graftlm.quant.convert import quantised_layers
from graftlm.training.recipe import make_recipe
from graftlm.verbs.base import load_base
from graftlm.verbs.chat import chat
from graftlm.verbs.evaluate import evaluate
from graftlm.verbs.tune import tune
from graftlm.verbs.tune_result import TuneResult

# At rank 32 most matrices of the adapter are large enough for states in 8 bits.
QLORA: tuple[str, ...] = (*(item for item in SETTINGS if not item.startswith("method.")), "method.r=32")

IN_8_BITS = (*QLORA, "train.optim=paged_adamw_8bit", "train.save_steps=1")


@pytest.fixture(scope="module")
def run(sums: Path, tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    """QLoRA with the usual optimizer, which needs no bitsandbytes. Nobody may change its folder."""
    with pytest.MonkeyPatch.context() as hidden:
        hidden.setitem(sys.modules, "bitsandbytes", None)
        folder = tmp_path_factory.mktemp("runs") / "qlora"
        return tune(sums, model="sprout", method="qlora", out=folder, overrides=QLORA)


def content(path: Path) -> dict[str, Any]:
    loaded = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def test_the_recipe_is_complete(run: TuneResult) -> None:
    recipe = read_yaml(run.run / "recipe.yaml")
    assert recipe["method"]["type"] == "qlora"
    assert recipe["model"] == {
        "name": "sprout", "dtype": "float32", "quantization": "nf4", "double_quant": True,
        "compute_dtype": "float32", "products": "16-bit", "placement": "resident",
        "embeddings": "resident",
    }  # fmt: skip
    assert recipe["train"]["optim"] == "adamw"


def test_what_the_base_is_stored_in_is_told_everywhere(run: TuneResult) -> None:
    stored = "nf4 with quantised scales, blocks of 64"
    assert content(run.run / "plan.json")["quantization"] == stored
    assert content(run.run / "environment.json")["base"] == {"dtype": "float32", "quantization": stored}
    assert content(run.adapter / "graft.json")["base_quantization"] == {
        "kind": "nf4", "double_quant": True, "block_size": 64,
    }  # fmt: skip
    training = read_report(run.run / "report.json").training
    assert training is not None and training.quantization == stored
    assert f"<dd>{stored}</dd>" in run.report.read_text(encoding="utf-8")


def test_the_merge_is_proved_on_the_dequantised_base(run: TuneResult) -> None:
    assert run.passed
    check = read_report(run.run / "report.json").merge
    assert check is not None and check.passed and check.mean_kl < 1e-6
    assert check.note.startswith("Merged into the dequantised base.")
    assert any("merge into the dequantised base verified" in line for line in run.lines)


def test_the_report_says_where_the_memory_went(run: TuneResult) -> None:
    memory = read_report(run.run / "report.json").memory
    assert memory is not None
    bits = {item.name: 8 * item.bytes / item.parameters for item in memory.classes}
    assert bits["quantised linears"] < 4.13
    assert bits["trained"] == 32 and bits["optimizer state"] == pytest.approx(64, rel=0.01)
    phases = [peak.phase for peak in memory.peaks]
    assert set(phases) == {
        "start", "load", "evaluate", "attach", "forward", "backward", "update", "save", "verify"
    }  # fmt: skip
    page = run.report.read_text(encoding="utf-8")
    assert "<h2>Memory</h2>" in page and "quantised linears" in page and "optimizer step" in page


def test_other_verbs_use_the_base_of_the_run(run: TuneResult, sums: Path) -> None:
    for folder in (run.run, run.adapter):
        session = chat(folder)
        assert len(quantised_layers(session.model)) == 28
        assert adapters_of(session.model) is not None
    found = evaluate(run.run, data=sums, limit=8)
    assert found.passed
    loss = found.comparison.loss
    assert loss.after.value < loss.before.value


def test_another_quantisation_on_resume_is_refused(run: TuneResult) -> None:
    with pytest.raises(ConfigError) as refused:
        tune(run.run, overrides=["model.quantization=int8"], resume=True)
    assert refused.value.problems == ("model.quantization: 'nf4' in the run, 'int8' asked for",)


@pytest.mark.parametrize("method", ["qlora", "dora"])
def test_recomputed_activations_give_the_same_gradients(method: str) -> None:
    found = []
    policies: tuple[Policy, ...] = ("nothing", "cheap", "feed_forward", "everything")
    for policy in policies:
        settings = ["method.lora_dropout=0.1", "data.path=x"]
        recipe = make_recipe({"model": "sprout", "method": method}, ["model.quantization=nf4", *settings])
        model, _ = load_base(recipe.model)
        torch.manual_seed(0)
        adapters = attach(model, recipe.method.config, "default", storage=FOLDER)
        with torch.no_grad():
            for parameter in adapters.parameters("default"):
                parameter.add_(0.02 * torch.randn_like(parameter))
        torch.manual_seed(1)
        ids = torch.randint(5, 500, (2, 32))
        model.train()
        with recomputing(model, policy):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients = [item.grad for item in adapters.parameters("default") if item.grad is not None]
        assert len(gradients) == len(adapters.named_parameters("default"))
        found.append(gradients)
    for others in found[1:]:
        assert all(torch.equal(kept, recomputed) for kept, recomputed in zip(found[0], others, strict=True))


def test_an_optimizer_without_its_package_stops_before_anything(
    sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependency, match="'bitsandbytes' is not installed"):
        tune(sums, model="no/such-base", overrides=["train.optim=adamw_8bit"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def whole(sums: Path, tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    """A run with states in 8 bits that nothing interrupts."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return tune(sums, model="sprout", method="qlora", out=folder, overrides=IN_8_BITS)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_with_states_in_8_bits_ends_as_if_nothing_had_happened(
    stop: signal.Signals, whole: TuneResult, sums: Path, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    """Stopped while it trains, resumed by a process of its own."""
    line = ["tune", str(sums), "--model", "sprout", "--method", "qlora", *assignments(IN_8_BITS)]
    folder = tmp_path / "stopped"
    stopped_at(3, folder, [sys.executable, "-m", "graftlm", *line, "--out", str(folder)], stop)
    resumed = command("tune", folder, "--resume", "--json")
    assert resumed.code == 0, resumed.err
    assert files_of(folder / "adapter") == files_of(whole.adapter)
    assert resumed.json["after"] == whole.figures["after"]


def stopped_at(step: int, folder: Path, words: list[str], how: signal.Signals) -> None:
    """Start a command and send its process a signal in the middle of the step after `step`."""
    child = os.posix_spawn(words[0], words, os.environ)
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            log = folder / "events.jsonl"
            if log.exists() and any(e["kind"] == "step" and e["step"] >= step for e in read_events(log)):
                os.kill(child, how)
                return
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    os.waitpid(child, 0)
    over.set()
    watcher.join()
    assert not (folder / "adapter").exists()


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["fp4", "int8", "fp8"])
def test_every_kind_of_base(quantization: str, sums: Path, tmp_path: Path) -> None:
    settings = (*QLORA, f"model.quantization={quantization}", "train.gradient_checkpointing=true")
    result = tune(sums, model="sprout", method="qlora", out=tmp_path / "run", overrides=settings)
    assert result.passed
    before, after = result.figures["before"], result.figures["after"]
    assert after["held_out_loss"] < before["held_out_loss"]
    assert content(tmp_path / "run/plan.json")["quantization"].split()[0] == quantization
