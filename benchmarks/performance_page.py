"""Write the tables of docs/results/performance.md from the results files.

    python benchmarks/performance_page.py            rewrite what stands between the page's markers
    python benchmarks/performance_page.py --check    only say whether the page is as the results have it

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; all else on the page is written by hand. Of
every row the latest run counts. Rows that were not measured say so.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import growth
import long_context
from harness import results
from harness.kept import KeptRow, latest_rows
from harness.page import write_page
from harness.parts import PARTS
from harness.plot import FIGURES, draw_bars
from harness.results import FOLDER
from harness.sides.registry import GRAFT, GRAFT_LORA
from harness.table import markdown, spread

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results" / "performance.md"
NOT_MEASURED = "not measured"
LORA_ROWS = ("lora-512", "lora-512-compiled", "lora-1024", "lora-2048", "lora-0.13b", "lora-0.5b")
COLUMNS = ("tokens_per_second", "mfu", "above_weights", "peak_training", "first_step")
METHOD_ROWS = ("ia3", "prefix", "bottleneck")
GPU_ROWS = {
    "gpu-lora-8b": ("LoRA, Llama 3.1 8B, bfloat16", "18,000 tokens/s", "lora_8b.py"),
    "gpu-qlora-8b": ("QLoRA, Llama 3.1 8B, NF4", "17,000 tokens/s", "qlora_8b.py"),
    "gpu-lora-8b-fp8": ("LoRA, Llama 3.1 8B, products in FP8", "26,000 tokens/s", "fp8_8b.py"),
    "gpu-lora-0.6b": ("LoRA, Qwen3 0.6B, bfloat16", "120,000 tokens/s", "lora_0_6b.py"),
    "gpu-lora-1.7b": ("LoRA, Qwen3 1.7B, bfloat16", "60,000 tokens/s", "lora_1_7b.py"),
    "gpu-qlora-70b": ("QLoRA, Llama 3 70B, NF4", "2,200 tokens/s", "qlora_70b.py"),
    "gpu-qlora-memory-8b": ("QLoRA, 8B, one row of 2,048: memory", "6.5 GiB", "qlora_memory_8b.py"),
    "gpu-context-8b": ("QLoRA, 8B, longest row", "400,000 tokens on 80 GB", "context_8b.py"),
    "gpu-dora-8b": ("DoRA, 8B, beside our LoRA", "at most 5 % slower", "dora_8b.py"),
}
"""What each row is, what is wanted on one H200, and the script in benchmarks/gpu."""


def must_show() -> str:
    """What is wanted on a CPU, and what was measured."""
    rows = latest_rows(FOLDER / "tuning.csv")
    lora = [rows[name] for name in LORA_ROWS if name in rows]
    speeds = [ratio for row in lora if (ratio := row.ratio_to_best("tokens_per_second", most=True))]
    memory = [ratio for row in lora if (ratio := row.ratio_to_best("above_weights", most=False))]
    used = [row.median(GRAFT, "mfu") for row in lora if row.of(GRAFT)]
    lines = [
        ("LoRA, tokens/s over PEFT's fastest way", "at least 2 (aim: 3)", _range(speeds), _met(speeds, 2)),
        ("LoRA, memory above the weights", "at most 0.5 of PEFT's", _range(memory), _met(memory, most=0.5)),
        ("LoRA, FLOP utilisation", "at least 40 % (aim: 60 %)", _range(used, percent=True), _met(used, 0.4)),
    ]
    for name, what, wanted in (
        ("instructions", "role play, a third padding: real tokens/s over TRL's fastest way", 4.0),
        ("instructions-mixed", "mixed tasks, two thirds padding: the same", 4.0),
        ("dora", "DoRA, tokens/s over the best of PEFT's ways", 3.0),
        ("qlora", "QLoRA, tokens/s over the best of PEFT + bitsandbytes", 2.0),
    ):
        ratio = rows[name].ratio_to_best("tokens_per_second", most=True) if name in rows else None
        found = [ratio] if ratio else []
        lines.append((what, f"at least {wanted:g}", _range(found), _met(found, wanted)))
    for name in METHOD_ROWS:
        slower = rows[name].ratio(GRAFT_LORA, GRAFT, "tokens_per_second") if name in rows else None
        found = [slower] if slower else []
        lines.append(
            (f"{name}: step time over our LoRA's", "at most 1.15", _range(found), _met(found, most=1.15))
        )
    return markdown(("what", "wanted", "measured", ""), lines)


def tuning() -> str:
    """Every row with all its sides."""
    parts = []
    for name, row in latest_rows(FOLDER / "tuning.csv").items():
        lines = [(side, *row.cells(side, COLUMNS), row.agreement(side)) for side in row.sides]
        heads = ("side", "tokens/s", "MFU", "MB above weights", "peak MB", "first step s", "agrees")
        parts.append(f"### {name}: {row.what}\n\n{markdown(heads, lines)}")
    return "\n\n".join(parts) or NOT_MEASURED


def environment() -> str:
    """Where the tuning rows were measured."""
    rows = latest_rows(FOLDER / "tuning.csv").values()
    seen = {}
    for row in rows:
        first = row.first
        rates = (
            f"{float(first['matrix_rate']) / 1e12:.2f} TFLOP/s, {float(first['copy_rate']) / 1e9:.0f} GB/s"
        )
        seen[first["command"]] = (
            f"- {first['machine']}; {first['versions']}; {first['date']} UTC; {rates}; "
            + (f"`{first['command']}`")
        )
    return "\n".join(seen.values()) or NOT_MEASURED


def levers() -> str:
    """What a step gains by each of our parts, while the others are in place."""
    return _ways("all levers", lambda way: way.startswith(("all", "with", "none")))


def policies() -> str:
    """What recomputation costs and saves."""
    return _ways("nothing", lambda way: way in ("nothing", "cheap", "feed_forward", "everything"))


def _ways(first: str, wanted: Callable[[str], bool]) -> str:
    rows = [row for row in results.read(FOLDER / "levers.csv") if wanted(row["way"])]
    newest = max((row["date"] for row in rows), default="")
    rows = [row for row in rows if row["date"] == newest]
    reference = [row for row in rows if row["way"] == first]
    lines = []
    for way in dict.fromkeys(row["way"] for row in rows):
        pairs = [(row, other) for row in rows for other in reference
                 if row["way"] == way and row["round"] == other["round"]]  # fmt: skip
        if pairs:
            lines.append((
                way,
                spread([float(row["tokens_per_second"]) for row, _ in pairs], "{:,.0f}"),
                spread([float(b["tokens_per_second"]) / float(a["tokens_per_second"]) for a, b in pairs]),
                spread([float(row["above_weights"]) / 1e6 for row, _ in pairs], "{:,.0f}"),
            ))  # fmt: skip
    heads = ("way", "tokens/s", f"speed of '{first}' over it", "MB above weights")
    return markdown(heads, lines) if lines else NOT_MEASURED


def profile() -> str:
    """Where the time goes, ours and a peer's, with the floor."""
    rows = results.read(FOLDER / "step_profile.csv")
    if not rows:
        return NOT_MEASURED
    newest = {row["side"]: row["date"] for row in rows}
    found = {(row["side"], row["part"]): row for row in rows if row["date"] == newest[row["side"]]}
    lines: list[tuple[object, ...]] = []
    for part in PARTS:
        mine = [found[side, part] for side in newest]
        cells = [f"{1e3 * float(row['seconds']):,.0f}" for row in mine]
        lines.append((part, *cells, f"{1e3 * float(mine[0]['floor']):,.0f}"))
    walls = [f"**{1e3 * float(found[side, PARTS[0]]['wall']):,.0f}**" for side in newest]
    floor = sum(float(found[next(iter(newest)), part]["floor"]) for part in PARTS)
    lines.append(("**the step**", *walls, f"**{1e3 * floor:,.0f}**"))
    return markdown(("ms in", *newest, "floor"), lines)


