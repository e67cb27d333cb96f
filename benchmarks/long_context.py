"""Peak memory and time of one training step on one long sequence, by length and by what is recomputed.

    python benchmarks/long_context.py [--lengths 2048 4096 8192 16384] [--sides everything ...] [--keep]
    python benchmarks/long_context.py --labelled 0.3        only a share of the tokens has a label

A Llama with random bfloat16 weights (by default 0.17B parameters: hidden 1024, 8 layers, feed-forward 2816,
32,000 tokens), LoRA of rank 16 on every linear layer, one sequence of T tokens in a step. Ours is the step of
`graft tune` under a policy of `train.recompute`; PEFT is PEFT on transformers with bfloat16 adapters, its
layers checkpointed or not. Every length and side runs in a process of its own.

"MiB" is what a step adds at most to what is resident when model, adapter and optimizer are loaded (VmHWM,
reset before the steps). "of linear" divides by the same side's at the shortest length times the ratio of the
lengths: 1 is exactly linear growth, below 1 less. Seconds are those of the fastest of `--steps` steps.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from harness.measurement import resident

RESULTS = Path(__file__).parent / "results" / "long_context.csv"
OURS = ("nothing", "cheap", "feed_forward", "everything")
PEFT = ("PEFT", "PEFT, checkpointed")
RANK = 16


@dataclass
class Row:
    """One process."""

    side: str
    tokens: int
    labelled: float
    threads: int = 0
    loaded: int = 0
    """Resident bytes with model, adapter and optimizer."""
    peak: int = 0
    predicted: int = 0
    """Bytes of activations, as `plan.json` has them; 0 for others."""
    seconds: float = 0.0
    loss: float = 0.0

    @property
    def above(self) -> int:
        return self.peak - self.loaded


def write_model(given: argparse.Namespace, folder: Path) -> None:
    """The model with a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from graftlm.models.load import load_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=given.hidden,
        intermediate_size=given.hidden * 11 // 4,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden // 64,
        num_key_value_heads=given.hidden // 64,
        vocab_size=given.vocabulary,
        max_position_embeddings=max(given.lengths),
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer("sprout").save_pretrained(folder)


def sequence(given: argparse.Namespace) -> tuple[list[int], list[int]]:
    """Tokens and labels of the one sequence."""
    import torch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(given.vocabulary, (given.tokens,), generator=generator).tolist()
    first = max(1, round(given.tokens * (1 - given.labelled)))
    return ids, [-100] * first + ids[first:]


def ours(given: argparse.Namespace, row: Row, stack: ExitStack) -> Callable[[], float]:
    """The step of `graft tune` under one policy."""
    import torch

    from graftlm.data.batches import Batches
    from graftlm.data.encode import Encoded
    from graftlm.formats.layout import FOLDER
    from graftlm.methods.attach import attach
    from graftlm.methods.lora import LoraConfig
    from graftlm.models.load import load_model
    from graftlm.objectives.sft import SftObjective
    from graftlm.training.optim import make_optimizer
    from graftlm.training.recipe import Recipe
    from graftlm.training.step import optimizer_step
    from graftlm.verbs.step_setup import step_setup

    model, _ = load_model(given.folder, dtype=torch.bfloat16)
    adapters = attach(model, LoraConfig(r=RANK, lora_alpha=2 * RANK), storage=FOLDER)
    recipe = Recipe.model_validate({
        "model": "any",
        "data": {"path": "any", "max_length": given.tokens},
        "train": {"per_device_train_batch_size": 1, "recompute": row.side},
    })  # fmt: skip
    parameters = adapters.named_parameters("default")
    optimizer = make_optimizer(parameters, recipe.train)
    setup = step_setup(model, SftObjective(model), recipe, tokens=given.tokens)
    row.predicted = setup.recompute.activation_bytes
    model.train()
    stack.enter_context(setup.in_use())
    ids, labels = sequence(given)
    rows = [Encoded(tuple(ids), tuple(labels), 0, False)]
    batches = Batches(rows, rows_per_batch=1, max_length=given.tokens, packing=True, seed=0, pad_token_id=0)

    def step() -> float:
        stats = optimizer_step(
            model, setup.objective, [batches.batch(0, 0)], parameters, optimizer,
            max_grad_norm=1.0, stop_asked=lambda: False,
        )  # fmt: skip
        return stats.loss

    return step


