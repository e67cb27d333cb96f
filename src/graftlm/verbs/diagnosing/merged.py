"""A merged model, read back, against base + adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graftlm.core.errors import GraftError
from graftlm.diagnosis.facts.behaviour import Merged
from graftlm.formats.ending import KINDS
from graftlm.formats.fingerprint import scheme_of
from graftlm.methods.virtual.stacks import task_of
from graftlm.models.agreement import agreement, logits_on, mean_nll
from graftlm.models.load import load_model
from graftlm.verbs.diagnosing.loaded import load
from graftlm.verbs.diagnosing.subject import Subject, subject_of
from graftlm.verbs.merge import PROOF
from graftlm.verbs.merge_proof import probes_of
from graftlm.verbs.references import RECIPE


def merged_facts(subject: Subject) -> Merged | None:
    """Compare on text that the adapter writes on the base that it was trained on; None where nobody knows
    which adapter was merged.

    Raises:
        GraftError: the adapter that was named, or its base, cannot be loaded.
    """
    folder = subject.merged
    assert folder is not None
    trained = _adapter_of(folder, subject)
    if trained is None:
        return None
    loaded = load(trained)
    probes = probes_of(loaded.model, loaded.tokenizer)
    expected = logits_on(loaded.model, probes)
    with loaded.adapters.disabled():
        effect = agreement(expected, logits_on(loaded.model, probes)).mean_kl
    try:
        merged, tokenizer = load_model(str(folder))
    except GraftError as error:
        return Merged(
            str(folder), "", 0, 0.0, 0.0, None, adapter=trained.shown, is_loadable=False, why_not=error.seen
        )
    found = logits_on(merged, probes)
    same = agreement(expected, found)
    writes = task_of(loaded.model) not in KINDS
    change = mean_nll(found, probes) / mean_nll(expected, probes) - 1 if writes else None
    scheme = scheme_of(merged)
    dtype = str(next(merged.parameters()).dtype).removeprefix("torch.")
    return Merged(
        folder=str(folder),
        stored=scheme.kind if scheme else dtype,
        tokens=same.tokens,
        mean_kl=same.mean_kl,
        top1=same.top1,
        nll_change=change,
        effect_kl=effect,
        adapter=trained.shown,
        other_files=_other_files(loaded.tokenizer, tokenizer),
    )


def _adapter_of(folder: Path, subject: Subject) -> Subject | None:
    """The adapter that was named, that the proof of the merge names, or whose run the folder lies in."""
    proof = folder / PROOF
    told = json.loads(proof.read_text(encoding="utf-8")).get("adapter") if proof.is_file() else None
    inside = next((up for up in folder.absolute().parents if (up / RECIPE).is_file()), None)
    beside = Path(os.path.normpath(folder / told)) if told else inside
    if subject.depth.adapter is not None:
        return subject_of(subject.depth.adapter, base=subject.base)
    return subject_of(beside, base=subject.base) if beside is not None and beside.is_dir() else None


def _other_files(theirs: Any, ours: Any) -> tuple[str, ...]:
    """What of the tokenizer differs from that of the base."""
    looks: dict[str, Callable[[Any], Any]] = {
        "the vocabulary": lambda one: one.get_vocab(),
        "the chat template": lambda one: one.chat_template,
        "the end token": lambda one: one.eos_token_id,
        "the begin token": lambda one: one.bos_token_id,
    }
    return tuple(what for what, look in looks.items() if look(theirs) != look(ours))
