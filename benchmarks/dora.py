"""DoRA against LoRA on the same layers, and against PEFT's DoRA: time of a step, bytes kept for backward.

    python benchmarks/dora.py [--dtype float32|bfloat16] [--hidden 512] [--layers 4] [--tokens 1024]

A Llama with random weights in the proportions of Llama 3 (one key for four queries, 3.5 times the width in
the feed-forward part) and an adapter on every linear layer. The three sides alternate in one process; figures
are medians over the rounds, and the ratio is the median of the ratios within a round. Time is the processor
time of the process: on a busy machine it says more than the clock. Both DoRAs start from the same tensors and
must agree in loss and gradient norms before a figure counts. `kept` counts each storage that backward needs
once, over the whole model; `layers` counts what the adapted layers alone keep, their inputs included.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig

SIDES = ("LoRA", "DoRA", "PEFT DoRA")


def base(given: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=given.hidden,
        intermediate_size=given.hidden * 7 // 2,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden // 64,
        num_key_value_heads=given.hidden // 256,
        vocab_size=512,
        max_position_embeddings=given.tokens,
    )
    return LlamaForCausalLM(config).to(getattr(torch, given.dtype)).train()


def sides(given: argparse.Namespace) -> dict[str, nn.Module]:
    """The three models, DoRA's from the same tensors."""
    lora, dora, theirs = (copy.deepcopy(model) for model in [base(given)] * 3)
    torch.manual_seed(1)
    config = LoraConfig(r=given.rank, lora_alpha=given.rank, init_lora_weights=False)
    attach(lora, config, storage=FOLDER)
    ours = attach(dora, config.replace(use_dora=True), storage=FOLDER)
    wrapped = peft.get_peft_model(
        theirs,
        peft.LoraConfig(
            r=given.rank,
            lora_alpha=given.rank,
            target_modules="all-linear",
            init_lora_weights=False,
            use_dora=True,
        ),
    )
    wanted = {key: p for key, p in wrapped.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for path, part in ours.parts("default").items():
            for ending, name in (
                ("lora_A.default.weight", "lora.lora_A"),
                ("lora_B.default.weight", "lora.lora_B"),
                ("lora_magnitude_vector.default.weight", "magnitude"),
            ):
                wanted[f"base_model.model.{path}.{ending}"].copy_(part.get_parameter(name))
    return dict(zip(SIDES, (lora, dora, wrapped), strict=True))


def step(model: nn.Module, ids: Tensor) -> tuple[float, float]:
    """(seconds, loss) of one forward and backward."""
    model.zero_grad(set_to_none=True)
    started = time.process_time()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return time.process_time() - started, loss.item()


def gradient_norm(model: nn.Module, name: str) -> float:
    """Norm of the gradients of all parameters with `name` in theirs."""
    found = [p.grad.float() for key, p in model.named_parameters() if name in key and p.grad is not None]
    return torch.nn.utils.get_total_norm(found).item()


def kept(model: nn.Module, ids: Tensor) -> tuple[int, int]:
    """Bytes of distinct storages kept for backward: (whole model, adapted layers), parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    inside: dict[int, int] = {}
    depth = [0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            if depth[0]:
                inside[storage.data_ptr()] = storage.nbytes()
        return tensor

    adapted = [m for m in model.modules() if hasattr(m, "base_layer")]
    hooks = [m.register_forward_pre_hook(lambda *_: depth.__setitem__(0, depth[0] + 1)) for m in adapted]
    hooks += [m.register_forward_hook(lambda *_: depth.__setitem__(0, depth[0] - 1)) for m in adapted]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = model(input_ids=ids, labels=ids, use_cache=False).loss
    for hook in hooks:
        hook.remove()
    del alive
    return sum(found.values()), sum(inside.values())


def require_agreement(models: dict[str, nn.Module], ids: Tensor, tolerance: float) -> None:
    """Stop unless both DoRAs have the same loss and gradient norms of A, B and magnitudes."""
    measured = []
    for side, magnitude in (("DoRA", "magnitude"), ("PEFT DoRA", "lora_magnitude_vector")):
        _, loss = step(models[side], ids)
        measured.append((loss, *(gradient_norm(models[side], n) for n in ("lora_A", "lora_B", magnitude))))
    for ours, theirs in zip(*measured, strict=True):
        if abs(ours - theirs) > tolerance * abs(theirs):
            raise SystemExit(f"void: {measured[0]} against {measured[1]}")
    print(f"parity of loss and gradient norms: {measured[0]} against {measured[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag, default in (("--hidden", 512), ("--layers", 4), ("--tokens", 1024), ("--rank", 16)):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    given = parser.parse_args()
    models = sides(given)
    ids = torch.randint(512, (1, given.tokens))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {vars(given)}")
    require_agreement(models, ids, 1e-4 if given.dtype == "float32" else 5e-2)
    runs: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(given.rounds + 2):
        for side in SIDES:
            taken, _ = step(models[side], ids)
            if number >= 2:
                runs[side].append(taken)
    whole, layers = zip(*(kept(models[side], ids) for side in SIDES), strict=True)
    heads = ("ms", "/ LoRA", "kept MB", "/ LoRA", "layers MB", "/ LoRA")
    print(" " * 10 + "".join(f"{head:>11}" for head in heads))
    for index, side in enumerate(SIDES):
        ratio = statistics.median(a / b for a, b in zip(runs[side], runs["LoRA"], strict=True))
        figures = (1e3 * statistics.median(runs[side]), ratio)
        figures += (
            whole[index] / 1e6,
            whole[index] / whole[0],
            layers[index] / 1e6,
            layers[index] / layers[0],
        )
        print(f"{side:>10}" + "".join(f"{figure:>11.3f}" for figure in figures))


if __name__ == "__main__":
    main()
