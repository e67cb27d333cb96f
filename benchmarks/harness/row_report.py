"""What a row of a comparison shows and keeps."""

from __future__ import annotations

from typing import Any

from harness.results import joined
from harness.row import Outcome, above, speed
from harness.sides.registry import GRAFT
from harness.table import markdown, spread


def table(found: Outcome) -> str:
    """Markdown: medians over the rounds of every side."""
    heads = (
        "side",
        "tokens/s",
        "MFU",
        "MB above weights",
        "peak MB",
        "first step s",
        "agrees with the reference",
    )
    lines: list[tuple[object, ...]] = []
    for side in found.row.sides:
        runs = found.of(side)
        if not runs:
            why = next((run.failed for run in found.runs if run.side == side), "not run")
            lines.append((side, why, "", "", "", "", ""))
            continue
        peak = found.median(side, lambda run: run.reserved or run.peak_training)
        worst = max((found.verdict(run) for run in runs), key=lambda verdict: (verdict.is_void, verdict.loss))
        lines.append((
            side,
            f"{found.median(side, speed):,.0f}",
            f"{100 * found.median(side, found.utilisation):.0f} %",
            f"{found.median(side, above) / 1e6:,.0f}",
            f"{peak / 1e6:,.0f}",
            f"{found.median(side, lambda run: run.first_step):.1f}",
            "computes something else" if side in found.row.beside else str(worst),
        ))  # fmt: skip
    return markdown(heads, lines)


def findings(found: Outcome) -> str:
    """Ours against the best peer, with what is wanted."""
    row = found.row
    lines = [
        f"- {found.rate.matrix / 1e12:.2f} TFLOP/s in matrix products, "
        f"{found.rate.copy / 1e9:.0f} GB/s in copies"
    ]
    for run in found.of(GRAFT)[:1]:
        lines.append(f"- ours: {run.note}")
    for what, value, most, wanted, sign in (
        ("tokens/s", speed, True, row.speed, "at least"),
        ("memory above the weights", above, False, row.memory, "at most"),
    ):
        best = found.best(value, most=most)
        ratios = found.ratios(best, value) if best else []
        if ratios:
            target = f"; wanted: {sign} {wanted:g}" if wanted else ""
            lines.append(f"- {what}, {GRAFT} / {best}: {spread(ratios)}{target}")
    for side in row.beside if row.peers else ():
        ratios = found.ratios(side, speed)
        lines += [f"- tokens/s, {GRAFT} / {side}: {spread(ratios)}"] if ratios else []
    if any(found.verdict(run).is_void for run in found.of(GRAFT)):
        lines.append("- **void**: ours does not agree with the reference")
    return "\n".join(lines)


def records(found: Outcome) -> list[dict[str, Any]]:
    """One line of a results file for every run."""
    case = found.row.case
    lines = []
    for run in found.runs:
        verdict = found.verdict(run)
        good = not run.failed
        lines.append({
            "row": case.row, "side": run.side, "round": run.round,
            "shape": case.shape, "method": case.method, "rank": case.rank, "quantization": case.quantization,
            "rows": case.rows, "length": case.length, "data": case.data, "adapters": case.adapters,
            "recompute": case.recompute, "device": case.device, "without": " ".join(case.without),
            "tokens_per_second": round(run.tokens_per_second, 1) if good else "",
            "mfu": round(found.utilisation(run), 4) if good else "",
            "above_weights": run.above_weights if good else "", "peak": run.peak,
            "peak_training": run.peak_training, "imports": run.imports,
            "weights": run.weights, "loaded": run.loaded,
            "allocated": run.allocated, "reserved": run.reserved, "first_step": round(run.first_step, 3),
            "flops_per_step": f"{found.flops:.6g}", "matrix_rate": f"{found.rate.matrix:.6g}",
            "copy_rate": f"{found.rate.copy:.6g}",
            "agreement": run.failed or ("" if run.side in found.row.beside else str(verdict)),
            "note": run.note, "seconds": joined(run.seconds), "processor": joined(run.processor),
            "tokens": " ".join(map(str, run.tokens)),
            "losses": joined(run.losses), "norms": joined(run.norms),
        })  # fmt: skip
    return lines
