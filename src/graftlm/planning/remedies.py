"""What one change would make possible what a plan turned down."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from graftlm.core.errors import GraftError
from graftlm.planning.amounts import in_gib
from graftlm.planning.cost import HOUR
from graftlm.planning.fitting import BATCH, USABLE, Situation, TooLarge, fitted_run
from graftlm.planning.gpus import GIB, GPUS
from graftlm.planning.limits import is_whole
from graftlm.planning.looked import Looked
from graftlm.planning.option import Rejected
from graftlm.planning.written import changed, is_written

_PACKED_STATE = "adamw_8bit"
_SHORTEST = 128
"""Tokens: rows cut further rarely hold an answer."""


def turned_down(
    refused: Sequence[tuple[Looked, str]], kept: Sequence[Looked], situation: Situation
) -> tuple[Rejected, ...]:
    """The refused candidates with why, and with the one change that helps. Where nothing at all is possible,
    the nearest to it come first."""
    together: dict[tuple[str, str], list[Looked]] = {}
    for each, limit in refused:
        together.setdefault((limit, remedy(each, kept, situation)), []).append(each)
    found = [
        Rejected(", ".join(each.candidate.label for each in group), f"{limit[:1].upper()}{limit[1:]}.", help,
                 group[0].peak if isinstance(group[0].outcome, TooLarge) else None)
        for (limit, help), group in together.items()
    ]  # fmt: skip
    return tuple(found if kept else sorted(found, key=lambda item: item.needed_bytes or 0))


def remedy(each: Looked, kept: Sequence[Looked], situation: Situation) -> str:
    """The one change that would make a candidate possible, as somebody types or does it; empty where there is
    none."""
    if isinstance(each.outcome, GraftError):
        return each.outcome.fix
    if isinstance(each.outcome, TooLarge):
        return next(_smaller(each, each.outcome, kept, situation))
    wanted = situation.requirements
    if (wanted.is_latency_critical and not each.candidate.standing.merges) or (
        wanted.tasks > 1 and is_whole(each)
    ):
        return "--method lora"
    return _shorter(each, situation)


def _smaller(each: Looked, least: TooLarge, kept: Sequence[Looked], situation: Situation) -> Iterator[str]:
    """Changes that make it fit, the gentlest first. The last one always does."""
    candidate, recipe = each.candidate, each.candidate.recipe
    alike = [other for other in kept if other.candidate.name == candidate.name]
    for other in sorted(alike, key=lambda other: _changed_places(other, each).count("--set")):
        yield f"{_changed_places(other, each)} ({in_gib(other.run.memory.peak)})"
    if (
        any(is_written(recipe, f"train.{name}") for name in BATCH)
        and least.effective.train.per_device_train_batch_size > 1
    ):
        rows = math.prod(getattr(least.effective.train, name) for name in BATCH)
        single = changed(recipe, {"train": dict(zip(BATCH, (1, rows), strict=True))})
        if not isinstance(fitted_run(single, situation, each.trainable), TooLarge):
            yield f"--set train.{BATCH[0]}=1 --set train.{BATCH[1]}={rows}"
    if not is_written(recipe, "train.optim"):
        packed = changed(recipe, {"train": {"optim": _PACKED_STATE}})
        if not isinstance(found := fitted_run(packed, situation, each.trainable), TooLarge):
            yield f"--set train.optim={_PACKED_STATE} ({in_gib(found.memory.peak)})"
    length = least.effective.data.max_length // 2
    while length >= _SHORTEST:
        shorter = changed(recipe, {"data": {"max_length": length}})
        if not isinstance(found := fitted_run(shorter, situation, each.trainable), TooLarge):
            cut = sum(tokens > length for tokens in situation.rows.train) / max(1, len(situation.rows.train))
            lost = f"; cuts {100 * cut:.0f} % of the rows" if cut else ""
            yield f"--set data.max_length={length} ({in_gib(found.memory.peak)}{lost})"
            break
        length //= 2
    if candidate.name == "full" and kept:
        yield "--method lora"
    yield f"{_memory(least.memory.peak, situation)}, or a smaller base"


def _changed_places(other: Looked, each: Looked) -> str:
    """What another storage or placement of the base is asked for by."""
    wanted, now = other.candidate.recipe.model, each.candidate.recipe.model
    fields = {
        "quantization": (other.candidate.storage, each.candidate.storage),
        "placement": (wanted.placement, now.placement),
    }
    return " ".join(f"--set model.{name}={new}" for name, (new, old) in fields.items() if new != old)


def _memory(peak: int, situation: Situation) -> str:
    """A machine that is large enough."""
    needed = peak / USABLE
    if situation.machine.device == "cpu":
        return f"a machine with {in_gib(needed)} of memory"
    fitting = [card for card in GPUS.values() if card.gib * GIB >= needed]
    card = min(fitting, key=lambda card: card.gib, default=None)
    named = f", {card.name} for instance" if card else ""
    return f"a GPU with {in_gib(needed)}{named}"


def _shorter(each: Looked, situation: Situation) -> str:
    """Fewer steps, as many as time and money allow."""
    wanted, time = situation.requirements, each.run.time
    allowed = [] if wanted.deadline_seconds is None else [wanted.deadline_seconds]
    if wanted.budget is not None and situation.machine.price_per_hour:
        allowed.append(wanted.budget / situation.machine.price_per_hour * HOUR)
    steps = each.run.workload.steps
    training = sum(part.amount for part in time.parts if part.name == "steps")
    rest = time.seconds - training
    possible = int((min(allowed) - rest) / (training / steps)) if allowed and training else 0
    if possible < 1:
        return "a faster machine: all but the steps alone takes longer"
    whole = each.run.effective.train.num_train_epochs
    epochs = f"{whole * possible / steps:.1f} epochs instead of {whole:g}"
    return f"--set train.max_steps={min(possible, steps)} ({epochs})"
