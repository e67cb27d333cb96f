"""Base and adapter in memory, also where they do not fit each other: what does not fit is listed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graftlm.core.errors import ModelError
from graftlm.diagnosis.facts.behaviour import Fit
from graftlm.formats import peft_config
from graftlm.formats.layout import CONFIG, FOLDER, fill, misfits, other_base, read_folder
from graftlm.methods.adapter_set import AdapterSet
from graftlm.models.ending import TEXT
from graftlm.models.heads import ending_of_adapter
from graftlm.verbs.base import load_base, section_of
from graftlm.verbs.diagnosing.subject import Subject
from graftlm.verbs.references import Reference

NAME = "adapter"


@dataclass(frozen=True)
class Loaded:
    """A base with one adapter, active; what of its file did not fit was left out."""

    model: Any
    tokenizer: Any
    adapters: AdapterSet
    fit: Fit
    folder: Path
    """Of the adapter."""


def load(subject: Subject) -> Loaded:
    """Load the base that an adapter names, or that somebody named, and put the adapter on it.

    Raises:
        ModelError: no base is named, or it cannot be loaded; FormatError: the adapter cannot be read.
    """
    folder = subject.adapter
    assert folder is not None
    if subject.base is None:
        raise ModelError(
            f"{folder / CONFIG} does not name the base of the adapter.", fix="Name it: --base MODEL."
        )
    section = section_of(Reference(folder, subject.base, subject.run))
    model, tokenizer = load_base(section, subject.base, ending=ending_of_adapter(folder) or TEXT)
    adapters = AdapterSet(model, FOLDER)
    fit = replace(put(adapters, folder, NAME), base=subject.base)
    adapters.activate(NAME)
    model.eval()
    return Loaded(model, tokenizer, adapters, fit, folder)


def put(adapters: AdapterSet, folder: Path, name: str) -> Fit:
    """Add the adapter in `folder` under `name`, as far as it fits, and say what does not."""
    content, tensors = read_folder(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is left out is in the answer
        adapters.add(name, peft_config.from_json(content, tensors, str(folder / CONFIG)))
        problems = misfits(adapters, name, tensors)
        fill(adapters, name, tensors, str(folder), strict=False)
    other = other_base(adapters, folder, name)
    named = "" if other is None else other.name or "one without a name"
    return Fit(max(0, len(tensors) - len(problems)), tuple(problems), named)
