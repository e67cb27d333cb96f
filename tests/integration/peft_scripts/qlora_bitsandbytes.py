"""QLoRA as it is usually run: a base that bitsandbytes quantises to NF4, prepared, LoRA on every layer."""

import os
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

shared = Path(os.environ["GRAFT_SHARED"])
name = shared / "models" / "stories260K"
torch.manual_seed(1)

quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
tokenizer = AutoTokenizer.from_pretrained(name)


def load():
    return AutoModelForCausalLM.from_pretrained(name, quantization_config=quantization, dtype=torch.bfloat16)


model = prepare_model_for_kbit_training(load())
print("dtypes:", sorted({str(parameter.dtype) for parameter in model.parameters()}))
print("trainable before:", sum(p.numel() for p in model.parameters() if p.requires_grad))

config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", bias="none", task_type="CAUSAL_LM")
model = get_peft_model(model, config)
model.print_trainable_parameters()
model.config.use_cache = False

text = (shared / "data" / "novel" / "secret_garden_1911.txt").read_text(encoding="utf-8")[5_000:30_000]
ids = torch.tensor(tokenizer(text).input_ids)
blocks = ids[: len(ids) // 48 * 48].view(-1, 48)
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=2e-3)
model.train()
for step in range(10):
    batch = blocks[2 * step : 2 * step + 2]
    loss = model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step} loss {loss.item():.6f} gradient norm {norm.item():.5f}")

model.save_pretrained("adapter")
base = prepare_model_for_kbit_training(load())
again = PeftModel.from_pretrained(base, "adapter", is_trainable=True).train()
for row in range(3):
    batch = blocks[60 + 2 * row : 62 + 2 * row]
    loss = again(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss
    print(f"held-out rows {row}: loss {loss.item():.6f}")
