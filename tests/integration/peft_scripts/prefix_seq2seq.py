"""Prefix tuning on a T5 with random weights: only the trained keys and values can learn the task."""

import json
import os
from pathlib import Path

import torch
from peft import PrefixTuningConfig, TaskType, get_peft_model
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

shared = Path(os.environ["GRAFT_SHARED"])
torch.manual_seed(4)

tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "g2p-bart-gb")
settings = T5Config(
    vocab_size=len(tokenizer),
    d_model=64,
    d_kv=16,
    d_ff=96,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=4,
    dropout_rate=0.0,
    pad_token_id=tokenizer.pad_token_id,
    eos_token_id=tokenizer.eos_token_id,
    decoder_start_token_id=tokenizer.pad_token_id,
)
model = T5ForConditionalGeneration(settings)
config = PrefixTuningConfig(task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, num_virtual_tokens=10)
model = get_peft_model(model, config)
model.print_trainable_parameters()

lines = (shared / "data" / "g2p-english" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:640]
pairs = [(row["word"], row["gb"]) for row in map(json.loads, lines)]


def encode(rows):
    batch = tokenizer([word for word, _ in rows], return_tensors="pt", padding=True)
    labels = tokenizer([spoken for _, spoken in rows], return_tensors="pt", padding=True).input_ids
    labels[labels == tokenizer.pad_token_id] = -100
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}


optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
model.train()
for step in range(20):
    loss = model(**encode(pairs[24 * step : 24 * step + 24])).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step} loss {loss.item():.6f}")

model.eval()
with torch.no_grad():
    held_out = encode(pairs[600:632])
    print(f"held out loss {model(**held_out).loss.item():.6f}")
    held_out.pop("labels")
    out = model.generate(**held_out, max_new_tokens=8, do_sample=False)
    print(out[:4].tolist())
