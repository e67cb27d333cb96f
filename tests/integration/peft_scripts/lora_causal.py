"""LoRA on a causal language model: a Llama that tells stories learns to sound like Shakespeare."""

import os
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

shared = Path(os.environ["GRAFT_SHARED"])
name = shared / "models" / "stories260K"
torch.manual_seed(0)

tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)

config = LoraConfig(
    task_type=TaskType.CAUSAL_LM,
    inference_mode=False,
    r=8,
    lora_alpha=32,
    lora_dropout=0.0,
    target_modules=["q_proj", "v_proj"],
)
model = get_peft_model(model, config)
model.print_trainable_parameters()

text = (shared / "data" / "tinyshakespeare" / "train.txt").read_text(encoding="utf-8")[:20_000]
ids = torch.tensor(tokenizer(text).input_ids)
blocks = ids[: len(ids) // 64 * 64].view(-1, 64)

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
model.train()
for step in range(20):
    batch = blocks[4 * step : 4 * step + 4]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step} loss {loss.item():.6f}")

model.eval()
with torch.no_grad():
    prompt = tokenizer("First Citizen:", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    print(tokenizer.decode(out[0], skip_special_tokens=True))
    held_out = blocks[80:84]
    print(f"held out loss {model(input_ids=held_out, labels=held_out).loss.item():.6f}")
    with model.disable_adapter():
        print(f"base loss {model(input_ids=held_out, labels=held_out).loss.item():.6f}")
