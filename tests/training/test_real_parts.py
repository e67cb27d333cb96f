"""The loop with Graft's own batches, objective and adapters: resume is exact there too."""

from __future__ import annotations

import random
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import VOCABULARY, Settings, contents
from transformers import LlamaConfig, LlamaForCausalLM

from graftlm.data.batches import Batches
from graftlm.data.encode import Encoded
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.models.fusing.fused import fusable, fused
from graftlm.objectives.sft import SftObjective
from graftlm.training.loop import TrainResult, train
from graftlm.training.signals import StopRequests


def run_it(run: Path, *, packing: bool, stop_after: int = 0, is_fused: bool = False) -> TrainResult:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16 if is_fused else torch.float32)
    adapters = attach(model, LoraConfig(r=4, lora_dropout=0.2), storage=FOLDER)
    draw = random.Random(1)
    rows = []
    for row in range(1, 14):
        ids = tuple(draw.randrange(VOCABULARY) for _ in range(draw.choice([6, 11, 19])))
        rows.append(Encoded(ids, (-100, -100, *ids[2:]), row, False))
    batches = Batches(rows, rows_per_batch=2, max_length=24, packing=packing, seed=3, pad_token_id=0)
    stop = StopRequests()
    done = [0]
    inner = SftObjective(model)

    def objective(model: Any, batch: Any) -> Any:
        done[0] += 1
        if done[0] == stop_after:
            stop.ask(signal.SIGTERM)
        return inner(model, batch)

    parameters = adapters.named_parameters("default")
    with fused(fusable(model)) if is_fused else nullcontext():
        return train(
            model, objective, batches, parameters, Settings(), run=run, resume="if_present", stop=stop
        )


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("stop_after", [1, 3, 6])
def test_resume_is_bit_exact(tmp_path: Path, packing: bool, stop_after: int) -> None:
    assert run_it(tmp_path / "whole", packing=packing).why == "finished"
    assert run_it(tmp_path / "cut", packing=packing, stop_after=stop_after).exit_code == 143
    assert run_it(tmp_path / "cut", packing=packing).why == "finished"
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("packing", [True, False])
def test_resume_is_bit_exact_with_the_faster_parts_in_use(tmp_path: Path, packing: bool) -> None:
    options: dict[str, Any] = {"packing": packing, "is_fused": True}
    assert run_it(tmp_path / "whole", **options).why == "finished"
    assert run_it(tmp_path / "cut", stop_after=3, **options).exit_code == 143
    assert run_it(tmp_path / "cut", **options).why == "finished"
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