def peft(given: argparse.Namespace, row: Row, stack: ExitStack) -> Callable[[], float]:
    """PEFT on transformers, the logits of all tokens at once as its Trainer forms them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(given.folder, dtype=torch.bfloat16)
    if row.side == PEFT[1]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=True)
    ids, labels = (torch.tensor([values]) for values in sequence(given))

    def step() -> float:
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def measure(given: argparse.Namespace) -> None:
    """One side at one length, in this process; its `Row` as JSON on the last line."""
    import torch

    from graftlm.training.memory import reset_peak

    row = Row(given.side, given.tokens, given.labelled, torch.get_num_threads())
    with ExitStack() as stack:
        step = (peft if given.side in PEFT else ours)(given, row, stack)
        if not reset_peak(torch.device("cpu")):
            raise SystemExit("This system does not let a process reset its high-water mark.")
        row.loaded = resident("VmRSS")
        seconds = []
        for _ in range(given.steps):
            started = time.perf_counter()
            row.loss = step()
            seconds.append(time.perf_counter() - started)
        row.seconds = min(seconds)
    row.peak = resident("VmHWM")
    print(json.dumps(asdict(row)))


def started(given: argparse.Namespace, side: str, tokens: int, folder: Path) -> Row | None:
    """The same in a process of its own; None where it was killed or ran too long."""
    command = [sys.executable, __file__, "--side", side, "--tokens", str(tokens), "--folder", str(folder)]
    for name in ("steps", "vocabulary", "labelled"):
        command += [f"--{name}", str(getattr(given, name))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=given.limit, env=os.environ)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        print(done.stderr.strip().splitlines()[-1:] or f"exit {done.returncode}", file=sys.stderr)
        return None
    return Row(**json.loads(done.stdout.strip().splitlines()[-1]))


def table(rows: list[Row]) -> str:
    """Markdown: a line for each side, in the order of their first figure."""
    lengths = sorted({row.tokens for row in rows})
    lines = ["| recomputed | " + " | ".join(f"{length:,} tokens" for length in lengths) + " |",
             "|---" * (len(lengths) + 1) + "|"]  # fmt: skip
    for side in dict.fromkeys(row.side for row in rows):
        own = {row.tokens: row for row in rows if row.side == side}
        first = own[min(own)]
        cells = []
        for length in lengths:
            if (row := own.get(length)) is None:
                cells.append("-")
                continue
            linear = row.above / (first.above * length / first.tokens)
            cells.append(f"{row.above / 2**20:,.0f} MiB, {linear:.2f} of linear, {row.seconds:.1f} s")
        lines.append(f"| {side} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare(given: argparse.Namespace) -> None:
    """Every side at every length, the table, and on request the file of results."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(given, Path(folder))
        for tokens in given.lengths:
            for side in given.sides:
                if side in PEFT and tokens > given.peft_up_to:
                    continue
                if (row := started(given, side, tokens, Path(folder))) is not None:
                    rows.append(row)
                    print(f"{side}, {tokens:,} tokens: {row.above / 2**20:,.0f} MiB (predicted "
                          f"{row.predicted / 2**20:,.0f}), {row.seconds:.1f} s, loss {row.loss:.4f}",
                          file=sys.stderr, flush=True)  # fmt: skip
    print(table(rows))
    if given.keep:
        with RESULTS.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(field.name for field in fields(Row))
            writer.writerows(asdict(row).values() for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--sides", nargs="+", choices=(*OURS, *PEFT), default=[*OURS, *PEFT])
    parser.add_argument("--peft-up-to", type=int, default=8192, help="their logits grow to gigabytes")
    parser.add_argument("--labelled", type=float, default=1.0, help="share of the tokens that has a label")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--limit", type=float, default=900, help="seconds after which a side is given up")
    parser.add_argument("--keep", action="store_true", help=f"write results/{RESULTS.name}")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    (measure if given.side else compare)(given)


if __name__ == "__main__":
    main()
