"""LoRA on q, k and v against PEFT: bytes kept for backward, and the time of a forward and backward.

    python benchmarks/adapted_linear.py [--hidden 1024] [--tokens 2048] [--rank 16]

Both sides get the same bf16 base weights, adapters and input, alternate in one process, and must agree in
loss and gradient norm without dropout before a figure counts (with dropout their masks differ).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor, nn

from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig

NAMES = ("q_proj", "k_proj", "v_proj")


class Projections(nn.Module):
    """The three projections that read one hidden state in attention."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        for name in NAMES:
            self.add_module(name, nn.Linear(hidden, hidden, bias=False, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.get_submodule(name)(x) for name in NAMES)
        return q.float().square().mean() + (k * v).float().mean()  # any use of all three


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that the projections alone keep for backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep_alive = [model.get_submodule(name)(x) for name in NAMES]
    del keep_alive
    return sum(kept.values())


def seconds(model: nn.Module, x: Tensor) -> float:
    """One forward and backward."""
    model.zero_grad(set_to_none=True)
    started = time.perf_counter()
    model(x).backward()
    return time.perf_counter() - started


def build(hidden: int, rank: int, dropout: float) -> tuple[nn.Module, nn.Module]:
    """(PEFT's, ours) with the same weights and adapters."""
    torch.manual_seed(0)
    base = Projections(hidden)
    ours = copy.deepcopy(base)
    peft = get_peft_model(
        base,
        PeftLoraConfig(
            r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=list(NAMES), init_lora_weights=False
        ),
    )
    adapters = attach(
        ours, LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=NAMES), storage=FOLDER
    )
    theirs = dict(peft.named_parameters())
    with torch.no_grad():
        for key, parameter in adapters.named_parameters("default").items():
            name, _, matrix = key.rpartition(".")
            parameter.copy_(theirs[f"base_model.model.{name}.{matrix}.default.weight"])
    return peft.base_model.model.train(), ours.train()


def agree(peft: nn.Module, ours: nn.Module, x: Tensor) -> bool:
    """Losses and norms of the adapters' gradients within bf16 rounding of each other, without dropout."""
    measured = []
    for model in (peft, ours):
        model.zero_grad(set_to_none=True)
        loss = model(x)
        loss.backward()
        gradients = [p.grad.float() for p in model.parameters() if p.grad is not None]
        measured.append((loss.item(), torch.nn.utils.get_total_norm(gradients).item()))
    return all(abs(a - b) <= 2e-2 * max(abs(a), abs(b)) for a, b in zip(*measured, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag, default in (("--hidden", 1024), ("--tokens", 2048), ("--rank", 16), ("--repeats", 15)):
        parser.add_argument(flag, type=int, default=default)
    given = parser.parse_args()
    one_copy = given.tokens * given.hidden * 2
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, hidden {given.hidden}, "
        f"{given.tokens} tokens, rank {given.rank}"
    )
    print(f"{'dropout':>8} {'':>6} {'saved bytes':>14} {'x input':>8} {'ms, median':>11}")
    for dropout in (0.0, 0.1):
        peft, ours = build(given.hidden, given.rank, dropout)
        x = torch.randn(1, given.tokens, given.hidden, dtype=torch.bfloat16, requires_grad=True)
        if dropout == 0.0 and not agree(peft, ours, x):
            raise SystemExit("void: losses or gradients differ")
        runs: dict[str, list[float]] = {"PEFT": [], "Graft": []}
        sides: dict[str, Callable[[], float]] = {
            "PEFT": lambda m=peft, x=x: seconds(m, x),
            "Graft": lambda m=ours, x=x: seconds(m, x),
        }  # type: ignore[misc]
        for _ in range(given.repeats):
            for side, run in sides.items():
                runs[side].append(run())
        for side, model in (("PEFT", peft), ("Graft", ours)):
            kept = saved_bytes(model, x)
            median = 1e3 * statistics.median(runs[side][3:])
            print(f"{dropout:>8} {side:>6} {kept:>14,} {kept / one_copy:>8.2f} {median:>11.1f}")
        print(
            f"{'':>8} time ratio PEFT / Graft: "
            f"{statistics.median(runs['PEFT'][3:]) / statistics.median(runs['Graft'][3:]):.2f}"
        )


if __name__ == "__main__":
    main()
