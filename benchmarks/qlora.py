"""QLoRA end to end on a CPU: ours against PEFT + transformers + bitsandbytes, and our own 16-bit LoRA.

    python benchmarks/qlora.py [--rounds 3] [--steps 8] [--recompute]
    python benchmarks/qlora.py --kinds                ours alone, with every kind of quantised base
    python benchmarks/qlora.py --profile              where the time of one of our steps goes

One Llama with random weights (by default 0.17B parameters: hidden 1024, 8 layers, feed-forward 2816, and the
32,000 tokens of Llama 2, so that the logits weigh as they do in practice) is saved once; every side reads it
in a process of its own, the sides take turns, and all start from the same adapter file (rank 16 on every
linear layer) and see the same rows (4 x 512 tokens a step). Ours runs the step of `graft tune`. PEFT runs in
the four ways that people use it in; the best of them counts, for speed and for memory each.

Figures: tokens per second from the median step after two warm-up steps; peak resident memory (VmHWM) of the
whole process and of what came after the imports. A run is void unless loss and gradient norm of every step
agree with the first PEFT side: both hold the same NF4 codes, so only the order and the precision of 16-bit
arithmetic differ. The tolerances are twice to four times what PEFT's sides differ among themselves (6e-5 and
9e-3 over eight steps), and so tight that a base without quantisation fails them (1e-3 and 4e-2).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "qlora.csv"
OURS, DENSE = "Graft QLoRA", "Graft LoRA, 16 bits"
KINDS = {OURS: "nf4", "Graft, fp4": "fp4", "Graft, int8": "int8", "Graft, fp8": "fp8", DENSE: "none"}
PEERS = {
    "PEFT, prepared": ("prepared",),
    "PEFT, prepared, autocast": ("prepared", "autocast"),
    "PEFT, as loaded": (),
    "PEFT, as loaded, 16-bit adapters": ("16-bit adapters",),
}
"""`prepared`: `prepare_model_for_kbit_training`. `autocast`: what the Trainer does with `bf16=True`."""
ROWS, LENGTH, RANK = 4, 512, 16
WARM_UP = 2
LOSS_TOLERANCE, NORM_TOLERANCE = 2.5e-4, 1.5e-2


@dataclass
class Run:
    """One process: seconds by the clock and of all processors, loss and gradient norm of each step."""

    side: str
    round: int
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    imports: int = 0
    """Resident after the imports."""
    loaded: int = 0
    """Peak up to the loaded model with its adapter."""
    peak: int = 0
    """Peak of the whole process."""

    @property
    def tokens_per_second(self) -> float:
        return ROWS * LENGTH / statistics.median(self.seconds[WARM_UP:])


def resident(kind: str) -> int:
    """`VmRSS` (now) or `VmHWM` (the most so far) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def write_model(given: argparse.Namespace, folder: Path) -> None:
    """The model with a tokenizer, and the adapter that every side starts from."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from graftlm.formats.layout import FOLDER
    from graftlm.methods.attach import attach
    from graftlm.methods.lora import LoraConfig
    from graftlm.models.load import load_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=given.hidden,
        intermediate_size=given.hidden * 11 // 4,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden // 64,
        num_key_value_heads=given.hidden // 64,
        vocab_size=given.vocabulary,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    load_tokenizer("sprout").save_pretrained(folder / "base")
    print(f"{model.num_parameters() / 1e6:.0f}M parameters", flush=True)
    adapters = attach(model, LoraConfig(r=RANK, lora_alpha=2 * RANK), storage=FOLDER)
    adapters.save(folder / "adapter", "default")


def rows(vocabulary: int, steps: int) -> list[list[int]]:
    """Token rows with something to learn: drawn from 64 phrases of 16 tokens."""
    import torch

    generator = torch.Generator().manual_seed(1)
    phrases = torch.randint(vocabulary, (64, 16), generator=generator)
    picks = torch.randint(64, (steps * ROWS, LENGTH // 16), generator=generator)
    found: list[list[int]] = phrases[picks].flatten(1).tolist()
    return found


def ours(given: argparse.Namespace, run: Run, stack: ExitStack) -> Callable[[int], tuple[float, float]]:
    """The step of `graft tune`, on a base of that kind."""
    import torch

    from graftlm.data.batches import Batches
    from graftlm.data.encode import Encoded
    from graftlm.formats.layout import FOLDER
    from graftlm.methods.attach import attach_folder
    from graftlm.models.fusing.fused import fusable, fused
    from graftlm.models.load import load_model
    from graftlm.objectives.sft import SftObjective
    from graftlm.training.optim import make_optimizer
    from graftlm.training.recipe import Recipe
    from graftlm.training.step import optimizer_step
    from graftlm.verbs.plan import use_checkpointing

    run.imports = resident("VmRSS")
    model, _ = load_model(given.folder / "base", dtype=torch.bfloat16, quantization=KINDS[run.side])
    adapters = attach_folder(model, given.folder / "adapter", storage=FOLDER)
    adapters.train_only("default")
    train = {"learning_rate": given.rate, "gradient_checkpointing": given.recompute}
    recipe = Recipe.model_validate({"model": "any", "data": "any", "train": train})
    settings = recipe.train
    parameters = adapters.named_parameters("default")
    optimizer = make_optimizer(parameters, settings)
    objective = SftObjective(model)
    use_checkpointing(model, recipe)
    model.train()
    stack.enter_context(fused(fusable(model)))
    encoded = [
        Encoded(tuple(row), (-100, *row[1:]), number, False)
        for number, row in enumerate(rows(given.vocabulary, given.steps))
    ]
    layout = {"rows_per_batch": ROWS, "max_length": LENGTH, "packing": False, "seed": 0, "pad_token_id": 0}
    batches = [
        Batches(encoded[first : first + ROWS], **layout).batch(0, 0) for first in range(0, len(encoded), ROWS)
    ]

    def step(index: int) -> tuple[float, float]:
        stats = optimizer_step(
            model, objective, [batches[index]], parameters, optimizer,
            max_grad_norm=settings.max_grad_norm, stop_asked=lambda: False,
        )  # fmt: skip
        return stats.loss, stats.grad_norm

    return step


def theirs(given: argparse.Namespace, run: Run, stack: ExitStack) -> Callable[[int], tuple[float, float]]:
    """PEFT on transformers' bitsandbytes model, in the training step of transformers' Trainer."""
    import torch
    from peft import PeftModel, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    run.imports = resident("VmRSS")
    ways = PEERS[run.side]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        given.folder / "base", dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
    )
    if "prepared" in ways:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if given.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model = PeftModel.from_pretrained(
        model,
        given.folder / "adapter",
        is_trainable=True,
        autocast_adapter_dtype="16-bit adapters" not in ways,
    )
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=given.rate, weight_decay=0.0, fused=True)
    data = torch.tensor(rows(given.vocabulary, given.steps)).view(-1, ROWS, LENGTH)

    def step(index: int) -> tuple[float, float]:
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in ways):
            loss = model(input_ids=data[index], labels=data[index], use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), norm.item()

    return step


def measure(given: argparse.Namespace) -> None:
    """One side, in this process; its `Run` as JSON on the last line."""
    run = Run(given.side, given.round)
    with ExitStack() as stack:
        step = (theirs if given.side in PEERS else ours)(given, run, stack)
        run.loaded = resident("VmHWM")
        for index in range(given.steps):
            started, begun = time.perf_counter(), time.process_time()
            loss, norm = step(index)
            run.seconds.append(time.perf_counter() - started)
            run.processor.append(time.process_time() - begun)
            run.losses.append(loss)
            run.norms.append(norm)
    run.peak = resident("VmHWM")
    print(json.dumps(asdict(run)))


def profile(given: argparse.Namespace) -> None:
    """Where the time of our step goes, by operator."""
    import torch

    with ExitStack() as stack:
        step = ours(given, Run(given.side, 0), stack)
        for index in range(given.steps - 1):
            step(index)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            step(given.steps - 1)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def start(given: argparse.Namespace, side: str, number: int, folder: Path) -> Run:
    """A round of one side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--round", str(number), "--folder", str(folder)]
    for name in ("steps", "hidden", "layers", "vocabulary", "rate"):
        command += [f"--{name}", str(getattr(given, name))]
    command += ["--recompute"] if given.recompute else []
    command += ["--profile"] if given.profile else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side}\n{done.stderr[-3000:]}")
    if given.profile:
        print(done.stdout)
        return Run(side, number)
    run = Run(**json.loads(done.stdout.strip().splitlines()[-1]))
    print(f"{number} {side:34} {run.tokens_per_second:8.0f} tokens/s, peak {run.peak / 1e6:6.0f} MB, "
          f"loss {run.losses[-1]:.4f}", flush=True)  # fmt: skip
    return run


