"""Prompt tuning on a causal language model: a trained prompt, which starts as words, asks for a label."""

import json
import os
from pathlib import Path

import torch
from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

shared = Path(os.environ["GRAFT_SHARED"])
name = str(shared / "models" / "gpt2-tiny-en")
torch.manual_seed(5)

tokenizer = AutoTokenizer.from_pretrained(name)
if tokenizer.pad_token_id is None:
    tokenizer.pad_token_id = tokenizer.eos_token_id
model = AutoModelForCausalLM.from_pretrained(name)
config = PromptTuningConfig(
    task_type=TaskType.CAUSAL_LM,
    prompt_tuning_init=PromptTuningInit.TEXT,
    num_virtual_tokens=8,
    prompt_tuning_init_text="Say if the review is good or bad:",
    tokenizer_name_or_path=name,
)
model = get_peft_model(model, config)
model.print_trainable_parameters()

lines = (shared / "data" / "sentence-polarity" / "train.jsonl").read_text(encoding="utf-8").splitlines()
rows = [json.loads(line) for line in lines[:160] + lines[-160:]]
rows = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()]


def encode(part):
    inputs = [tokenizer(f"Review: {row['text']} Label:").input_ids[-60:] for row in part]
    targets = [tokenizer(" good" if row["label"] else " bad").input_ids for row in part]
    longest = max(len(a) + len(b) for a, b in zip(inputs, targets, strict=True))
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for source, target in zip(inputs, targets, strict=True):
        padding = longest - len(source) - len(target)
        batch["input_ids"].append(source + target + [tokenizer.pad_token_id] * padding)
        batch["attention_mask"].append([1] * (len(source) + len(target)) + [0] * padding)
        batch["labels"].append([-100] * len(source) + target + [-100] * padding)
    return {key: torch.tensor(value) for key, value in batch.items()}


steps = 24
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=steps)
model.train()
for step in range(steps):
    loss = model(**encode(rows[12 * step : 12 * step + 12])).loss
    loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    print(f"step {step} loss {loss.item():.6f}")

model.eval()
with torch.no_grad():
    held_out = encode(rows[288:])
    print(f"held out loss {model(**held_out).loss.item():.6f}")
    prompt = tokenizer("Review: a dull , endless film . Label:", return_tensors="pt")
    out = model.generate(
        input_ids=prompt.input_ids,
        attention_mask=prompt.attention_mask,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    print(tokenizer.decode(out[0][-6:]))
