"""IA3 on an encoder-decoder: a network that pronounces American English learns the British way."""

import json
import os
from pathlib import Path

import torch
from peft import IA3Config, TaskType, get_peft_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

shared = Path(os.environ["GRAFT_SHARED"])
name = shared / "models" / "g2p-bart-us"
torch.manual_seed(2)

tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForSeq2SeqLM.from_pretrained(name)
model = get_peft_model(model, IA3Config(task_type=TaskType.SEQ_2_SEQ_LM))
model.print_trainable_parameters()

lines = (shared / "data" / "g2p-english" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:640]
pairs = [(row["word"], row["gb"]) for row in map(json.loads, lines)]


def encode(rows):
    batch = tokenizer([word for word, _ in rows], return_tensors="pt", padding=True)
    labels = tokenizer([spoken for _, spoken in rows], return_tensors="pt", padding=True).input_ids
    labels[labels == tokenizer.pad_token_id] = -100
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}


optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=25)
model.train()
for step in range(24):
    loss = model(**encode(pairs[24 * step : 24 * step + 24])).loss
    loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    print(f"step {step} loss {loss.item():.6f}")

model.eval()
with torch.no_grad():
    held_out = encode(pairs[600:640])
    print(f"held out loss {model(**held_out).loss.item():.6f}")
    held_out.pop("labels")
    out = model.generate(**held_out, max_new_tokens=24, do_sample=False, num_beams=1)
    print(tokenizer.batch_decode(out, skip_special_tokens=True)[:8])
