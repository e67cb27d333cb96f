"""What a run took in memory, from its log and from the phases that end after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graftlm.evaluation.report_data import MemoryClass, MemoryFacts, MemoryPeak
from graftlm.training.memory_phases import MemoryPhases, PhasePeak, highest


def memory_facts(events: Sequence[Mapping[str, Any]], phases: MemoryPhases) -> MemoryFacts:
    """The classes of tensors as last counted, and the peak of each phase in any process of the run."""
    logged = [event for event in events if event["kind"] == "memory"]
    tables = [[PhasePeak(**peak) for peak in event["phases"]] for event in logged if "phases" in event]
    peaks = highest([phases.peaks(), *tables])
    counted = [event["classes"] for event in logged if "classes" in event]
    return MemoryFacts(
        classes=tuple(
            MemoryClass(item["name"], item["parameters"], item["bytes"]) for item in (counted or [[]])[-1]
        ),
        peaks=tuple(MemoryPeak(peak.phase, peak.resident, peak.allocated, peak.reserved) for peak in peaks),
        is_exact=phases.is_exact,
    )
