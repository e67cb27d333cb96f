"""Trains sprout, the base model embedded in graftlm, from nothing: text, tokenizer, model, package files.

python examples/sprout/train.py --out DIR            # the real thing
python examples/sprout/train.py --out DIR --quick    # the same code in seconds, a model that knows nothing
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import task
import text
import torch
import torch.nn.functional as F
from model import build_model, train_tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Plan:
    """Everything that decides what comes out."""

    steps: int = 1700
    tokens_per_step: int = 4096
    window: int = 256
    long_window: int = (
        512  # the model's context; used for the last part of training so that every position is trained
    )
    long_share: float = 0.12
    learning_rate: float = 2e-3
    warmup: int = 60
    weight_decay: float = 0.05
    vocabulary: int = 2048
    tokenizer_documents: int = 20_000
    known_rows: int = 200
    demo_rows: int = 1400
    save_every: int = 0
    compile: bool = True
    seed: int = 1


QUICK = Plan(
    steps=4,
    tokens_per_step=1024,
    warmup=1,
    vocabulary=512,
    tokenizer_documents=500,
    known_rows=20,
    demo_rows=40,
    compile=False,
)


def encoded(plan: Plan, tokenizer: PreTrainedTokenizerFast, known: set[str]) -> Iterator[list[int]]:
    """Documents as token ids, each closed by the end token; held-out ones are left out."""
    stream = (d for d in text.documents(plan.seed + 1) if d not in known)
    while True:
        chunk = [d if d.endswith(text.END) else d + text.END for d in islice(stream, 512)]
        yield from tokenizer(chunk, add_special_tokens=False)["input_ids"]


def batches(plan: Plan, documents: Iterator[list[int]], pad: int) -> Iterator[torch.Tensor]:
    """Windows filled with whole documents: what does not fit waits, so that answers are never cut off."""
    waiting: list[list[int]] = []
    for step in range(plan.steps):
        length = plan.long_window if step >= plan.steps * (1 - plan.long_share) else plan.window
        batch = torch.full((plan.tokens_per_step // length, length), pad)
        for row in batch:
            used = 0
            while True:
                waiting += islice(documents, 32 - len(waiting))
                fitting = next((i for i, d in enumerate(waiting) if len(d) <= length - used), None)
                if fitting is None:
                    break
                document = waiting.pop(fitting)
                row[used : used + len(document)] = torch.tensor(document)
                used += len(document)
            waiting = [
                d for d in waiting if len(d) <= plan.window
            ]  # a document longer than a window would wait for ever
        yield batch


def optimizer_for(
    plan: Plan, model: torch.nn.Module
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with weight decay on matrices only, a short warm-up and a cosine down to zero."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": plan.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=True)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / plan.warmup) * 0.5 * (1 + math.cos(math.pi * step / plan.steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def pretrain(
    plan: Plan, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, known: list[str], out: Path
) -> int:
    """The training loop; returns the number of tokens trained on."""
    optimizer, schedule = optimizer_for(plan, model)
    pad, size = tokenizer.pad_token_id, len(tokenizer)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(
            logits[:, :-1].reshape(-1, size).float(), ids[:, 1:].reshape(-1), ignore_index=pad
        )

    compute = torch.compile(loss_of, dynamic=False) if plan.compile else loss_of
    begun, tokens = time.monotonic(), 0
    for step, ids in enumerate(batches(plan, encoded(plan, tokenizer, set(known)), pad), start=1):
        loss = compute(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += int((ids != pad).sum())
        if step % 100 == 0 or step == plan.steps:
            seconds = time.monotonic() - begun
            print(f"step {step} loss {loss.item():.4f} tokens {tokens} seconds {seconds:.0f}", flush=True)
        if plan.save_every and step % plan.save_every == 0:
            save_model(model, out)
    return tokens


@torch.no_grad()
def known_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, known: list[str]) -> float:
    """Mean loss per token on the held-out documents."""
    total, count = 0.0, 0
    for document in known:
        ids = torch.tensor([tokenizer(document)["input_ids"]])
        logits = model(input_ids=ids).logits[0, :-1].float()
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


def save_model(model: LlamaForCausalLM, out: Path) -> None:
    """Writes the weights in bfloat16, without touching the model that is being trained."""
    small = LlamaForCausalLM(model.config).to(torch.bfloat16)
    small.load_state_dict(model.state_dict())
    small.config.dtype = torch.bfloat16
    small.generation_config = model.generation_config
    small.save_pretrained(out)


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def build(plan: Plan, out: Path) -> dict[str, float]:
    """Makes every file of sprout in the folder and returns what was measured."""
    out.mkdir(parents=True, exist_ok=True)
    known = held_out(plan)
    write_rows(out / "known.jsonl", [{"text": document} for document in known])
    write_rows(out / "demo.jsonl", task.rows(plan.demo_rows, plan.seed))
    tokenizer = train_tokenizer(plan.vocabulary, plan.tokenizer_documents, plan.long_window, plan.seed)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    model = build_model(tokenizer, plan.long_window, plan.seed)
    begun = time.monotonic()
    tokens = pretrain(plan, model, tokenizer, known, out)
    seconds = time.monotonic() - begun
    save_model(model, out)
    stored = LlamaForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    return {
        "parameters": model.num_parameters(), "tokens": tokens, "seconds": round(seconds),
        "known_loss": round(known_loss(stored, tokenizer, known), 4),
        "bytes": (out / "model.safetensors").stat().st_size,
    }  # fmt: skip


def held_out(plan: Plan) -> list[str]:
    """The held-out documents: from a seed of their own, no two alike."""
    found: dict[str, None] = {}
    for document in text.documents(plan.seed + 2):
        found[document] = None
        if len(found) == plan.known_rows:
            break
    return list(found)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that the code runs")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument(
        "--save-every", type=int, default=0, help="also write the weights after every so many steps"
    )
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else Plan()
    plan = replace(plan, steps=arguments.steps or plan.steps, save_every=arguments.save_every)
    print(json.dumps(build(plan, arguments.out)))


if __name__ == "__main__":
    main()