def growing() -> str:
    """The fits of the growth curves."""
    rows = growth.latest(results.read(growth.RESULTS))
    if not rows:
        return NOT_MEASURED
    growth.draw(rows)
    drawn = [name for name in growth.CURVES if (FIGURES / f"growth-{name}.svg").is_file()]
    return "\n".join([growth.fits(rows), "", *(f"![{name}](figures/growth-{name}.svg)" for name in drawn)])


def long_rows() -> str:
    """Memory and time of one long row."""
    rows = results.read_as(long_context.Row, long_context.RESULTS)
    return long_context.table(rows) if rows else NOT_MEASURED


def on_disk() -> str:
    """A base on disk beside the same base in memory."""
    lines = [
        (row["stored"], row["layers"], row["mode"], f"{float(row['peak']) / 1e6:,.0f}",
         f"{float(row['tokens_per_second']):,.0f}", row["values"][:8])
        for row in results.read(FOLDER / "streamed.csv")
    ]  # fmt: skip
    heads = ("stored as", "layers", "base", "MB above the imports", "tokens/s", "values (start of SHA-256)")
    return markdown(heads, lines) if lines else NOT_MEASURED


def gpu() -> str:
    """The rows for one GPU."""
    rows, lines = latest_rows(FOLDER / "gpu.csv"), []
    for name, (what, wanted, script) in GPU_ROWS.items():
        row = rows.get(name)
        if row is None:
            lines.append((what, wanted, NOT_MEASURED, "", f"`benchmarks/gpu/{script}`"))
            continue
        best = row.best("tokens_per_second", most=True)
        mine, peer = (_gpu_cell(row, side) if side else "" for side in (GRAFT, best))
        lines.append((what, wanted, mine, f"{best}: {peer}" if best else "", row.first["machine"]))
    return markdown(("row", "wanted", "ours", "best peer", "where"), lines)


