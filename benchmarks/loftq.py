"""LoftQ's start on a base in 4 bits: what it takes off the quantisation error, and what that is worth.

    python benchmarks/loftq.py                one seed, 20 steps: a minute
    python benchmarks/loftq.py --full         three seeds, 100 steps: ten minutes

Prints two tables. Real models and text are found in `../shared`, or where GRAFT_SHARED says. `PEFT's start`
is the SVD of PEFT's own function, without the division by the scaling; `5 rounds` are those of the paper,
which quantise the base anew in each. Losses are of held-out text, before and after training at one rate.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import Tensor

import graftlm as gl
from graftlm.methods.site import base_modules
from graftlm.models.originals import originals_of
from graftlm.quant.linear import QuantisedLinear
from graftlm.quant.packed import encode

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("GRAFT_SHARED", ROOT.parent / "shared"))
MODELS = ("gpt2-tiny-en", "stories260K")
RANKS = (4, 8, 16, 32)
ROUNDS = 5
LENGTH, ROWS = 128, 16
RATE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--full", action="store_true", help="three seeds and 100 steps")
    full = parser.parse_args().full
    torch.set_num_threads(1)
    print("| model | rank | LoftQ's start | PEFT's start, alpha = 2r | 5 rounds, base replaced |")
    print("|---|---|---|---|---|")
    for name in MODELS:
        for rank in RANKS if full else RANKS[1::2]:
            print(f"| {name} | {rank} | " + " | ".join(f"{left:.3f}" for left in errors(name, rank)) + " |")
    print("\n| model | rank | start | loss before | loss after |\n|---|---|---|---|---|")
    for name in MODELS:
        text = blocks(name)
        for kind in ("none", "nf4"):
            model = load(name, kind)
            print(f"| {name} | | base, {'float32' if kind == 'none' else kind} | {loss(model, text):.4f} | |")
        for rank in (8, 32):
            for start in (True, "loftq"):
                runs = [
                    tuned(name, rank, start, text, seed, 100 if full else 20)
                    for seed in range(3 if full else 1)
                ]
                before, after = ([run[i] for run in runs] for i in (0, 1))
                spread = f" ± {statistics.stdev(after):.4f}" if len(runs) > 1 else ""
                label = "plain" if start is True else "LoftQ"
                print(
                    f"| {name} | {rank} | {label} | {before[0]:.4f} | {statistics.mean(after):.4f}{spread} |"
                )


def errors(name: str, rank: int) -> tuple[float, float, float]:
    """What is left of the error of all layers, as a part of that without an adapter."""
    model = load(name, "nf4")
    adapters = gl.attach(model, gl.LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights="loftq"))
    original = originals_of(model)
    lost = Errors()
    for path, layer in base_modules(model).items():
        if isinstance(layer, QuantisedLinear):
            lost.add(path, layer, original, adapters, rank)
    return lost.left()


@dataclass
class Errors:
    """Squared errors, summed over layers."""

    before: float = 0.0
    ours: float = 0.0
    peft: float = 0.0
    rounds: float = 0.0

    def add(self, path: str, layer: Any, original: Any, adapters: Any, rank: int) -> None:
        """One layer with its adapter."""
        stored = layer.packed.decode()
        ways = (original(path).float(), original(path).float().mT)  # GPT-2 has its weights as [in, out]
        weight = min((w for w in ways if w.shape == stored.shape), key=lambda w: square(w - stored))
        part = adapters.parts("default")[path]
        self.before += square(weight - stored)
        self.ours += square(weight - stored - part.scaling * part.lora_B @ part.lora_A)
        self.peft += square(weight - stored - part.scaling * product(weight - stored, rank))
        low = torch.zeros_like(weight)
        for _ in range(ROUNDS):
            anew = encode(weight - low, layer.scheme).decode()
            low = product(weight - anew, rank)
        self.rounds += square(weight - anew - low)

    def left(self) -> tuple[float, float, float]:
        """Relative to the error without an adapter."""
        return tuple((each / self.before) ** 0.5 for each in (self.ours, self.peft, self.rounds))


def product(lost: Tensor, rank: int) -> Tensor:
    """B A as PEFT starts it."""
    found = _low_rank_decomposition(lost, reduced_rank=rank)
    return found["L"] @ found["R"]


def square(error: Tensor) -> float:
    return float(error.detach().double().square().sum())


def tuned(
    name: str, rank: int, start: bool | str, text: Tensor, seed: int, steps: int
) -> tuple[float, float]:
    """Held-out loss at the start and after training."""
    torch.manual_seed(seed)
    model = load(name, "nf4")
    config = gl.LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights=start)
    adapters = gl.attach(model, config)
    before = loss(model, text)
    optimizer = torch.optim.AdamW(list(adapters.parameters("default")), lr=RATE)
    for rows in batches(text, seed, steps):
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    return before, loss(model, text)


@torch.no_grad()
def loss(model: Any, text: Tensor) -> float:
    """On the last blocks, which nothing is trained on."""
    held_out = text[-4 * ROWS :].split(ROWS)
    return statistics.mean(float(model(input_ids=rows, labels=rows).loss) for rows in held_out)


def batches(text: Tensor, seed: int, steps: int) -> Iterator[Tensor]:
    order = torch.randperm(len(text) - 4 * ROWS, generator=torch.Generator().manual_seed(seed))
    for step in range(steps):
        begin = step * ROWS % (len(order) - ROWS)
        yield text[order[begin : begin + ROWS]]


def blocks(name: str) -> Tensor:
    _, tokenizer = gl.load_model(str(SHARED / "models" / name))
    text = (SHARED / "data" / "novel" / "secret_garden_1911.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text).input_ids)
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def load(name: str, kind: str) -> Any:
    return gl.load_model(str(SHARED / "models" / name), dtype="float32", quantization=kind)[0]


if __name__ == "__main__":
    main()
