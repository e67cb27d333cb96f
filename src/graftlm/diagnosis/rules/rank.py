"""D07 and D08: the rank is too low for what is to be learnt, or higher than what was learnt."""

from __future__ import annotations

import math
from collections.abc import Sequence

from graftlm.diagnosis.commands import tune_again
from graftlm.diagnosis.confidence import confidence
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.facts.adapter import LayerChange
from graftlm.diagnosis.finding import Finding, Plot
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.run_figures import fell, losses, setting

BITS = 2.0
"""What one parameter can hold, and one trained token takes about one: tokens beyond this per parameter do not
fit."""
CERTAIN_BITS = 4 * BITS
FULL, CERTAIN_FULL = 0.5, 0.9
"""Share of layers whose change needs every direction that the rank gives."""
LEFT = 0.05
"""Part by which the loss still falls in the last third: below it more steps are no help."""
HIGH_RANK = 16
SPARE, CERTAIN_SPARE = 0.8, 1.0
"""Share of layers whose change needs less than a quarter of the rank."""
PASSES = 2.0


def _too_low(evidence: Evidence) -> Finding | None:
    layers, points = _layers(evidence), losses(evidence)
    trained, tokens = int(evidence.plan.get("trainable") or 0), _tokens_of_a_pass(evidence)
    if not layers or not evidence.is_over or trained <= 0 or len(points) < 9:
        return None
    per_parameter = tokens / trained
    full = sum(layer.effective_rank >= layer.rank for layer in layers) / len(layers)
    late = fell(points[-len(points) // 3 :])
    if per_parameter <= BITS or full <= FULL or late >= LEFT or _passes(evidence) < PASSES:
        return None
    rank = max(layer.rank for layer in layers)
    wanted = rank * 2 ** max(1, math.ceil(math.log2(per_parameter / BITS)))
    changes: dict[str, object] = {"method.r": wanted, "method.lora_alpha": 2 * wanted}
    if setting(evidence, "method", "target_modules") != "all-linear":
        changes["method.target_modules"] = "all-linear"
    return Finding(
        "D07",
        "Rank too low",
        "warning",
        round(min(confidence(per_parameter, BITS, CERTAIN_BITS), confidence(full, FULL, CERTAIN_FULL)), 2),
        f"{trained:,} parameters at rank {rank} were given {tokens:,} tokens to learn, {per_parameter:.1f} "
        "for each; "
        f"{100 * full:.0f} % of the layers use every direction they have, and the loss has stopped falling.",
        "A parameter of an adapter holds about two bits and a token takes about one: beyond that an adapter "
        "cannot "
        "follow its data, however long it is trained.",
        f"Take rank {wanted} on all linear layers.",
        tune_again("D07", changes),
        {"tokens_per_parameter": per_parameter, "full": full, "late_fall": late, "rank": rank},
        _spectra(layers, rank),
    )


def _too_high(evidence: Evidence) -> Finding | None:
    layers = _layers(evidence)
    if not layers or (evidence.recipe and not evidence.is_over):
        return None
    rank = max(layer.rank for layer in layers)
    spare = sum(layer.effective_rank < layer.rank / 4 for layer in layers) / len(layers)
    if rank < HIGH_RANK or spare <= SPARE:
        return None
    needed = max(layer.effective_rank for layer in layers)
    enough = min(rank // 2, 2 ** math.ceil(math.log2(max(needed, 1))))
    return Finding(
        "D08",
        "Rank higher than needed",
        "note",
        confidence(spare, SPARE, CERTAIN_SPARE),
        f"{100 * spare:.0f} % of the layers hold 99 % of their change in less than a quarter of the {rank} "
        "directions "
        f"they have; the fullest needs {needed}.",
        "The adapter is right, but larger than it has to be: in memory, on disk, and wherever it is served.",
        f"Cut it to rank {enough}, without training again; train the next one with r={enough}.",
        f"graft combine RUN:1 --how svd --rank {enough} --out RUN-d08",
        {"spare": spare, "rank": rank, "needed": needed},
        _spectra(layers, enough),
    )


def _layers(evidence: Evidence) -> list[LayerChange]:
    found = evidence.adapter.layers if evidence.adapter is not None else None
    return [layer for layer in found or () if not layer.is_zero]


def _tokens_of_a_pass(evidence: Evidence) -> int:
    """Target tokens of one pass over the data."""
    steps, passes = evidence.series("step", "target_tokens"), _passes(evidence)
    return round(sum(tokens for _, tokens in steps) / passes) if passes > 0 else 0


def _passes(evidence: Evidence) -> float:
    epochs = evidence.series("step", "epoch")
    return epochs[-1][1] if epochs else 0.0


def _spectra(layers: Sequence[LayerChange], cut: int) -> Plot:
    """What is lost of the change by keeping so many directions, in the middle layer and the fullest one."""
    ordered = sorted(layers, key=lambda layer: layer.effective_rank)
    shown = {"middle layer": ordered[len(ordered) // 2], "fullest layer": ordered[-1]}
    lines = {
        name: tuple((float(kept), layer.tail(kept)) for kept in range(layer.rank + 1))
        for name, layer in shown.items()
    }
    return Plot(
        f"Share of the change beyond the first directions (rank {cut} keeps what is left of it)",
        "directions",
        "share lost",
        lines,
        0.01,
    )


TOO_LOW = Rule(
    "D07",
    "Rank too low",
    _too_low,
    "Capacity: LoRA Without Regret (2025), 2 bits per parameter and 1 bit per token. That the change fills "
    "the rank "
    "and the loss stands: our own runs; stable ranks stay near 2 at every rank and say nothing.",
)
TOO_HIGH = Rule(
    "D08",
    "Rank higher than needed",
    _too_high,
    "99 % of the energy in a quarter of the rank: proposal, our own runs.",
)
