"""Failures of a training run: learning rate, size of updates, overfitting, rank, numbers that are none."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from case import Case, tuned, write_rows
from safetensors.torch import load_file, save_file

from graftlm.models.sprout import sprout_folder

WORDS = (
    *("ash", "bay", "cod", "dew", "elm", "fig", "gum", "hay", "ivy", "jet", "kit", "log"),
    *("mud", "nut", "oak", "pea", "rye", "sap", "tin", "urn", "vat", "wax", "yew", "zip"),
)


def sums(folder: Path, count: int = 90) -> Path:
    """A rule that can be learnt."""
    rows = [{"prompt": f"What is twice {n}?", "completion": f"It is {2 * n}."} for n in range(count)]
    return write_rows(folder / "sums.jsonl", rows)


def codes(folder: Path, count: int) -> Path:
    """Nothing but facts: what is held out cannot be known."""
    draw = random.Random(7)
    pairs = draw.sample([(a, b) for a in WORDS for b in WORDS], count)
    rows = [
        {"prompt": f"Code of {a} {b}?", "completion": " ".join(draw.choice(WORDS) for _ in range(4))}
        for a, b in pairs
    ]
    return write_rows(folder / "codes.jsonl", rows)


def _overfitted(folder: Path) -> Path:
    settings = ("train.max_steps=60", "train.eval_steps=10", "method.r=16", "train.learning_rate=5e-3")
    return tuned(folder, codes(folder, 60), *settings)


def _overfitted_unseen(folder: Path) -> Path:
    """The held-out loss is measured at the end only."""
    settings = ("train.max_steps=100", "method.r=32", "train.learning_rate=5e-3")
    return tuned(folder, codes(folder, 60), *settings)


def _slow(folder: Path) -> Path:
    return tuned(folder, sums(folder), "train.learning_rate=1e-5", "train.max_steps=30")


def _slow_prefix(folder: Path) -> Path:
    return tuned(folder, sums(folder), "train.learning_rate=2e-6", "train.max_steps=30", method="ia3")


def _fast(folder: Path) -> Path:
    return tuned(folder, sums(folder), "train.learning_rate=0.05", "train.max_steps=30")


def _large_alpha(folder: Path) -> Path:
    return tuned(folder, sums(folder), "method.lora_alpha=2048", "train.max_steps=30")


def _low_rank(folder: Path) -> Path:
    """One query projection in four at rank 1 is given hundreds of random facts."""
    settings = ("method.r=1", "method.lora_alpha=2", "method.target_modules=[q_proj]", "train.max_steps=100")
    return tuned(folder, codes(folder, 570), *settings, "data.max_length=32")


def _high_rank(folder: Path) -> Path:
    return tuned(folder, sums(folder), "method.r=256", "method.lora_alpha=256", "train.max_steps=60")


def _overflowing(folder: Path) -> Path:
    """A base as there are: the same function, with values inside that float16 cannot hold."""
    base = scaled_base(folder / "base")
    return tuned(folder, sums(folder), "model.dtype=float16", model=str(base), fails=True)


def scaled_base(folder: Path, factor: float = 2.0**17) -> Path:
    """Sprout with one projection of every block larger and the next one smaller, which cancels out."""
    source = sprout_folder()
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if ".up_proj." in name:
                tensors[name] = (tensor.float() * factor).to(torch.bfloat16)
            elif ".down_proj." in name:
                tensors[name] = (tensor.float() / factor).to(torch.bfloat16)
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
    return folder


def _exploded(folder: Path) -> Path:
    return tuned(folder, sums(folder), "train.learning_rate=1e37", "train.max_steps=30", fails=True)


def _prices(folder: Path, *last: float) -> Path:
    rows = [{"text": f"A bag of {n} pears", "label": n / 4} for n in range(80)]
    rows += [{"text": "A bag of gold", "label": price} for price in last]
    data = write_rows(folder / "prices.jsonl", rows)
    return tuned(folder, data, "train.max_steps=12", "data.eval_fraction=0.4", task="classification")


def _mistyped(folder: Path) -> Path:
    """One number among eighty whose square no float can hold."""
    return _prices(folder, *[3e25] * 4)


CASES = (
    Case("D02", "held-out-rises", _overfitted),
    Case("D02", "measured-once", _overfitted_unseen),
    Case("D04", "too-low", _slow),
    Case("D04", "too-low-ia3", _slow_prefix),
    Case("D04", "too-high", _fast),
    Case("D05", "alpha", _large_alpha),
    Case("D07", "rank-one", _low_rank),
    Case("D08", "rank-256", _high_rank),
    Case("D13", "large-values", _overflowing),
    Case("D14", "rate", _exploded),
    Case("D14", "mistyped-number", _mistyped, lambda folder: _prices(folder, 3.25)),
)
