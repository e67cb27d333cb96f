"""What it costs to keep a base on disk, and that it changes no value: peak memory, speed, equality.

    python benchmarks/streamed.py            4, 8, 16 and 32 layers of width 2,048; 6 GB of scratch files
    python benchmarks/streamed.py --layers 2 4 --width 512                 the same, small: two minutes
    python benchmarks/streamed.py --sparse-layers 400         a base of 36 GB, which takes no room on the disk

For each number of layers a checkpoint with random weights is written (bfloat16; as NF4 by `save_base`), and
trained on in fresh processes: LoRA of rank 4 on q and v, activation checkpointing, one row of 256 tokens a
step. With the base resident; on disk with the files in the system's cache (warm); on disk with the files
thrown out of that cache before every step (cold). A row is void (and the script fails) unless its losses,
gradient norms and trained weights are those of the resident run to the bit.

Memory is that of the whole process above what it has after the imports: the kernel's high-water mark
(VmHWM), and the highest of anonymous (RssAnon, RssShmem) and of mapped pages (RssFile) in samples 2 ms apart.
Mapped pages count, as the kernel counts them; pages in the system's cache that no process maps do not. Freed
blocks of more than 128 KiB go back to the system in all modes: glibc would keep a few MB a layer.

`--sparse-layers` trains on a file of holes, which may be larger than the machine's memory: its weights are
zeros that the system makes up. Memory is that of such a base, time that of one on a fast disk.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.measurement import RESET, resident
from qlora_memory import Shape, write_checkpoint

RESULTS = Path(__file__).parent / "results" / "streamed.csv"
ROW = 256
MB = 1e6
MODES = ("resident", "disk, warm", "disk, cold")


@dataclass(frozen=True)
class Measured:
    """One process. Bytes are above those after the imports; seconds are of every step but the first."""

    layers: int
    stored: str
    mode: str
    layer_bytes: int
    peak: int
    peak_anonymous: int
    peak_mapped: int
    tokens_per_second: float
    read_bytes_per_step: int
    values: str
    """SHA-256 of losses, gradient norms and trained weights."""


def mapped_and_not() -> dict[str, int]:
    """Resident bytes: of files, and of everything else."""
    return {"anonymous": resident("RssAnon") + resident("RssShmem"), "mapped": resident("RssFile")}


@contextmanager
def sampled() -> Iterator[dict[str, int]]:
    """The highest of each kind of resident memory inside."""
    highest, done = {"anonymous": 0, "mapped": 0}, threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            for name, value in mapped_and_not().items():
                highest[name] = max(highest[name], value)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield highest
    finally:
        done.set()
        thread.join()


def drop_from_cache(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # what is not written yet is not dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_so_far() -> int:
    """Bytes that this process had read from a disk."""
    found = re.search(r"read_bytes: (\d+)", Path("/proc/self/io").read_text())
    return int(found[1]) if found else 0


def train(given: argparse.Namespace) -> None:
    """Load, attach and train in this process; a `Measured` as JSON on the last line."""
    import torch

    from graftlm.methods.lora import LoraConfig
    from graftlm.models.attach import attach_from_base
    from graftlm.models.load import load_model
    from graftlm.models.streaming.streamed import streamed_layers, streamed_tensors

    folder = Path(given.folder)
    load_model("sprout", dtype="bfloat16", quantization="nf4", device="cpu")  # imports, compiles
    RESET.write_text("5", encoding="utf-8")  # the mark starts afresh
    mark, before = resident("VmHWM"), mapped_and_not()
    digest = hashlib.sha256()
    seconds: list[float] = []
    reads: list[int] = []
    with sampled() as highest:
        model, _ = load_model(
            folder,
            dtype="bfloat16",
            device="cpu",
            placement="resident" if given.train == MODES[0] else "disk",
        )
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
        adapters = attach_from_base(model, config, "default")
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        model.config.use_cache = False
        model.train()
        trained = list(adapters.named_parameters("default").values())
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        ids = torch.randint(4, 1000, (1, ROW), generator=torch.Generator().manual_seed(0))
        for _ in range(given.steps):
            if given.train == MODES[2]:
                drop_from_cache(folder)
            began, read = time.perf_counter(), read_so_far()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - began)
            reads.append(read_so_far() - read)
            digest.update(f"{loss.item()!r} {norm.item()!r}".encode())
    most = resident("VmHWM")
    for parameter in trained:
        digest.update(parameter.detach().numpy().tobytes())
    largest = max(sum(t.nbytes for t in streamed_tensors(layer)) for layer in streamed_layers(model))
    found = Measured(
        layers=given.layers[0], stored=given.stored, mode=given.train, layer_bytes=largest,
        peak=most - mark,
        peak_anonymous=highest["anonymous"] - before["anonymous"],
        peak_mapped=highest["mapped"] - before["mapped"],
        tokens_per_second=ROW / statistics.median(seconds[1:]),
        read_bytes_per_step=int(statistics.median(reads[1:])),
        values=digest.hexdigest(),
    )  # fmt: skip
    print(json.dumps(asdict(found)))


def quantise(source: Path, target: Path) -> None:
    from graftlm.models.load import load_model
    from graftlm.models.save_quantised import save_base

    save_base(*load_model(source, quantization="nf4", dtype="bfloat16", device="cpu"), target)


def write_sparse(shape: Shape, layers: int, folder: Path) -> None:
    """A checkpoint whose weights are a hole in its file."""
    write_checkpoint(shape, 1, folder)  # for its config and tokenizer
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()
    ends = ("model.embed_tokens", "lm_head")
    sizes = {f"{name}.weight": [shape.vocabulary, shape.hidden] for name in ends}
    sizes["model.norm.weight"] = [shape.hidden]
    for layer in range(layers):
        block = {name: list(size) for name, size in shape.matrices().items()}
        block |= {name: [shape.hidden] for name in ("input_layernorm", "post_attention_layernorm")}
        sizes |= {f"model.layers.{layer}.{name}.weight": size for name, size in block.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in sizes.items():
        start, end = end, end + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def in_process(*arguments: Any) -> str:
    command = [sys.executable, __file__, *map(str, arguments)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.splitlines()[-1] if done.stdout else ""


def measure(given: argparse.Namespace, layers: int, scratch: Path) -> list[Measured]:
    dense, packed = scratch / f"dense-{layers}", scratch / f"nf4-{layers}"
    dense.mkdir()
    width = ("--width", given.width)
    in_process("--write", dense, "--layers", layers, *width)
    in_process("--quantise", packed, "--folder", dense)
    found = []
    for stored, folder in (("bfloat16", dense), ("nf4", packed)):
        for mode in MODES:
            row = Measured(**json.loads(in_process(
                "--train", mode, "--folder", folder, "--stored", stored,
                "--layers", layers, "--steps", given.steps, *width,
            )))  # fmt: skip
            found.append(row)
            same = "equal" if row.values == found[-1 - MODES.index(mode)].values else "DIFFERENT"
            print(
                f"{layers:3d} layers of {row.layer_bytes / MB:6.1f} MB, {stored:8s}  {mode:10s}  "
                f"peak {row.peak / MB:7.0f} MB (anonymous {row.peak_anonymous / MB:5.0f}, mapped "
                f"{row.peak_mapped / MB:5.0f})  {row.tokens_per_second:7.1f} tokens/s  "
                f"{row.read_bytes_per_step / MB:6.0f} MB read a step  {same}",
                flush=True,
            )
        for file in folder.iterdir():
            file.unlink()
    return found


def shape_of(width: int) -> Shape:
    return Shape(0, width, 11 * width // 4, width // 64, max(1, width // 256), 4096)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sparse-layers", type=int, help="only this: a base of holes with so many layers")
    parser.add_argument("--scratch", help="where checkpoints are written; default: the system's")
    for hidden in ("write", "quantise", "train", "folder", "stored"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write:
        write_checkpoint(shape_of(given.width), given.layers[0], Path(given.write))
    elif given.quantise:
        quantise(Path(given.folder), Path(given.quantise))
    elif given.train:
        train(given)
    elif given.sparse_layers:
        with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
            write_sparse(shape_of(given.width), given.sparse_layers, Path(scratch))
            size = (Path(scratch) / "model.safetensors").stat().st_size
            shown = ("--layers", given.sparse_layers, "--steps", given.steps, "--stored", "holes")
            row = Measured(**json.loads(in_process("--train", MODES[1], "--folder", scratch, *shown)))
        print(f"{row.layers} layers, {size / 1e9:.1f} GB: peak {row.peak / MB:,.0f} MB (anonymous "
              f"{row.peak_anonymous / MB:,.0f}, mapped {row.peak_mapped / MB:,.0f}), "
              f"{row.tokens_per_second:.1f} tokens/s")  # fmt: skip
    else:
        with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
            rows = [row for layers in given.layers for row in measure(given, layers, Path(scratch))]
        store(rows)
        if len({(row.layers, row.stored, row.values) for row in rows}) > 2 * len(given.layers):
            raise SystemExit("Void: a streamed run computed other values than the resident one.")


def store(rows: list[Measured]) -> None:
    import torch

    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*facts, *asdict(rows[0])])
        writer.writeheader()
        writer.writerows({**facts, **asdict(row)} for row in rows)
    print(f"-> {RESULTS}")


if __name__ == "__main__":
    main()
