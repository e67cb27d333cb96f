"""Two proofs at the end of a run: the saved file is the trained adapter, and it survives a merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from graftlm.core.errors import MergeError
from graftlm.methods.adapter_set import AdapterSet
from graftlm.models.agreement import Agreement, agreement, logits_on

RELOADED = "reloaded-to-compare"


@dataclass(frozen=True)
class Proof:
    """What was compared on probe inputs."""

    is_reload_exact: bool
    """The adapter read back from its file gives bit-equal logits."""
    merge: Agreement | None
    """The merged model against the adapter; None where the method is no change of weights."""
    is_unmerge_exact: bool
    """After unmerging, the base gives bit-equal logits."""
    why_unmerged: str = ""
    """What the method says instead of merging."""

    @property
    def is_good(self) -> bool:
        is_merge_good = self.merge is None or self.merge.is_same_model
        return self.is_reload_exact and is_merge_good and self.is_unmerge_exact

    @property
    def summary(self) -> str:
        reload = "reload bit-equal" if self.is_reload_exact else "RELOAD DIFFERS"
        if self.merge is None:
            return f"{reload}; {self.why_unmerged}"
        unmerge = "unmerge exact" if self.is_unmerge_exact else "UNMERGE DIFFERS"
        merge = "merge verified" if self.merge.is_same_model else "MERGE DIFFERS"
        return f"{reload}, {merge} ({self.merge}), {unmerge}"


def prove(model: nn.Module, adapters: AdapterSet, saved: Path, probes: Sequence[Sequence[int]]) -> Proof:
    """Compare the live adapter with its file and with a merge; model and adapters are left as they were."""
    trained = logits_on(model, probes)
    adapters.load(saved, RELOADED)
    with adapters.activated(RELOADED):
        reloaded = logits_on(model, probes)
    adapters.delete(RELOADED)
    with adapters.disabled():
        base = logits_on(model, probes)
    try:
        adapters.merge()
    except MergeError as refused:
        return Proof(_equal(trained, reloaded), None, True, f"{refused.seen} {refused.meaning}".strip())
    merged = logits_on(model, probes)
    adapters.unmerge()
    with adapters.disabled():
        unmerged = logits_on(model, probes)
    return Proof(_equal(trained, reloaded), agreement(trained, merged), _equal(base, unmerged))


def _equal(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
