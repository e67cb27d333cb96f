"""torchtune: its LoRA Llama with compiled layers and its chunked loss, as its recipe has them. CUDA only."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from harness.case import Case
from harness.measurement import Recorder
from harness.writer import per_step

MODULES = ["q_proj", "k_proj", "v_proj", "output_proj"]
NAMES = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "output_proj": "self_attn.o_proj",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}


def train(case: Case, ways: frozenset[str], folder: Path, recorder: Recorder) -> None:
    """Build, attach, and take all steps."""
    import torch

    from harness.on_device import random_model, start_alike

    models: Any = importlib.import_module("torchtune.models.llama3_1")
    convert: Any = importlib.import_module("torchtune.models.convert_weights")
    losses: Any = importlib.import_module("torchtune.modules.loss")
    peft: Any = importlib.import_module("torchtune.modules.peft")
    recorder.imported()
    shape = case.model
    if shape.family != "llama":
        raise SystemExit(f"this side builds Llamas only, not {shape.family}")
    dense = random_model(case)
    recorder.base(dense)
    weights = convert.hf_to_tune(
        dense.state_dict(), num_heads=shape.heads, num_kv_heads=shape.key_heads, dim=shape.hidden
    )
    del dense
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(case.device):
        model = models.lora_llama3_1(
            MODULES, apply_lora_to_mlp=True, vocab_size=shape.vocabulary, num_layers=shape.layers,
            num_heads=shape.heads, num_kv_heads=shape.key_heads, embed_dim=shape.hidden,
            max_seq_len=case.length, intermediate_dim=shape.inner, lora_rank=case.rank,
            lora_alpha=2 * case.rank, lora_dropout=0.0,
        )  # fmt: skip
    torch.set_default_dtype(torch.float32)
    model.load_state_dict(weights, strict=False)
    del weights
    peft.set_trainable_params(model, peft.get_adapter_params(model))
    start_alike((usual_name(name), each) for name, each in model.named_parameters() if ".lora_a." in name)
    for layer in model.layers:
        layer.compile()
    loss_of = losses.LinearCrossEntropyLoss()
    loss_of.set_model_output(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=case.rate, weight_decay=0.0, fused=True)
    data = [torch.tensor([ids for ids, _ in step]) for step in per_step(case, folder)]
    recorder.begin()
    for rows in data:
        rows = rows.to(case.device)
        labels = torch.nn.functional.pad(rows[:, 1:], (0, 1), value=-100)
        loss = loss_of(model(rows), labels)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recorder.step(loss.item(), norm.item(), rows.numel())


def usual_name(name: str) -> str:
    """The path that the same layer has in `transformers`.

    >>> usual_name("layers.0.mlp.w1.lora_a.weight")
    'model.layers.0.mlp.gate_proj.lora_A.weight'
    """
    _, index, _, module, *_ = name.split(".")
    return f"model.layers.{index}.{NAMES[module]}.lora_A.weight"
