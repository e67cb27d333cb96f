"""Event logs as runs leave them, made of curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.facts.adapter import AdapterFacts, LayerChange

RECIPE: dict[str, Any] = {
    "model": {"name": "sprout", "dtype": "auto", "quantization": "none", "compute_dtype": "bfloat16"},
    "data": {"path": "rows.jsonl", "max_length": 512},
    "method": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},
    "train": {
        "learning_rate": 2e-4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "eval_steps": 100,
        "early_stopping_patience": None,
        "optim": "adamw",
    },
}
PLAN: dict[str, Any] = {
    "usual_learning_rate": 2e-4,
    "dtype": "float32",
    "train_rows": 200,
    "steps": 100,
    "trainable": 1_000_000,
    "recompute": "nothing",
    "activation_bytes": 10**9,
    "free_bytes": 4 * 10**9,
}


def decay(step: int) -> float:
    """A loss as it should be."""
    return 0.5 + 1.5 * math.exp(-step / 20)


def steps(loss: Callable[[int], float] | Sequence[float] = decay, count: int = 100) -> list[dict[str, Any]]:
    """Events of training steps."""
    value = loss if callable(loss) else loss.__getitem__
    return [
        {"kind": "step", "step": n, "loss": value(n - 1), "epoch": n / 25, "target_tokens": 1000}
        for n in range(1, count + 1)
    ]


def measured(losses: Sequence[float], every: int = 10) -> list[dict[str, Any]]:
    """Events of the held-out loss."""
    return [{"kind": "evaluate", "step": every * n, "loss": loss} for n, loss in enumerate(losses, start=1)]


def updates(sizes: Sequence[float], moved: float = 1.0, still: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Events of what an adapter changed, step by step."""
    return [
        {"kind": "adapter", "step": n, "done": n, "moved": moved, "still": list(still), "median": size / 2,
         "largest": size, "largest_at": "layers.0.q_proj"}
        for n, size in enumerate(sizes, start=1)
    ]  # fmt: skip


def run(
    events: Sequence[dict[str, Any]],
    *,
    is_over: bool = True,
    plan: dict[str, Any] | None = None,
    adapter: AdapterFacts | None = None,
    **sections: dict[str, Any],
) -> Evidence:
    """The evidence of a run; `sections` change values of the recipe."""
    recipe = {name: {**section, **sections.get(name, {})} for name, section in RECIPE.items()}
    ordered = sorted(events, key=lambda event: event.get("step", 0))
    return Evidence(
        recipe=recipe, plan={**PLAN, **(plan or {})}, events=ordered, is_over=is_over, adapter=adapter
    )


def layers(*spectra: Sequence[float], rank: int | None = None) -> AdapterFacts:
    """An adapter with these singular values, one layer each."""
    found = tuple(
        LayerChange(f"layers.{n}.q_proj", rank or len(values), tuple(values))
        for n, values in enumerate(spectra)
    )
    still = tuple(layer.path for layer in found if layer.is_zero)
    return AdapterFacts(kind="LORA", layers=found, still=still, trained=len(found))
