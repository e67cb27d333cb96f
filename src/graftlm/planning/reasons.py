"""Why an option stands where it stands, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from graftlm.methods.lora import LoraConfig
from graftlm.planning.amounts import in_count, in_gib, in_time
from graftlm.planning.cost import cost
from graftlm.planning.fitting import BATCH, Situation, TooLarge
from graftlm.planning.looked import Looked
from graftlm.planning.quality import STORAGE_LOSS
from graftlm.planning.requirements import FEW_EXAMPLES

TIGHT = 0.9
"""Share of a limit from which an option is called tight."""
BITS_PER_PARAMETER, BITS_PER_TOKEN = 2.0, 1.0
"""What an adapter keeps and what an answer token brings (Schulman et al. 2025; Allen-Zhu and Li 2024)."""

BYTES = 4
"""Of a trained number in an adapter's file."""

_RECOMPUTED = {
    "cheap": "norms and gates",
    "feed_forward": "the feed-forward parts",
    "everything": "whole layers",
    "offload": "whole layers, from inputs kept in host memory",
}


def reasons(
    each: Looked, first: Looked, all_of_them: Sequence[Looked], situation: Situation
) -> tuple[str, ...]:
    """What speaks for and against one option, the most important first."""
    return tuple(
        f"{text[:1].upper()}{text[1:]}."
        for part in (
            [each.candidate.standing.why],
            _streamed(each, situation),
            _storage(each, all_of_them, situation),
            _fit(each, situation),
            _wanted(each, situation),
            _capacity(each, situation),
            _against(each, first),
        )
        for text in part
    )


def _storage(each: Looked, all_of_them: Sequence[Looked], situation: Situation) -> Iterator[str]:
    storage = each.candidate.storage
    if storage == "none":
        if situation.facts.stored_quantised is None and each.candidate.recipe.model.placement == "resident":
            yield "the base fits as it is stored, so nothing is lost to quantisation"
        return
    dense = next((o for o in all_of_them if o.candidate.name == each.candidate.name
                  and o.candidate.storage == "none"), None)  # fmt: skip
    if dense is not None and isinstance(dense.outcome, TooLarge):
        yield (
            f"with the base as it is stored the run would need {in_gib(dense.outcome.memory.peak)}; "
            f"in {storage} it takes {in_gib(each.run.memory.peak)}"
        )
    if loss := STORAGE_LOSS.get(storage):
        yield loss


def _streamed(each: Looked, situation: Situation) -> Iterator[str]:
    placement = each.candidate.recipe.model.placement
    if placement != "resident":
        where = "the machine's own memory" if placement == "host" else "the checkpoint's files"
        yield f"nothing fits as a whole: layers are brought from {where} in every pass, which takes time"
        if placement == "host" and situation.machine.device == "cuda":
            yield "the machine must hold the base in its own memory"


def _fit(each: Looked, situation: Situation) -> Iterator[str]:
    run = each.run
    usual = situation.rows.effective(each.candidate.recipe, situation.facts)
    size, passes = (getattr(run.effective.train, name) for name in BATCH)
    if size != getattr(usual.train, BATCH[0]):
        what = "window" if run.effective.data.packing else "row"
        yield (
            f"{size} {what}{'s' * (size > 1)} at a time, {passes} times, is the quickest way that fits; "
            f"a step has {size * passes} as ever"
        )
    if run.recompute != "nothing":
        yield f"backward computes {_RECOMPUTED[run.recompute]} again, since not all of it can be kept"
    share = run.memory.peak / situation.machine.memory_bytes
    if share > TIGHT:
        yield f"it is tight: {100 * share:.0f} % of the memory at the worst moment ({run.memory.worst.name})"


def _wanted(each: Looked, situation: Situation) -> Iterator[str]:
    wanted, seconds = situation.requirements, each.run.time.seconds
    if wanted.is_latency_critical:
        yield "it can be merged into the base, so that an answer takes no longer"
    if wanted.tasks > 1:
        size = wanted.tasks * BYTES * each.trainable
        yield f"{wanted.tasks} adapters of this size take {in_gib(size)} beside one base"
        if wanted.is_latency_critical:
            yield "merged, each task needs a base of its own; unmerged they share one and cost a little time"
    if wanted.deadline_seconds is not None:
        tight = ", which is tight" if seconds > TIGHT * wanted.deadline_seconds else ""
        yield f"it takes {in_time(seconds)} of {in_time(wanted.deadline_seconds)}{tight}"
    price = cost(seconds, situation.machine)
    if wanted.budget is not None and price is not None:
        yield f"it costs {price:.2f} of {wanted.budget:.2f}"


def _capacity(each: Looked, situation: Situation) -> Iterator[str]:
    if not isinstance(each.candidate.recipe.method.config, LoraConfig):
        return
    rows = situation.rows
    holds = BITS_PER_PARAMETER / BITS_PER_TOKEN * each.trainable
    if sum(rows.targets) > holds:
        yield (
            f"its {in_count(each.trainable)} numbers hold about {in_count(holds)} answer tokens, and the "
            f"data "
            f"have {in_count(sum(rows.targets))}: a higher rank may gain"
        )


def _against(each: Looked, first: Looked) -> Iterator[str]:
    if each is first:
        return
    time = each.run.time.seconds / first.run.time.seconds - 1
    memory = each.run.memory.peak / first.run.memory.peak - 1
    yield f"against the first option: time {100 * time:+.0f} %, memory {100 * memory:+.0f} %"


def notes(situation: Situation) -> tuple[str, ...]:
    """Where the figures come from, and what they leave out."""
    rows, found = situation.rows, list[str]()
    if not rows.is_counted:
        found.append("Tokens were estimated from characters: there is no tokenizer at hand.")
    if len(rows.train) < FEW_EXAMPLES:
        found.append(
            f"{len(rows.train):,} training rows are few: methods will differ less than their results vary "
            f"by chance."
        )
    return (*found, *situation.machine.notes)
