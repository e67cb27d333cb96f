"""What every method must do, by name: one check each, and what is checked where a method cannot do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from graftlm.testing import folders, learning, merging, running, state, together
from graftlm.testing.case import Case

Check = Callable[[Case], None]
"""Raises AssertionError, in words, where the property does not hold."""
Outcome = Literal["holds", "refused", "absent"]
"""`refused`: the method does not have the property, and does what it must do instead. `absent`: there is
nothing to check, for a reason."""


def _none(case: Case) -> str:
    return ""


@dataclass(frozen=True)
class Property:
    """One thing that a method does on every model."""

    check: Check
    exception: Callable[[Case], str] = _none
    """Reads off the method or the model why the property does not apply; "" if it does."""
    otherwise: Check | None = None
    """What is checked where the property does not apply."""

    @property
    def description(self) -> str:
        """The property in a sentence or two."""
        return " ".join((self.check.__doc__ or "").split())


PROPERTIES: Mapping[str, Property] = {
    "acts": Property(state.acts),
    "identity": Property(state.identity, otherwise=state.no_identity),
    "planned": Property(state.planned),
    "starts_from_base": Property(state.starts_from_base),
    "trains_alone": Property(learning.trains_alone),
    "disabled": Property(state.disabled),
    "contexts": Property(state.contexts),
    "saved": Property(folders.saved),
    "refuses_damage": Property(folders.refuses_damage),
    "to_peft": Property(folders.to_peft, folders.without_peft, folders.unknown_to_peft),
    "from_peft": Property(folders.from_peft, folders.without_peft),
    "merge": Property(merging.merge, merging.not_mergeable, merging.merge_refused),
    "merged_beside": Property(merging.merged_beside, merging.not_mergeable),
    "unmerge_exact": Property(merging.unmerge_exact, merging.not_mergeable),
    "detach": Property(state.detach),
    "deepcopy": Property(state.deepcopy),
    "to_dtype": Property(state.to_dtype),
    "master_weights": Property(state.master_weights),
    "checkpointing": Property(learning.checkpointing),
    "checkpointing_reentrant": Property(
        learning.checkpointing_reentrant, otherwise=learning.reentrant_refused
    ),
    "resumes": Property(learning.resumes),
    "several": Property(together.several),
    "summed": Property(together.summed, together.without_sites),
    "joined": Property(together.joined, together.without_virtual_tokens),
    "routed": Property(together.routed, otherwise=together.routing_refused),
    "routed_training": Property(together.routed_training, otherwise=together.routing_refused),
    "generates": Property(running.generates, running.no_generation),
    "generates_routed": Property(running.generates_routed, running.no_generation),
    "compiles": Property(running.compiles),
    "switches_compiled": Property(running.switches_compiled),
}


def check(name: str, case: Case) -> Outcome:
    """Check one property of one case.

    Raises:
        AssertionError: it does not hold, or what must hold instead does not.

    >>> from graftlm.methods.lora import LoraConfig
    >>> check("disabled", Case("llama", LoraConfig(r=2)))
    'holds'
    >>> check("generates", Case("bert", LoraConfig(r=2)))
    'absent'
    """
    wanted = PROPERTIES[name]
    if not why_not(name, case):
        wanted.check(case)
        return "holds"
    if wanted.otherwise is None:
        return "absent"
    wanted.otherwise(case)
    return "refused"


def why_not(name: str, case: Case) -> str:
    """Why the property does not apply to the case, declared or read off; "" if it does."""
    return case.exception(name) or PROPERTIES[name].exception(case)
