"""What an option must keep: memory, latency, several tasks, time, money."""

from __future__ import annotations

from graftlm.core.errors import GraftError
from graftlm.methods.full import FullConfig
from graftlm.planning.amounts import in_gib, in_time
from graftlm.planning.cost import cost
from graftlm.planning.fitting import Situation, TooLarge
from graftlm.planning.looked import Looked


def broken_limit(each: Looked, situation: Situation) -> str | None:
    """The first limit that a candidate breaks, as a sentence; None where it keeps all."""
    wanted, machine = situation.requirements, situation.machine
    if isinstance(each.outcome, GraftError):
        return each.outcome.seen
    if isinstance(each.outcome, TooLarge):
        return (
            f"it needs {in_gib(each.outcome.memory.peak)} at the least ({each.outcome.memory.worst.name}), "
            f"and "
            f"{in_gib(situation.room)} of {in_gib(machine.memory_bytes)} can be planned with"
        )
    if wanted.is_latency_critical and not each.candidate.standing.merges:
        return "it cannot be merged into the base: it would add to the time of every answer"
    if wanted.tasks > 1 and is_whole(each):
        return (
            f"{wanted.tasks} tasks would need {wanted.tasks} whole models, "
            f"{in_gib(wanted.tasks * situation.facts.stored_bytes)}, and cannot share one base"
        )
    seconds = each.outcome.time.seconds
    if wanted.deadline_seconds is not None and seconds > wanted.deadline_seconds:
        return f"it takes {in_time(seconds)}, more than the {in_time(wanted.deadline_seconds)} there are"
    price = cost(seconds, machine)
    if wanted.budget is not None and price is not None and price > wanted.budget:
        return f"it costs {price:.2f}, more than the budget of {wanted.budget:.2f}"
    return None


def is_whole(each: Looked) -> bool:
    """Whether every parameter of the base is trained, so that nothing of it is shared."""
    config = each.candidate.recipe.method.config
    return isinstance(config, FullConfig) and config.parts == "all"
