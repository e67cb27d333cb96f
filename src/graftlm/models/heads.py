"""New heads: what a classifier has behind its backbone, and how that starts where a checkpoint lacks it.

A checkpoint of a language model has no weights for a head that labels rows or tokens. Those of the new head
are drawn by the seed of its `Ending` alone, so that every process that loads the base gets the same ones.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from graftlm.core.errors import FormatError
from graftlm.data.labels.values import Problem
from graftlm.formats.ending import KINDS as LABELLED
from graftlm.formats.layout import CONFIG, EXTRA, TENSORS
from graftlm.methods.base import MethodConfig
from graftlm.methods.site import base_modules
from graftlm.methods.virtual.stacks import task_of
from graftlm.models.ending import TEXT, Ending

PROBLEMS: dict[Problem, str] = {
    "one label": "single_label_classification",
    "several labels": "multi_label_classification",
    "number": "regression",
}
"""What a head is asked for -> what `transformers` calls it."""

KINDS = {"ForSequenceClassification": "rows", "ForTokenClassification": "tokens"}
"""How the names of architectures end -> what their heads label."""

POOLER = "pooler"
"""Part of the backbones of BERT and its kin that only classifiers use; many checkpoints lack it."""

_NEW = "_graft_new_modules"


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """Paths of what has to be trained and saved with an adapter, for `modules_to_save`.

    Everything with parameters behind the backbone of a model that labels rows or tokens, and what else had no
    weights in its checkpoint; nothing of a model that writes text.

    >>> head_modules(nn.Linear(2, 2))
    ()
    """
    new = tuple(vars(model).get(_NEW, ()))
    if task_of(model) not in ("SEQ_CLS", "TOKEN_CLS"):
        return new
    return tuple(dict.fromkeys((*_behind_backbone(model), *new)))


def describe_head(model: nn.Module) -> str:
    """What is trained beside the adapter, and whether the checkpoint has weights for it."""
    new = vars(model).get(_NEW, ())
    modules = base_modules(model)
    size = sum(p.numel() for path in head_modules(model) for p in modules[path].parameters())
    origin = "random at first" if new else "from the checkpoint"
    return f"{', '.join(head_modules(model))} ({size:,} weights, {origin})"


def with_head(config: MethodConfig, model: nn.Module) -> MethodConfig:
    """The config of an adapter that is trained and saved together with the model's new head."""
    heads = head_modules(model)
    if not heads:
        return config
    asked = config.modules_to_save or ()
    # PEFT has a class of its own for each kind of model.
    return config.replace(
        modules_to_save=tuple(dict.fromkeys((*asked, *heads))), task_type=config.task_type or task_of(model)
    )


def stored_ending(config: Any) -> Ending:
    """What a checkpoint of this config ends in as it is."""
    name = next(iter(getattr(config, "architectures", None) or ()), "")
    kind = next((kind for end, kind in KINDS.items() if name.endswith(end)), None)
    if kind is None:
        return TEXT
    labels = tuple(str(config.id2label[number]) for number in range(config.num_labels))
    return _ending(kind, labels, getattr(config, "problem_type", None))


def ending_of_adapter(folder: Path) -> Ending | None:
    """What the base of an adapter has to end in, by the `graft.json` in its folder; None where that does not
    say.

    Raises:
        FormatError: what it says makes no sense.
    """
    path = folder / EXTRA
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    said = content.get("ending")
    if said is None:
        return _ending_by_peft(folder)
    try:
        return _ending(said["kind"], tuple(map(str, said["labels"])), said.get("problem_type"))
    except (KeyError, TypeError):
        raise FormatError(
            f"{path} does not say what the base of the adapter ends in.", meaning="It is damaged."
        ) from None


def _ending_by_peft(folder: Path) -> Ending | None:
    """Of an adapter that PEFT wrote: its files say what is labelled, and how many labels there are."""
    path = folder / CONFIG
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kind = LABELLED.get(content.get("task_type") or "")
    copies = tuple(content.get("modules_to_save") or ())
    if kind is None or not copies or not (folder / TENSORS).is_file():
        return None
    with safe_open(folder / TENSORS, framework="pt") as file:
        shapes = [
            file.get_slice(key).get_shape()
            for key in file.keys()  # noqa: SIM118  not a mapping: it cannot be iterated
            if key.endswith(".weight") and any(f".{name}." in key for name in copies)
        ]
    counts = [shape[0] for shape in shapes if len(shape) == 2]
    labels = tuple(f"LABEL_{number}" for number in range(min(counts, default=0)))
    return _ending(kind, labels, None) if labels else None