def require_agreement(runs: Sequence[Run]) -> None:
    """Stop unless every side on the NF4 base has the losses and gradient norms of the first PEFT side."""
    reference = next(run for run in runs if run.side in PEERS)
    for run in (run for run in runs if run.round == reference.round):
        loss, norm = (
            max(abs(a / b - 1) for a, b in zip(mine, other, strict=True))
            for mine, other in ((run.losses, reference.losses), (run.norms, reference.norms))
        )
        print(f"{run.side:34} against {reference.side}: loss within {loss:.1e}, gradient norm {norm:.1e}")
        if run.side != DENSE and (loss > LOSS_TOLERANCE or norm > NORM_TOLERANCE):
            raise SystemExit("void: the sides do not compute the same")


class Table:
    """Medians over rounds, ratios within a round, as Markdown."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.sides = tuple(dict.fromkeys(run.side for run in runs))

    def __str__(self) -> str:
        heads = ("side", "tokens/s", "processor s per step", "peak MB", "above imports MB", "loading MB")
        lines = [f"| {' | '.join(heads)} |", "|---|---|---|---|---|---|"]
        for side in self.sides:
            megabytes = [self.median(side, value) / 1e6 for value in (peak, used, loading)]
            seconds = f"{self.median(side, processor):.2f}"
            figures = " | ".join(f"{figure:,.0f}" for figure in megabytes)
            lines.append(f"| {side} | {self.median(side, speed):,.0f} | {seconds} | {figures} |")
        return "\n".join(lines)

    def targets(self) -> str:
        """Ours against the best of PEFT's ways, for each figure, and against our own LoRA."""
        fastest = max(PEERS, key=lambda side: self.median(side, speed))
        smallest = min(PEERS, key=lambda side: self.median(side, peak))
        lines = [f"- tokens/s, {OURS} / {side}: {self.ratio(OURS, side, speed)}" for side in PEERS]
        return "\n".join((
            *lines,
            f"- the fastest is {fastest}; target 2",
            f"- peak memory, {OURS} / {smallest}: {self.ratio(OURS, smallest, peak)}; target 0.6; "
            f"above the imports {self.ratio(OURS, smallest, used)}",
            f"- tokens/s, {OURS} / {DENSE}: {self.ratio(OURS, DENSE, speed)}; target 0.85",
        ))  # fmt: skip

    def median(self, side: str, value: Callable[[Run], float]) -> float:
        return statistics.median(value(run) for run in self.runs if run.side == side)

    def ratio(self, side: str, other: str, value: Callable[[Run], float]) -> str:
        """Median of the ratios within a round, with the range."""
        mine, its = ({run.round: value(run) for run in self.runs if run.side == it} for it in (side, other))
        found = sorted(mine[number] / its[number] for number in mine)
        return f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"


