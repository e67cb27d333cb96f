"""Peak memory of QLoRA training on the shapes of Llama 3.1 8B and 70B, by phase and by kind of tensor.

    python benchmarks/qlora_memory.py                           8B, 32 layers; 16 GB of scratch files
    python benchmarks/qlora_memory.py --layers 2                the same widths, two layers: a minute
    python benchmarks/qlora_memory.py --shape 70b --layers 1 2  parts of 70B, and arithmetic for 80 layers

A checkpoint with random weights is written in bfloat16, a layer at a time, by another process; then
`load_model(..., quantization="nf4")` quantises it while reading, LoRA of rank 16 goes on every linear layer,
and three steps of `graft tune` run on one row of 512 tokens with activation checkpointing. Embeddings and
output head stay 16 bits. All layers have the same weights up to a factor: memory does not depend on values.
Memory is the kernel's high-water mark (VmHWM) of the whole process, libraries included, reset at every phase.

With two or more numbers of layers, what a layer adds is the difference, and a table of the tensors of the
whole depth follows: that is arithmetic, not a run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import results

RESULTS = results.FOLDER / "qlora_memory.csv"
RANK = 16
GB = 1e9


@dataclass(frozen=True)
class Shape:
    """A Llama."""

    layers: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    vocabulary: int = 128256

    def matrices(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block, [out, in]."""
        keys = self.hidden // self.heads * self.key_heads
        attention = {"q": self.hidden, "k": keys, "v": keys, "o": self.hidden}
        return {
            **{f"self_attn.{name}_proj": (rows, self.hidden) for name, rows in attention.items()},
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }


SHAPES = {
    "8b": Shape(32, 4096, 14336, 32, 8),
    "70b": Shape(80, 8192, 28672, 64, 8),
    "tiny": Shape(4, 256, 896, 4, 2, 2048),
}


@dataclass
class Measured:
    """One run. `phases`: peak bytes; `start` is the imports. `classes`: parameters and bytes by kind."""

    shape: str
    layers: int
    phases: dict[str, int] = field(default_factory=dict)
    classes: dict[str, list[int]] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Of the whole process."""
        return max(self.phases.values())

    @property
    def stored(self) -> int:
        """Weights and states: base, adapter, gradients, optimizer."""
        return sum(size for _, size in self.classes.values())


def write_checkpoint(shape: Shape, layers: int, folder: Path) -> None:
    """A folder like a hub checkpoint: config, tokenizer, a file for each layer and an index."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from graftlm.models.load import load_tokenizer

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    load_tokenizer("sprout").save_pretrained(folder)
    torch.manual_seed(0)
    index: dict[str, str] = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    def normal(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16).normal_(0.0, 0.02)

    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        write(f"{name}.safetensors", {name: normal(shape.vocabulary, shape.hidden)})
    block = {f"{name}.weight": normal(*size) for name, size in shape.matrices().items()}
    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    for layer in range(layers):
        tensors = {f"model.layers.{layer}.{name}": weight for name, weight in block.items()}
        tensors |= {
            f"model.layers.{layer}.{name}.weight": ones.clone()
            for name in ("input_layernorm", "post_attention_layernorm")
        }
        write(f"layer-{layer}.safetensors", tensors)
        for weight in block.values():
            weight.mul_(1.01)
    write("norm.safetensors", {"model.norm.weight": ones})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def train(given: argparse.Namespace) -> None:
    """Load, attach and train in this process; a `Measured` as JSON on the last line."""
    import torch

    from graftlm.data.batches import Batches
    from graftlm.data.encode import Encoded
    from graftlm.formats.layout import FOLDER
    from graftlm.methods.attach import attach
    from graftlm.methods.lora import LoraConfig
    from graftlm.models.fusing.fused import fusable, fused
    from graftlm.models.load import load_model
    from graftlm.models.recompute.policy import recomputing
    from graftlm.objectives.sft import SftObjective
    from graftlm.quant.embedding import quantise_embeddings
    from graftlm.training.memory_classes import tensor_classes
    from graftlm.training.memory_phases import BETWEEN, MemoryPhases
    from graftlm.training.optim import make_optimizer
    from graftlm.training.recipe import Recipe
    from graftlm.training.step import optimizer_step

    found = Measured(given.shape, given.layers[0])
    memory = MemoryPhases(torch.device("cpu"))
    started = time.perf_counter()
    memory.enter("load")
    model, _ = load_model(given.folder, dtype=torch.bfloat16, quantization="nf4")
    found.seconds["load"] = time.perf_counter() - started
    if given.tables != "16bit":
        quantise_embeddings(model, given.tables)
    memory.enter("attach")
    adapters = attach(model, LoraConfig(r=RANK, lora_alpha=2 * RANK), storage=FOLDER)
    train_section = {"optim": given.optim}
    recipe = Recipe.model_validate({"model": "any", "data": "any", "train": train_section})
    settings = recipe.train
    parameters = adapters.named_parameters("default")
    optimizer = make_optimizer(parameters, settings)
    model.train()
    objective = SftObjective(model)
    ids = torch.randint(512, (given.length,)).tolist()
    rows = [Encoded(tuple(ids), (-100, *ids[1:]), 0, False)]
    batch = Batches(
        rows, rows_per_batch=1, max_length=given.length, packing=False, seed=0, pad_token_id=0
    ).batch(0, 0)
    with fused(fusable(model)), recomputing(model, "everything"):
        for index in range(given.steps):
            started = time.perf_counter()
            stats = optimizer_step(
                model, objective, [batch], parameters, optimizer,
                max_grad_norm=settings.max_grad_norm, stop_asked=lambda: False, enter=memory.enter,
            )  # fmt: skip
            memory.enter(BETWEEN)
            found.seconds[f"step {index + 1}"] = time.perf_counter() - started
            found.losses.append(stats.loss)
            print(
                f"step {index + 1}: loss {stats.loss:.4f}, {found.seconds[f'step {index + 1}']:.1f} s",
                file=sys.stderr,
            )
    if not memory.is_exact:
        raise SystemExit("This system does not let a process reset its high-water mark.")
    found.phases = {peak.phase: peak.resident for peak in memory.peaks()}
    classes = tensor_classes(model, parameters, optimizer)
    found.classes = {item.name: [item.parameters, item.bytes] for item in classes}
    print(json.dumps(vars(found)))