def facts_of(ending: Ending) -> dict[str, Any]:
    """What `graft.json` says of it; the inverse of reading that."""
    said = None if ending.kind == "tokens" else PROBLEMS[ending.problem]
    return {"kind": ending.kind, "labels": list(ending.labels), "problem_type": said}


def _ending(kind: str, labels: tuple[str, ...], problem_type: str | None) -> Ending:
    named = next((problem for problem, theirs in PROBLEMS.items() if theirs == problem_type), None)
    problem: Problem = named or ("number" if len(labels) == 1 else "one label")
    return Ending("rows" if kind == "rows" else "tokens", labels, problem)


def ended(config: Any, ending: Ending) -> Any:
    """The config of the base with this ending: a copy that names the labels."""
    if ending.kind == "text":
        return config
    own = copy.deepcopy(config)
    for part in {id(part): part for part in (own, own.get_text_config())}.values():
        part.id2label = dict(enumerate(ending.labels))
        part.label2id = {label: number for number, label in part.id2label.items()}
        part.problem_type = PROBLEMS[ending.problem]
    return own


def is_for(stored: Ending, ending: Ending) -> bool:
    """Whether what a checkpoint ends in is just what is wanted; a label without a name counts as its number.

    >>> is_for(Ending("rows", ("LABEL_0", "LABEL_1")), Ending("rows", ("0", "1"), seed=3))
    True
    """
    if ending.kind == "text":
        return True
    unnamed = all(label == f"LABEL_{number}" for number, label in enumerate(stored.labels))
    numbers = tuple(str(number) for number in range(len(stored.labels)))
    is_named = ending.labels in (stored.labels, numbers if unnamed else stored.labels)
    return is_named and (stored.kind, stored.problem) == (ending.kind, ending.problem)


def begin_head(model: Any, info: dict[str, Any], ending: Ending) -> None:
    """Draw the weights of a head for these labels, which the checkpoint does not have.

    Args:
        info: what `transformers` says of the loading; what concerns the head alone is taken out of it.
    """
    absent = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    poolers = (key.split(f".{POOLER}.")[0] + f".{POOLER}" for key in absent if f".{POOLER}." in key)
    new = tuple(dict.fromkeys((*_behind_backbone(model), *sorted(poolers))))
    setattr(model, _NEW, new)
    _draw(model, new, ending.seed)

    def is_new(key: str) -> bool:
        return any(key.startswith(f"{path}.") for path in new)

    backbone = f"{model.base_model_prefix}."
    info["missing_keys"] = [key for key in info["missing_keys"] if not is_new(key)]
    info["mismatched_keys"] = [entry for entry in info["mismatched_keys"] if not is_new(entry[0])]
    # The head that the checkpoint does have is not used, and neither is a pooler where rows are not pooled.
    info["unexpected_keys"] = [
        key for key in info["unexpected_keys"] if key.startswith(backbone) and f".{POOLER}." not in key
    ]


def _behind_backbone(model: nn.Module) -> list[str]:
    """The outermost modules with parameters outside of the backbone."""
    backbone = str(getattr(model, "base_model_prefix", ""))
    if not backbone or not isinstance(getattr(model, backbone, None), nn.Module):
        return []
    modules = base_modules(model)
    outermost = [path for path in modules if path and "." not in path and path != backbone]
    return [path for path in outermost if next(modules[path].parameters(), None) is not None]


@torch.no_grad()
def _draw(model: Any, paths: Iterable[str], seed: int) -> None:
    """As the architecture draws them, in float32 on the CPU, without a trace in the process's generators."""
    generator: torch.Generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        for path in paths:
            for module in model.get_submodule(path).modules():
                own = [parameter for parameter in module._parameters.values() if parameter is not None]
                dtypes = [parameter.dtype for parameter in own]
                for parameter in own:
                    parameter.data = torch.zeros(parameter.shape)
                for thing in (module, *own):
                    vars(thing).pop("_is_hf_initialized", None)
                model._init_weights(module)
                for parameter, dtype in zip(own, dtypes, strict=True):
                    parameter.data = parameter.data.to(dtype)
    finally:
        generator.set_state(state)
