"""Gathers `StructureFacts`: files of an adapter or of a whole model, the base's config, notes of a loop."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graftlm.core.errors import FormatError, ModelError
from graftlm.diagnosis.facts.structure import BaseShape, FileFacts, StructureFacts
from graftlm.formats.ending import KINDS
from graftlm.formats.layout import CONFIG, read_folder
from graftlm.formats.peft_keys import BASE_WEIGHT, EMBEDDING, LINEAR, PREFIX, SHORT_PREFIX, target_path
from graftlm.integrations.loop_state import read_state
from graftlm.methods.families import ATTENTION, BLOCK
from graftlm.models.heads import stored_ending
from graftlm.models.locate import locate
from graftlm.verbs.diagnosing.subject import Subject
from graftlm.verbs.references import RECIPE

EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tok_embeddings"})
HEADS = frozenset({"lm_head", "embed_out"})
LABELLING = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
BEGUN_AT_ZERO = (LINEAR["lora_B"], EMBEDDING["lora_embedding_B"])
"""Ends of the keys of the output sides."""
TRAINER_STATE = "trainer_state.json"
"""Of `transformers.Trainer`, in its checkpoints."""


def structure_facts(subject: Subject) -> StructureFacts | None:
    """None where there are no files yet.

    Raises:
        FormatError: an adapter or a note beside it is damaged.
    """
    if subject.merged is not None:
        return StructureFacts(base=_base(str(subject.merged)), split_tie=_split_tie(subject.merged))
    if subject.adapter is None:
        return None
    folder = subject.adapter
    content, tensors = read_folder(folder)
    files = file_facts(tensors)
    return StructureFacts(
        type=str(content.get("peft_type", "")),
        labels=_labelling_class(content),
        head_saved=any(_is_head(path) for path in files.copied),
        ensures_tying=bool(content.get("ensure_weight_tying")),
        files=files,
        base=None if subject.base is None else _base(subject.base),
        siblings={} if _is_part_of_run(folder) else _siblings(folder),
        logged_steps=_logged_steps(folder),
        loop=read_state(folder) or read_state(folder.absolute().parent),
    )


def file_facts(tensors: Mapping[str, Tensor]) -> FileFacts:
    """Facts of the tensors of an adapter, by PEFT's keys."""
    adapted = {path for key in tensors if (path := target_path(key))}
    inside = [match["inside"] for path in adapted if (match := BLOCK.match(path))]
    attention = sum(bool(ATTENTION.search(path)) for path in inside)
    copies = {key: tensor for key, tensor in tensors.items() if _copied_path(key) is not None}
    copied: dict[str, int] = {}
    for key, tensor in copies.items():
        path = str(_copied_path(key))
        copied[path] = copied.get(path, 0) + tensor.nbytes
    ends = {key: tensor for key, tensor in copies.items() if _is_end(str(_copied_path(key)))}
    moved = _moved(tensors)
    return FileFacts(
        attention=attention,
        feed_forward=len(inside) - attention,
        adapted_ends=tuple(sorted(path for path in adapted if _is_end(path))),
        copied=copied,
        copied_ends=tuple(sorted({str(_copied_path(key)) for key in ends})),
        ends_are_equal=_are_equal(list(ends.values())),
        adapter_bytes=sum(tensor.nbytes for tensor in tensors.values()) - sum(copied.values()),
        rows=max((tensor.shape[0] for tensor in ends.values()), default=0),
        outputs=len(moved),
        still=sum(not has_moved for has_moved in moved.values()),
    )


def _copied_path(key: str) -> str | None:
    """The module that a key holds whole: a copy, or the base's own table beside an adapter."""
    path = key.removeprefix(PREFIX).removeprefix(SHORT_PREFIX)
    if key.endswith(BASE_WEIGHT):
        return path.removesuffix(BASE_WEIGHT)
    owner, _, leaf = path.rpartition(".")
    is_copy = target_path(key) is None and leaf in ("weight", "bias")
    return owner if is_copy and owner else None


def _is_end(path: str) -> bool:
    return path.rpartition(".")[2] in EMBEDDINGS | HEADS


def _is_head(path: str) -> bool:
    """Whether a copied module is what labels: it stands outside of the blocks, and writes no text."""
    return not BLOCK.match(path) and not _is_end(path)


def _are_equal(tensors: list[Tensor]) -> bool:
    return all(one.shape == tensors[0].shape and torch.equal(one, tensors[0]) for one in tensors)


def _moved(tensors: Mapping[str, Tensor]) -> dict[str, bool]:
    """Of every place that starts with an output side of zeros: whether it still has it."""
    return {key: bool(tensor.any()) for key, tensor in tensors.items() if key.endswith(BEGUN_AT_ZERO)}


def _labelling_class(content: Mapping[str, Any]) -> str:
    mapping = content.get("auto_mapping") or {}
    named = str(mapping.get("base_model_class") or "")
    if named.endswith(LABELLING):
        return named
    return str(content["task_type"]) if content.get("task_type") in KINDS else ""


def _base(name: str) -> BaseShape | None:
    """None where the base is not on this machine: a diagnosis downloads nothing."""
    from transformers import AutoConfig

    try:
        reference = locate(name).reference
        config = AutoConfig.from_pretrained(reference, local_files_only=True)
    except (ModelError, OSError, ValueError):  # the latter: an architecture that transformers lacks
        return None
    text = config.get_text_config()
    return BaseShape(
        ties=bool(getattr(text, "tie_word_embeddings", getattr(config, "tie_word_embeddings", False))),
        vocabulary=int(text.vocab_size),
        has_head=stored_ending(config).kind != "text",
    )


def _siblings(folder: Path) -> dict[str, float]:
    """Adapters that were saved together: PEFT puts all but the default one into folders of their own."""
    own = folder.absolute()
    around = [own.parent, *own.glob("*"), *own.parent.glob("*")]
    found = {path for path in around if path != own and (path / CONFIG).is_file()}
    shares = {}
    for path in sorted(found):
        moved = _moved(read_folder(path)[1])
        if moved:
            shares["default" if path == own.parent else path.name] = sum(moved.values()) / len(moved)
    return shares


def _is_part_of_run(folder: Path) -> bool:
    """Adapters of one run are trained by turns, and each by itself."""
    return any((up / RECIPE).is_file() for up in folder.absolute().parents[:2])


def _logged_steps(folder: Path) -> int | None:
    path = next((up / TRAINER_STATE for up in (folder, folder.absolute().parent)
                 if (up / TRAINER_STATE).is_file()), None)  # fmt: skip
    if path is None:
        return None
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["global_step"])
    except (ValueError, TypeError, KeyError):
        raise FormatError(
            f"{path} is not the log of a trainer.",
            meaning="It was edited or damaged.",
            fix="Remove it; the adapter does not depend on it.",
        ) from None


def _split_tie(folder: Path) -> bool | None:
    """Whether the files of a whole model hold an embedding and an output head that differ, although its
    config says that they are one."""
    shape = _base(str(folder))
    if shape is None or not shape.ties:
        return None
    tables: list[Tensor] = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for key in file.keys():  # noqa: SIM118  not a mapping: it cannot be iterated
                    if key.endswith(".weight") and _is_end(key.removesuffix(".weight")):
                        tables.append(file.get_tensor(key))
        except (SafetensorError, OSError) as error:
            raise FormatError(
                f"{path} cannot be read: {error}.", meaning="The file is damaged or cut off."
            ) from None
    return len(tables) > 1 and not _are_equal(tables)
