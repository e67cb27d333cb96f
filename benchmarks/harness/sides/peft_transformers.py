"""PEFT on a `transformers` model, with the training step of the Trainer."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from harness.case import Case
from harness.measurement import Recorder
from harness.writer import ADAPTER, BASE, per_step

MAX_NORM = 1.0


def train(case: Case, ways: frozenset[str], folder: Path, recorder: Recorder) -> None:
    """Load, attach, and take all steps. The ways are those of `sides/registry.py`."""
    import torch
    import transformers

    peft: Any = importlib.import_module("peft")
    if "4 bits" in ways:
        importlib.import_module("bitsandbytes")  # it belongs to the libraries, not to the training
    recorder.imported()
    if case.on_device:
        from harness.on_device import transformers_model

        model = transformers_model(case, "4 bits" in ways)
    else:
        options: dict[str, Any] = {}
        if "4 bits" in ways:
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / BASE,
            dtype=torch.bfloat16,
            device_map=case.device,
            attn_implementation="sdpa",
            **options,
        )
    recorder.base(model)
    if "liger" in ways:
        liger: Any = importlib.import_module("liger_kernel.transformers")
        liger._apply_liger_kernel_to_instance(model=model)
    if "prepared" in ways:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if case.recompute == "everything":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model = attached(case, model, folder, autocast_adapter_dtype="16-bit adapters" not in ways)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=case.rate, weight_decay=0.0, fused=True)
    forward = torch.compile(model, dynamic=False) if "compiled" in ways else model
    data = [torch.tensor([ids for ids, _ in step]) for step in per_step(case, folder)]
    recorder.begin()
    for rows in data:
        rows = rows.to(case.device)
        with torch.autocast(case.device, torch.bfloat16, enabled="autocast" in ways):
            loss = forward(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recorder.step(loss.item(), norm.item(), rows.numel())


def attached(case: Case, model: Any, folder: Path, *, autocast_adapter_dtype: bool) -> Any:
    """The adapter that all sides start from."""
    from harness.on_device import start_alike

    peft: Any = importlib.import_module("peft")

    if case.method == "prefix":  # PEFT does not load prompt learning for training
        config = peft.PeftConfig.from_pretrained(folder / ADAPTER)
        config.inference_mode = False
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
        peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(folder / ADAPTER)))
        return model
    if not case.on_device:
        return peft.PeftModel.from_pretrained(
            model, folder / ADAPTER, is_trainable=True, autocast_adapter_dtype=autocast_adapter_dtype
        )
    config = peft.LoraConfig(
        r=case.rank,
        lora_alpha=2 * case.rank,
        lora_dropout=case.dropout,
        target_modules="all-linear",
        use_dora=case.method == "dora",
    )
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    start_alike((name, each) for name, each in model.named_parameters() if ".lora_A." in name)
    return model
