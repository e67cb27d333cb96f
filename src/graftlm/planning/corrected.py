"""The models of memory and time, with the corrections of earlier runs on the machine."""

from __future__ import annotations

from collections.abc import Sequence

from graftlm.planning.base_facts import BaseFacts
from graftlm.planning.estimates import MemoryEstimate, TimeEstimate
from graftlm.planning.fitting import Estimators
from graftlm.planning.history import Record, correction, kind_of_run
from graftlm.planning.kept_estimates import kept_memory
from graftlm.planning.machine import Machine
from graftlm.planning.speed import estimate_time
from graftlm.planning.workload import Workload
from graftlm.training.recipe import Recipe


def corrected_estimators(records: Sequence[Record]) -> Estimators:
    """Estimators that learn from `records`."""

    def memory(
        recipe: Recipe, facts: BaseFacts, workload: Workload, machine: Machine, *, recompute: str
    ) -> MemoryEstimate:
        known = correction(records, machine, **kind_of_run(recipe, facts))
        return known.of_memory(kept_memory(recipe, facts, workload, machine, recompute=recompute))

    def time(
        recipe: Recipe, facts: BaseFacts, workload: Workload, machine: Machine, *, recompute: str
    ) -> TimeEstimate:
        known = correction(records, machine, **kind_of_run(recipe, facts))
        return known.of_time(estimate_time(recipe, facts, workload, machine, recompute=recompute))

    return Estimators(memory, time)
