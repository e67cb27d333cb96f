"""Nothing in a step asks the device for a number but the line at its end: the host runs ahead of a GPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from graftlm.data.batches import Batches
from graftlm.data.encode import Encoded
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.models.fusing.fused import fusable, fused
from graftlm.objectives.sft import SftObjective
from graftlm.testing.models import tiny
from graftlm.training.optim import make_optimizer
from graftlm.training.step import optimizer_step, to_device
from graftlm.training.train_section import TrainSection


class Questions(TorchDispatchMode):
    """Counts what would make the host wait: numbers read from values that lie where the model is, and shapes
    that depend on them. Labels, seeds and starts of documents are integers on the host on every device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.asked: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "equal") and args[0].is_floating_point():
            self.asked[name] += 1
        if name in ("masked_select", "unique_consecutive", "_unique2"):
            self.asked[name] += 1
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.asked[name] += args[0].is_floating_point()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_asks_nothing(packing: bool, dropout: float) -> None:
    model = tiny("llama")
    attach(model, LoraConfig(r=4, lora_dropout=dropout, init_lora_weights=False), storage=FOLDER)
    model.train()
    ids = tuple(n % 30 for n in range(24))
    rows = [Encoded(ids[:n], (*[-100] * 4, *ids[4:n]), n, False) for n in range(8, 24, 3)]
    batches = Batches(rows, rows_per_batch=2, max_length=32, packing=packing, seed=0, pad_token_id=0)
    parameters = {name: item for name, item in model.named_parameters() if item.requires_grad}
    optimizer = make_optimizer(parameters, TrainSection())
    objective = SftObjective(model)
    with fused(fusable(model)):
        window = [batches.batch(0, index) for index in range(2)]
        for number in range(2):  # the first fills what is made once
            with Questions() as questions:
                stats = optimizer_step(
                    model,
                    objective,
                    window,
                    parameters,
                    optimizer,
                    max_grad_norm=1.0,
                    stop_asked=lambda: False,
                )
            assert stats.outcome == "applied", number
    assert not questions.asked.total()


def test_questions_are_heard() -> None:
    with Questions() as questions:
        float(torch.ones(2).sum())
        torch.ones(2)[torch.tensor([True, False])]
    assert questions.asked == {"_local_scalar_dense": 1, "index": 1}


@pytest.mark.gpu
def test_labels_stay_on_the_host() -> None:
    batch = Batches(
        [Encoded((1, 2, 3), (-100, 2, 3), 1, False)],
        rows_per_batch=1, max_length=8, packing=True, seed=0, pad_token_id=0,
    ).batch(0, 0)  # fmt: skip
    moved = to_device(batch, torch.device("cuda"))
    assert moved.labels.device.type == "cpu" and moved.inputs["input_ids"].is_cuda
