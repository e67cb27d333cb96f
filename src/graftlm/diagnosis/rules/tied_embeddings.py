"""D20: embedding and output head are one tensor in the base, and the adapter pulls them apart."""

from __future__ import annotations

from graftlm.diagnosis.confidence import MOST
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.facts.structure import FileFacts
from graftlm.diagnosis.finding import Finding, Plot
from graftlm.diagnosis.rule import WHOLE, Rule
from graftlm.diagnosis.shown import again, bars
from graftlm.diagnosis.symptoms import Symptom, finding_of

PAIR = 2


def check(evidence: Evidence) -> Finding | None:
    """In a whole model, in copies beside an adapter, and in what an adapter changes. Full fine-tuning trains
    a tied pair as one."""
    if evidence.method == WHOLE:
        return None
    return finding_of(RULE.id, RULE.title, (_in_model, _in_copies, _in_targets), evidence)


def _in_model(evidence: Evidence) -> Symptom | None:
    found = evidence.structure
    if found is None or not found.split_tie:
        return None
    return Symptom(
        "error",
        MOST,
        "The config says that embedding and output head are one tensor; the files hold two that differ.",
        "Whoever loads the model keeps one of the two, and the other is lost: what it writes collapses.",
        'Set "tie_word_embeddings": false in its config.json, or merge the adapter with Graft, which does.',
        "graft merge ADAPTER --out RUN-untied",
        {"tensors": PAIR},
        bars("Tensors for embedding and head", "tensors", {"config": 1, "files": PAIR}),
    )


def _in_copies(evidence: Evidence) -> Symptom | None:
    files = _tied(evidence)
    if files is None or _may_be_apart(evidence, files):
        return None
    # Of what is adapted PEFT saves the base's own tensor beside: that is no other one.
    own = [path for path in files.copied_ends if path not in files.adapted_ends]
    if not own:
        return None
    named = " and ".join(own)
    return Symptom(
        "error",
        MOST,
        f"The base ties its embedding to its output head, and the adapter brings a copy of {named} of its "
        "own.",
        "The two are no longer one. Merged and saved by a tool that leaves the config as it is, one of them "
        "is lost when the model is loaded again.",
        "Train only the rows of new tokens (trainable_token_indices), or leave embedding and head as they "
        "are. A merge by Graft parts the two and says so in the config.",
        _command(evidence, method__modules_to_save="null"),
        {"copies": len(own)},
        _plot(files),
    )


def _may_be_apart(evidence: Evidence, files: FileFacts) -> bool:
    """Both copied, with the same numbers: they are still one."""
    is_pair = len(files.copied_ends) == PAIR and files.ends_are_equal
    return is_pair or (evidence.structure is not None and evidence.structure.ensures_tying)


def _in_targets(evidence: Evidence) -> Symptom | None:
    files = _tied(evidence)
    ensured = evidence.structure is not None and evidence.structure.ensures_tying
    if files is None or not files.adapted_ends or ensured:
        return None
    named = " and ".join(files.adapted_ends)
    return Symptom(
        "warning" if evidence.recipe else "error",
        MOST if not evidence.recipe else 0.8,
        f"The base ties its embedding to its output head, and the adapter changes {named}.",
        "A merge into the one tensor changes both: the merged model is another than the one that was "
        "trained.",
        "Leave embedding and head out of the targets, or merge with Graft, which parts them and says so in "
        "the config.",
        _command(evidence, method__target_modules="all-linear"),
        {"targets": len(files.adapted_ends)},
        _plot(files),
    )


def _command(evidence: Evidence, **settings: object) -> str:
    """A run is repeated; a foreign adapter is merged by what keeps the two apart and says so."""
    return again(evidence, "tied", **settings) if evidence.recipe else "graft merge RUN --out RUN-merged"


def _tied(evidence: Evidence) -> FileFacts | None:
    """The files of an adapter, where its base is known to tie."""
    found = evidence.structure
    return found.files if found is not None and found.base is not None and found.base.ties else None


def _plot(files: FileFacts) -> Plot:
    values = {"adapted": len(files.adapted_ends), "copied": len(files.copied_ends)}
    return bars("Embedding and output head", "modules", values)


RULE = Rule(
    "D20",
    "Tied embeddings come apart",
    check,
    "peft#2018, #2777, #2803; transformers#45156: collapse after a reload",
)
