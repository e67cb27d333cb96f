"""Ten training steps beside PEFT, and the memory that backward needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from graftlm.formats.layout import FOLDER, adapter_tensors
from graftlm.methods.attach import attach_folder
from graftlm.methods.lora import LoraConfig

from .tiny import batch, graft, tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* is deprecated and will be removed in v6:FutureWarning",
    "ignore:Could not find a config file in:UserWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning",
)


def train(model: Any, kind: str, *, accumulate: int) -> list[float]:
    """Ten AdamW steps over the same batches; losses of the micro-batches."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    losses = []
    for step in range(10):
        for micro in range(accumulate):
            loss = model(**batch(kind, rows=2 + micro, seed=10 * step + micro)).loss
            (loss / accumulate).backward()
            losses.append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize(
    ("kind", "targets", "accumulate"),
    [
        ("llama", ["q_proj", "v_proj"], 1),
        ("llama", ["q_proj", "v_proj"], 3),
        ("llama", "all-linear", 1),
        ("llama", "all-linear", 3),
        ("llama-tied", "all-linear", 1),
        ("gpt2", "all-linear", 1),
        ("t5", "all-linear", 1),
        ("llama", ["embed_tokens", "q_proj", "lm_head"], 1),
    ],
)
def test_ten_steps_give_pefts_losses_and_weights(
    kind: str, targets: Any, accumulate: int, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    config = peft.LoraConfig(r=6, lora_alpha=10, target_modules=targets)
    theirs = peft.get_peft_model(tiny(kind), config)
    theirs.save_pretrained(str(tmp_path / "start"))
    ours = tiny(kind)
    adapters = attach_folder(ours, tmp_path / "start", storage=FOLDER)

    expected, losses = (train(m, kind, accumulate=accumulate) for m in (theirs, ours))
    assert len(losses) == 10 * accumulate and losses[0] != losses[-1]
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-5
    state: dict[str, Tensor] = peft.get_peft_model_state_dict(theirs)
    own = adapter_tensors(adapters, "default")
    differences = [float((own[key] - state[key].detach()).abs().max()) for key in own]
    print(f"{kind} {targets} x{accumulate}: largest difference of weights {max(differences):.1e}")
    assert max(differences) < 1e-5
    start = attach_folder(tiny(kind), tmp_path / "start", storage=FOLDER)
    assert any(not torch.equal(own[key], value) for key, value in adapter_tensors(start, "default").items())


class Attention(nn.Module):
    """q, k and v of one input, with the norm before it trained by nobody."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)])


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of distinct storages kept for backward that are no parameters of the model."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    out.sum().backward()
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_q_k_and_v_keep_one_copy_of_their_input(dropout: float) -> None:
    width, tokens = 1024, 256
    fields: dict[str, Any] = {
        "r": 16,
        "lora_dropout": dropout,
        "target_modules": ["q_proj", "k_proj", "v_proj"],
    }
    x = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x.requires_grad_()  # as in the middle of a model, where layers below are adapted too

    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(**fields), nn.Sequential(Attention(width).to(torch.bfloat16))
    )
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()  # what `get_peft_model` does by default
    ours = nn.Sequential(Attention(width).to(torch.bfloat16))
    graft(ours, LoraConfig(**fields))
    figures = [kept_bytes(model.train(), x) / x.nbytes for model in (ours, theirs)]
    print(f"dropout {dropout}: kept for backward, in inputs: {figures[0]:.3f}, PEFT {figures[1]:.3f}")
    assert figures[0] <= 1.1
    assert figures[1] > 5


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_adapted_model_compiles_without_a_graph_break(dropout: float) -> None:
    model, inputs = tiny("llama").train(), batch("llama")
    adapters = graft(model, LoraConfig(r=2, init_lora_weights=False, lora_dropout=dropout))
    results = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        loss = call(**inputs, use_cache=False).loss
        model.zero_grad()
        loss.backward()
        gradients = [p.grad for p in adapters.parameters("default")]
        results.append((loss.detach(), gradients))
    torch.testing.assert_close(results[1], results[0])
