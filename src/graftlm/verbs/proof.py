"""Two proofs at the end of a run: the saved file is the trained adapter, and it survives a merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graftlm.core.errors import MergeError
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.merge_in_passing import merged_in_passing
from graftlm.models.agreement import Agreement, agreement, logits_on
from graftlm.models.streaming.streamed import streaming_of
from graftlm.quant.convert import is_quantised

RELOADED = "reloaded-to-compare"
BASE, DEQUANTISED = "the base", "the dequantised base"
MOST_LOGITS = 2**25
"""Values that the logits of all probes come to, at most: 128 MiB in float32."""
PROBES_MERGED_IN_PASSING = 4
"""Every layer is decoded and merged anew for each probe of a quantised base."""


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
    merged_into: str = BASE
    """What the adapter was merged into."""

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
        into = "" if self.merged_into == BASE else f" into {self.merged_into}"
        merge = f"merge{into} verified" if self.merge.is_same_model else f"MERGE{into} DIFFERS"
        return f"{reload}, {merge} ({self.merge}), {unmerge}"


def prove(model: nn.Module, adapters: AdapterSet, saved: Path, probes: Sequence[Sequence[int]]) -> Proof:
    """Compare the live adapter with its file and with a merge; model and adapters are left as they were.

    A quantised base is merged as `graft merge` does it, into its dequantised weights, one layer at a time.
    """
    probes = within(probes, vocabulary_of_model(model))
    trained = logits_on(model, probes)
    adapters.load(saved, RELOADED)
    with adapters.activated(RELOADED):
        is_reload_exact = _equal(trained, logits_on(model, probes))
    adapters.delete(RELOADED)
    with adapters.disabled():
        base = logits_on(model, probes)
    into = DEQUANTISED if is_quantised(model) else BASE
    try:
        merged = _merged(model, adapters, probes, into)
    except MergeError as refused:
        return Proof(is_reload_exact, None, True, f"{refused.seen} {refused.meaning}".strip())
    found = agreement(trained[: len(merged)], merged)
    del trained, merged  # logits of a large vocabulary take more than an adapter
    with adapters.disabled():
        unmerged = logits_on(model, probes)
    return Proof(is_reload_exact, found, _equal(base, unmerged), merged_into=into)


def within(probes: Sequence[Sequence[int]], vocabulary: int) -> list[Sequence[int]]:
    """The probes, cut so that the logits of all of them are no more than `MOST_LOGITS`.

    >>> within([[1, 2, 3], [4]], MOST_LOGITS // 4)
    [[1, 2], [4]]
    """
    longest = max(2, MOST_LOGITS // max(1, vocabulary) // max(1, len(probes)))
    return [probe[:longest] for probe in probes]


def vocabulary_of_model(model: Any) -> int:
    """How many logits it gives for a token or a row, at most."""
    return int(getattr(model.config.get_text_config(), "vocab_size", 1))


def _merged(
    model: nn.Module, adapters: AdapterSet, probes: Sequence[Sequence[int]], into: str
) -> list[torch.Tensor]:
    """What the merged model says to the probes, or to the first of them; it is unmerged again."""
    if into == DEQUANTISED or streaming_of(model) is not None:  # merged as a whole, it would not fit
        with merged_in_passing(adapters):
            return logits_on(model, probes[:PROBES_MERGED_IN_PASSING])
    adapters.merge()
    try:
        return logits_on(model, probes)
    finally:
        adapters.unmerge()


def _equal(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
