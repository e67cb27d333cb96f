"""Memory and time by hand, for tests of choices: instant, and large or small exactly as a test wants."""

from __future__ import annotations

from graftlm.planning.base_facts import BaseFacts
from graftlm.planning.estimates import MemoryEstimate, Part, Phase, TimeEstimate
from graftlm.planning.fitting import Estimators
from graftlm.planning.machine import Machine, Rates
from graftlm.planning.rows import RowLengths
from graftlm.planning.sites import sites_of
from graftlm.planning.workload import Workload
from graftlm.training.recipe import Recipe

KEPT = {"nothing": 30, "cheap": 20, "feed_forward": 12, "everything": 3, "offload": 1}
"""Bytes per token and hidden value of a layer."""
SLOWER = {"nothing": 1.0, "cheap": 1.03, "feed_forward": 1.2, "everything": 1.33, "offload": 1.4}
STORED = {"none": 2.0, "int8": 1.0, "nf4": 0.52}
DECODING = {"none": 1.0, "int8": 1.05, "nf4": 1.1}


def memory(
    recipe: Recipe, facts: BaseFacts, workload: Workload, machine: Machine, *, recompute: str
) -> MemoryEstimate:
    """Weights, four times what is trained, and what is kept of the largest micro-batch."""
    trained = 16 * sites_of(facts, recipe.method.config).trainable
    kept = workload.batch_tokens * facts.layers * facts.hidden_size * KEPT[recompute]
    weights = facts.total * STORED[recipe.model.quantization]
    weights = 0.1 * weights if recipe.model.placement != "resident" else weights
    parts = (Part("weights", weights), Part("trained", trained), Part("kept", kept))
    return MemoryEstimate((Phase("load", parts[:1]), Phase("backward", parts)))


def time(
    recipe: Recipe, facts: BaseFacts, workload: Workload, machine: Machine, *, recompute: str
) -> TimeEstimate:
    """Products of base and adapter, and a little for each pass."""
    work = 4 * facts.total + 6 * sites_of(facts, recipe.method.config).trainable
    factor = SLOWER[recompute] * DECODING[recipe.model.quantization]
    tokens = workload.mean_batch_tokens * workload.micro_batches
    step = factor * work * tokens / machine.rates.matrix["bfloat16"] + 1e-4 * workload.micro_batches
    return TimeEstimate((Part("load", 5.0), Part("steps", step * workload.steps)), step)


ESTIMATORS = Estimators(memory, time)


def machine(gib: float, *, price: float | None = None) -> Machine:
    """A GPU with so much memory and round rates."""
    return Machine(
        name=f"a card with {gib:g} GiB",
        device="cuda",
        memory_bytes=round(gib * 2**30),
        host_memory_bytes=0,
        cores=8,
        instruction_sets=(),
        rates=Rates({"bfloat16": 1e14, "float32": 2e13}, 1e12, 1e-5, 1e9),
        source="this test",
        price_per_hour=price,
    )


def rows(count: int = 4000, tokens: int = 300) -> RowLengths:
    """Rows of one length, a third of it answers."""
    return RowLengths((tokens,) * count, (tokens // 3,) * count, (tokens,) * 100)
