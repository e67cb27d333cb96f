"""The steps that precede QLoRA: freeze, widen, checkpoint activations; then LoRA on every linear layer."""

import os
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer

shared = Path(os.environ["GRAFT_SHARED"])
name = shared / "models" / "stories260K"
torch.manual_seed(1)

tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
model = prepare_model_for_kbit_training(
    model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
)
print("dtypes:", sorted({str(parameter.dtype) for parameter in model.parameters()}))
print("trainable before:", sum(p.numel() for p in model.parameters() if p.requires_grad))

config = LoraConfig(r=16, lora_alpha=8, target_modules="all-linear", bias="none", task_type="CAUSAL_LM")
model = get_peft_model(model, config)
model.print_trainable_parameters()
model.config.use_cache = False

text = (shared / "data" / "novel" / "secret_garden_1911.txt").read_text(encoding="utf-8")[5_000:30_000]
ids = torch.tensor(tokenizer(text).input_ids)
blocks = ids[: len(ids) // 64 * 64].view(-1, 64)
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=5e-3)
model.train()
for step in range(12):
    total = 0.0
    for part in range(2):
        row = 8 * step + 4 * part
        batch = blocks[row : row + 4]
        loss = model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss / 2
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step} loss {total:.6f} gradient norm {norm.item():.5f}")
