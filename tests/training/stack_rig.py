"""Runs of one tiny base, alone or side by side, that differ in everything that a member may differ in."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rig import VOCABULARY, Settings
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from graftlm.core.seeding import seed_everything
from graftlm.data.batches import Batches
from graftlm.data.encode import Encoded
from graftlm.formats.layout import FOLDER
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.attach import attach
from graftlm.methods.base import MethodConfig
from graftlm.methods.lora import LoraConfig
from graftlm.models.fusing.fused import fusable, fused
from graftlm.objectives.sft import SftObjective
from graftlm.training.interfaces import HeldOut
from graftlm.training.loop import TrainResult, train
from graftlm.training.stacked import train_together
from graftlm.training.stacked_member import Member


@dataclass(frozen=True)
class Trial:
    """What one run differs in."""

    name: str
    config: MethodConfig = field(default_factory=lambda: LoraConfig(r=4))
    settings: Settings = field(default_factory=Settings)
    rows_per_batch: int = 2
    packing: bool = True
    evaluates: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)


def base(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A random Llama of two layers."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def rows(count: int = 13) -> list[Encoded]:
    """Rows of several lengths; of a few tokens nothing is learnt."""
    draw = random.Random(1)
    found = []
    for row in range(1, count + 1):
        ids = tuple(draw.randrange(VOCABULARY) for _ in range(draw.choice([6, 11, 19])))
        found.append(Encoded(ids, (-100, -100, *ids[2:]), row, False))
    return found


def batches_of(trial: Trial) -> Batches:
    """The micro-batches of one run."""
    return Batches(
        rows(), rows_per_batch=trial.rows_per_batch, max_length=24, packing=trial.packing,
        seed=trial.settings.seed, pad_token_id=0,
    )  # fmt: skip


def attached(model: nn.Module, trial: Trial, name: str) -> AdapterSet:
    """The adapter of one run, at the start that its seed gives."""
    seed_everything(trial.settings.seed)
    return attach(model, trial.config, name, storage=FOLDER)


def alone(trial: Trial, run: Path, model: Any = None) -> tuple[dict[str, Tensor], TrainResult]:
    """The weights and the result of one run by itself."""
    model = base() if model is None else model
    adapters = attached(model, trial, "default")
    objective = SftObjective(model)
    parameters = adapters.named_parameters("default")
    options: dict[str, Any] = {"resume": "if_present", **trial.more}
    options |= {"evaluate": held_out(model, objective)} if trial.evaluates else {}
    with fused(fusable(model)):
        result = train(
            model, objective, batches_of(trial), parameters, trial.settings, run=run, **options
        )  # fmt: skip
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}, result


def stacked(
    trials: Sequence[Trial], folder: Path, model: Any = None, **options: Any
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Weights and results of all of them side by side, by name; each has the folder of its name."""
    model = base() if model is None else model
    for trial in trials:
        adapters = attached(model, trial, trial.name)
    objective, members = SftObjective(model), []
    for trial in trials:
        more: dict[str, Any] = {"resume": "if_present", **trial.more}
        more |= {"evaluate": held_out(model, objective)} if trial.evaluates else {}
        parameters = adapters.named_parameters(trial.name)
        members.append(
            Member(trial.name, batches_of(trial), parameters, trial.settings, folder / trial.name, **more)
        )
    results = train_together(model, adapters, objective, members, **options)
    weights = {
        trial.name: {
            key: value.detach().clone() for key, value in adapters.named_parameters(trial.name).items()
        }
        for trial in trials
    }
    return weights, results


def held_out(model: nn.Module, objective: SftObjective) -> Any:
    """The mean loss over three rows that no batch has."""
    unseen = Batches(rows(16)[13:], rows_per_batch=3, max_length=24, packing=False, seed=0, pad_token_id=0)

    def evaluate(stop: Any) -> HeldOut:
        parts = objective(model, unseen.batch(0, 0))
        return HeldOut(float(parts.loss_sum) / parts.target_tokens, parts.target_tokens, 3)

    return evaluate


def furthest(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference of any two weights."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)
