"""The table of GPUs against published training runs: tokens per second that a plan promises, beside theirs.

    python benchmarks/planning_published.py         some seconds; nothing is trained, no GPU is needed

Nothing here was measured by us. The runs are other programs' (see `source`), recompute more or less than ours
would, and were published with part of their conditions: a ratio between a half and two says that the table is
of the right size; above one, a plan promises more than was published. Loading and measuring are not in it.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

from harness.table import markdown

from graftlm.planning.base_facts import base_facts
from graftlm.planning.gpus import gpu_named
from graftlm.planning.speed import estimate_time
from graftlm.planning.workload import Workload
from graftlm.training.recipe import make_recipe

UNSLOTH, NEMO = "surogate docs, Unsloth rows", "NVIDIA NeMo AutoModel docs"
TORCHTUNE, FMS = "torchtune README", "fms-acceleration benchmarks"


@dataclass(frozen=True)
class Published:
    """One row: LoRA of rank 16, packed."""

    base: str
    gpu: str
    quantization: str
    rows: int
    length: int
    recompute: str
    rate: float
    """Tokens per second."""
    source: str


ROWS = (
    Published("Qwen/Qwen3-8B", "h200", "none", 2, 2048, "everything", 9100, UNSLOTH),
    Published("Qwen/Qwen3-4B", "h200", "none", 2, 2048, "everything", 12800, UNSLOTH),
    Published("Qwen/Qwen3-1.7B", "h200", "none", 2, 2048, "everything", 21400, UNSLOTH),
    Published("Qwen/Qwen3-0.6B", "h200", "none", 2, 2048, "everything", 21700, UNSLOTH),
    Published("Qwen/Qwen3-8B", "h200", "nf4", 2, 2048, "everything", 8400, UNSLOTH),
    Published("Qwen/Qwen3-8B", "h100", "none", 2, 2048, "everything", 8900, UNSLOTH),
    Published("Qwen/Qwen3-14B", "h100", "none", 2, 2048, "everything", 5600, UNSLOTH),
    Published("Qwen/Qwen3-32B", "h100", "none", 2, 2048, "everything", 2600, UNSLOTH),
    Published("meta-llama/Llama-3.1-8B", "h100", "none", 2, 4096, "nothing", 12473, NEMO),
    Published("Qwen/Qwen3-8B", "b200", "none", 2, 2048, "everything", 12400, UNSLOTH),
    Published("Qwen/Qwen3-8B", "rtx5090", "none", 2, 2048, "everything", 3500, UNSLOTH),
    Published("Qwen/Qwen3-8B", "rtx5090", "nf4", 2, 2048, "everything", 3400, UNSLOTH),
    Published("meta-llama/Llama-3.1-8B", "rtx4090", "none", 2, 2048, "everything", 3083, TORCHTUNE),
    Published("meta-llama/Llama-3.1-8B", "a6000", "none", 2, 2048, "nothing", 4699, TORCHTUNE),
    Published("meta-llama/Llama-3.1-8B", "rtx4090", "nf4", 2, 2048, "everything", 2413, TORCHTUNE),
    Published("mistralai/Mistral-7B-v0.1", "a100", "none", 4, 4096, "everything", 3781, FMS),
    Published("mistralai/Mistral-7B-v0.1", "a100", "nf4", 4, 4096, "everything", 4128, FMS),
    Published("meta-llama/Llama-3.1-8B", "a100", "none", 4, 4096, "everything", 3844, FMS),
)


def promised(row: Published) -> float:
    """Tokens per second of our plan for the same work."""
    tokens = row.rows * row.length
    workload = Workload(
        train_rows=1000, held_out_rows=1, train_tokens=1000 * row.length, target_share=1.0, held_out_tokens=1,
        mean_row_tokens=row.length, batch_tokens=tokens, mean_batch_tokens=tokens, mean_document=row.length,
        micro_batches=4, steps=100, eval_steps=0, save_steps=0,
    )  # fmt: skip
    recipe = make_recipe(
        {
            "model": {"name": row.base, "quantization": row.quantization},
            "data": "rows.jsonl",
            "method": "lora",
        }
    )
    machine = replace(gpu_named(row.gpu).machine, host_memory_bytes=2**37)
    found = estimate_time(recipe, base_facts(row.base), workload, machine, recompute=row.recompute)
    return 4 * tokens / found.step_seconds


def main() -> None:
    ratios, lines = [], list[tuple[object, ...]]()
    for row in ROWS:
        rate = promised(row)
        ratios.append(rate / row.rate)
        case = f"{row.base.rpartition('/')[2]}, {row.quantization}, {row.rows} x {row.length}"
        lines.append((case, row.gpu, row.recompute, f"{row.rate:,.0f}", f"{rate:,.0f}",
                      f"{rate / row.rate:.2f}", row.source))  # fmt: skip
    heads = ("LoRA r=16", "GPU", "recomputed", "published tokens/s", "planned", "ratio", "source")
    print(markdown(heads, lines))
    print(f"\nmedian ratio {statistics.median(ratios):.2f}; not measured here")


if __name__ == "__main__":
    main()