def speed(run: Run) -> float:
    return run.tokens_per_second


def processor(run: Run) -> float:
    return statistics.median(run.processor[WARM_UP:])


def peak(run: Run) -> float:
    return run.peak


def used(run: Run) -> float:
    return run.peak - run.imports


def loading(run: Run) -> float:
    return run.loaded - run.imports


def keep(given: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Append the runs to the results, with machine, versions and command."""
    import torch

    packages = ("torch", "transformers", "peft", "bitsandbytes", "graftlm")
    where = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
        "command": " ".join(["python benchmarks/qlora.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    names = [*(item.name for item in fields(Run)), "tokens_per_second", *where]
    is_new = not RESULTS.is_file()
    with RESULTS.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for run in runs:
            lists = {
                key: " ".join(f"{value:.6g}" for value in getattr(run, key))
                for key in ("seconds", "processor", "losses", "norms")
            }
            writer.writerow(
                asdict(run) | lists | {"tokens_per_second": round(run.tokens_per_second, 1)} | where
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    for flag, default in (("steps", 8), ("hidden", 1024), ("layers", 8), ("vocabulary", 32000)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing on every side")
    parser.add_argument("--kinds", action="store_true", help="only ours, every kind of quantised base")
    parser.add_argument("--profile", action="store_true", help="only profile our two sides")
    parser.add_argument("--keep", action="store_true", help=f"append the runs to results/{RESULTS.name}")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--round", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        (profile if given.profile else measure)(given)
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        write_model(given, Path(scratch))
        if given.profile:
            for side in (OURS, DENSE):
                start(given, side, 0, Path(scratch))
            return
        sides = tuple(KINDS) if given.kinds else (OURS, *PEERS, DENSE)
        runs = [start(given, side, number, Path(scratch)) for number in range(given.rounds) for side in sides]
    found = Table(runs)
    if not given.kinds:
        require_agreement(runs)
    print(found)
    print("" if given.kinds else found.targets())
    if given.keep:
        keep(given, runs)


if __name__ == "__main__":
    main()
