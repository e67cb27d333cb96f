"""An adapter by hand: attach it to any transformers model, train it in your own loop, save it, merge it.

    python examples/attach_train_merge.py [FOLDER]

Takes seconds, needs no network: `sprout` is the small base that comes with Graft.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import graftlm as gl

FACTS = [f"What is twice {n}? It is {2 * n}." for n in range(40)]


def main(folder: Path) -> float:
    """Train on `FACTS`; returns how much the loss fell."""
    torch.manual_seed(0)
    model, tokenizer = gl.load_model("sprout", dtype="float32")
    adapters = gl.attach(model, gl.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    adapters.print_trainable_parameters()

    batch = tokenizer(FACTS, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(adapters.parameters("default"), lr=5e-3)
    losses = []
    for step in range(8):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.3f}")

    with adapters.disabled(), torch.no_grad():  # the base, exactly
        print(f"the base alone: {model(**batch, labels=labels).loss.item():.3f}")

    adapters.save(folder / "adapter")  # PEFT's layout: PeftModel.from_pretrained reads it, too
    merged = gl.merge(folder / "adapter", folder / "merged", dtype="float32")
    print(merged.verdict)
    return losses[0] - losses[-1]


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "attach-train-merge"))