def child(given: argparse.Namespace, task: str, layers: int, folder: Path) -> str:
    """One task in a process of its own; its last line."""
    command = [sys.executable, __file__, "--task", task, "--folder", str(folder), "--layers", str(layers)]
    for name in ("shape", "steps", "length", "optim", "tables"):
        command += [f"--{name}", str(getattr(given, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{task} ended with {done.returncode}")
    lines = done.stdout.strip().splitlines()
    return lines[-1] if lines else ""


def phases(run: Measured) -> str:
    """Markdown: what each phase took."""
    lines = [f"| {run.shape}, {run.layers} layers | peak GB |", "|---|---|"]
    lines += [f"| {phase} | {size / GB:.3f} |" for phase, size in run.phases.items()]
    lines += [f"| **whole process** | **{run.peak / GB:.3f}** |", ""]
    lines += [", ".join(f"{name} {seconds:.1f} s" for name, seconds in run.seconds.items())]
    return "\n".join([*lines, f"losses {', '.join(f'{loss:.4f}' for loss in run.losses)}"])


def classes(run: Measured) -> str:
    """Markdown: bytes and bits by kind of tensor."""
    lines = ["| tensors | parameters | GB | bits per parameter |", "|---|---|---|---|"]
    for name, (count, size) in run.classes.items():
        lines.append(f"| {name} | {count:,} | {size / GB:.3f} | {8 * size / count:.3f} |")
    return "\n".join([*lines, f"| **weights and states** | | **{run.stored / GB:.3f}** | |"])


def whole_depth(few: Measured, more: Measured) -> Measured:
    """Arithmetic: the tensors of all layers, from those of two runs of different depth."""
    depth = SHAPES[few.shape].layers
    steps = (depth - few.layers) / (more.layers - few.layers)

    def line(first: int, second: int) -> int:
        return round(first + steps * (second - first))

    found = Measured(few.shape, depth)
    for name, pair in few.classes.items():
        found.classes[name] = [line(a, b) for a, b in zip(pair, more.classes[name], strict=True)]
    return found


def keep(runs: Sequence[tuple[str, Measured]]) -> None:
    """Append to the results: one row per phase and per kind of tensor."""
    where = {
        "machine": results.machine(),
        "versions": results.versions("torch", "transformers", "graftlm"),
        "command": results.command(__file__),
        "date": results.today(),
    }
    rows: list[dict[str, Any]] = []
    for how, run in runs:
        head = {"shape": run.shape, "layers": run.layers, "how": how}
        for phase, size in run.phases.items():
            rows.append({**head, "what": "peak", "item": phase, "parameters": "", "bytes": size, **where})
        for name, (count, size) in run.classes.items():
            row = {"what": "tensors", "item": name, "parameters": count, "bytes": size}
            rows.append({**head, **row, **where})
    results.append(RESULTS, rows)


def measured(given: argparse.Namespace, layers: int) -> Measured:
    """Write, load and train one depth."""
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        child(given, "write", layers, Path(scratch))
        run = Measured(**json.loads(child(given, "train", layers, Path(scratch))))
    print(phases(run), classes(run), sep="\n\n", flush=True)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--layers", type=int, nargs="+", help="default: all")
    for flag, default in (("steps", 3), ("length", 512)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--optim", default="adamw", help="as in a recipe")
    parser.add_argument(
        "--tables", choices=("16bit", "int8", "fp8"), default="16bit", help="embeddings and head"
    )
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoint, 0.5 GB per layer and 2 GB")
    parser.add_argument("--keep", action="store_true", help=f"append to results/{RESULTS.name}")
    parser.add_argument("--task", choices=("write", "train"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.task == "write":
        write_checkpoint(SHAPES[given.shape], given.layers[0], given.folder)
    elif given.task == "train":
        train(given)
    else:
        os.environ["HF_HUB_OFFLINE"] = "1"
        runs: list[tuple[str, Any]] = [
            ("measured", measured(given, layers)) for layers in given.layers or [SHAPES[given.shape].layers]
        ]
        if len(runs) > 1:
            whole = whole_depth(runs[0][1], runs[-1][1])
            runs.append(("arithmetic", whole))
            print(f"\n{whole.shape}, {whole.layers} layers, by arithmetic:\n\n{classes(whole)}")
        if given.keep:
            keep(runs)


if __name__ == "__main__":
    main()
