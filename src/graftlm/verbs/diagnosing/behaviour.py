"""Gathers `BehaviourFacts`: base and adapter are loaded and run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from graftlm.core.errors import DataError
from graftlm.core.notices import notice
from graftlm.core.progress import progress
from graftlm.data.sources import read_rows
from graftlm.diagnosis.facts.behaviour import BehaviourFacts, Change, Effect
from graftlm.evaluation.compare import forgetting
from graftlm.evaluation.known_text import known_from_texts, sample_known_text
from graftlm.evaluation.runner import Evaluation
from graftlm.formats.ending import KINDS
from graftlm.methods.virtual.stacks import task_of as kind_of
from graftlm.models.agreement import agreement, logits_on
from graftlm.models.encoder_decoder import is_encoder_decoder
from graftlm.tasks.measurement import KnownText, measure_known
from graftlm.verbs.diagnosing.as_change import change_of
from graftlm.verbs.diagnosing.canaries import canaries_of
from graftlm.verbs.diagnosing.loaded import Loaded, load
from graftlm.verbs.diagnosing.merged import merged_facts
from graftlm.verbs.diagnosing.rows_of_task import answer_lengths, task_loss
from graftlm.verbs.diagnosing.safety import safety_facts
from graftlm.verbs.diagnosing.seeds import seed_probe
from graftlm.verbs.diagnosing.subject import Subject
from graftlm.verbs.merge_proof import probes_of

T = TypeVar("T")
TEXTS = 32
"""Texts on which it is measured what the base still knows."""
LONGEST = 128
"""Tokens of each."""


def behaviour_facts(subject: Subject) -> BehaviourFacts | None:
    """None where there is neither an adapter nor a merged model with one.

    Raises:
        GraftError: base or adapter cannot be loaded, or a file that was named cannot be read.
    """
    if subject.merged is not None:
        merged = merged_facts(subject)
        return None if merged is None else BehaviourFacts(merged=merged)
    if subject.adapter is None:
        return None
    loaded = load(subject)
    if loaded.fit.other_base or loaded.fit.problems:
        return BehaviourFacts(fit=loaded.fit)  # of an adapter that does not fit nothing else can be said
    depth, writes = subject.depth, _writes(loaded.model)
    return BehaviourFacts(
        fit=loaded.fit,
        effect=_effect(loaded),
        task_loss=task_loss(loaded, subject) if subject.data is not None else None,
        task_data=subject.data or "",
        known_loss=_known_loss(loaded, depth.known) if writes else None,
        answer_tokens=_where_data_are(answer_lengths, loaded, subject),
        canaries=canaries_of(loaded, depth.beside, depth.served) if depth.beside else None,
        served=depth.served or "",
        safety=safety_facts(loaded, depth.safety) if depth.safety is not None and writes else None,
        seeds=_where_data_are(seed_probe, loaded, subject),
    )


def _where_data_are(
    look: Callable[[Loaded, Subject], T | None], loaded: Loaded, subject: Subject
) -> T | None:
    """What needs the rows of the run itself; a run may have outlived them."""
    try:
        return look(loaded, subject)
    except DataError as error:
        notice(f"What the run's own rows would show was not looked at. {error.seen}")
        return None


def _writes(model: Any) -> bool:
    return kind_of(model) not in KINDS and not is_encoder_decoder(model)


def _effect(loaded: Loaded) -> Effect:
    """Probe by probe, so that the logits of one exist at a time."""
    with loaded.adapters.disabled():
        probes = probes_of(loaded.model, loaded.tokenizer)
    tokens, change, divergence = 0, 0.0, 0.0
    with progress("base and adapter on probes") as tick:
        for number, probe in enumerate(probes, start=1):
            after = logits_on(loaded.model, [probe])
            with loaded.adapters.disabled():
                before = logits_on(loaded.model, [probe])
            found = len(before[0])
            change += found * float((after[0] - before[0]).abs().mean())
            divergence += found * agreement(after, before).mean_kl
            tokens += found
            tick(number, len(probes))
    return Effect(tokens, change / tokens, divergence / tokens)


def _known_loss(loaded: Loaded, file: Path | None) -> Change:
    """On the texts of a file, or on what the base writes itself."""
    with loaded.adapters.disabled():
        if file is not None:
            rows = known_from_texts(_texts(file), loaded.tokenizer, max_length=LONGEST)
        else:
            rows = sample_known_text(loaded.model, loaded.tokenizer, rows=TEXTS, tokens=LONGEST)
        known = KnownText(tuple(rows), "")
        before = _measured(loaded, known, "base")
    after = _measured(loaded, known, "adapter")
    return change_of(forgetting(before, after, source="").loss)


def _texts(file: Path) -> list[str]:
    texts = [str(row.get("text") or "") for row in read_rows(file).rows]
    if not any(texts):
        raise DataError(f"{file} has no column 'text'.", fix="Give a .txt file or rows with 'text'.")
    return [text for text in texts if text]


def _measured(loaded: Loaded, known: KnownText, name: str) -> Evaluation:
    return measure_known(loaded.model, loaded.tokenizer, known, name=name, stop=lambda: False)