def _gpu_cell(row: KeptRow, side: str) -> str:
    if not row.of(side):
        return row.agreement(side)
    longest = max(int(each["length"]) for each in row.of(side))
    peak = max(int(each["allocated"]) for each in row.of(side)) / 2**30
    return f"{row.median(side, 'tokens_per_second'):,.0f} tokens/s, {peak:.1f} GiB, rows of {longest:,}"


def figures() -> str:
    """Bars of every CPU row."""
    rows = latest_rows(FOLDER / "tuning.csv")
    groups = {
        name: {side: row.median(side, "tokens_per_second") for side in row.sides if row.of(side)}
        for name, row in rows.items()
    }
    if not groups or not draw_bars(FIGURES / "tuning.svg", "tokens/s on a CPU", groups):
        return NOT_MEASURED
    return "![tokens/s of every side](figures/tuning.svg)"


def _range(values: list[float], *, percent: bool = False) -> str:
    if not values:
        return NOT_MEASURED
    shown = [f"{100 * value:.0f} %" if percent else f"{value:.2f}" for value in (min(values), max(values))]
    return shown[0] if shown[0] == shown[1] else f"{shown[0]} to {shown[1]}"


def _met(values: list[float], least: float | None = None, *, most: float | None = None) -> str:
    if not values:
        return ""
    good = [(least is None or value >= least) and (most is None or value <= most) for value in values]
    return "met" if all(good) else f"met in {sum(good)} of {len(good)} rows" if any(good) else "missed"


TABLES: dict[str, Callable[[], str]] = {
    "environment": environment,
    "must-show": must_show,
    "figures": figures,
    "tuning": tuning,
    "levers": levers,
    "policies": policies,
    "profile": profile,
    "growth": growing,
    "long-context": long_rows,
    "streamed": on_disk,
    "gpu": gpu,
}


def filled(text: str) -> str:
    """The page with every table as the results have it now."""

    def replaced(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{TABLES[match[2]]()}\n\n{match[3]}"

    return re.sub(r"(<!-- table: ([\w-]+) -->)\n.*?(<!-- end -->)", replaced, text, flags=re.DOTALL)


def main() -> None:
    write_page(__doc__, PAGE, filled)


if __name__ == "__main__":
    main()
