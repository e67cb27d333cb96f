"""The recipes that a plan compares: what was written stays, what was not is tried in the usual ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from graftlm.core.errors import ConfigError
from graftlm.methods.base import MethodConfig
from graftlm.methods.lora import LoraConfig
from graftlm.planning.base_facts import BaseFacts
from graftlm.planning.quality import HELD_BACK, STANDINGS, UNKNOWN, Standing
from graftlm.planning.requirements import FEW_EXAMPLES, Requirements
from graftlm.planning.rows import RowLengths
from graftlm.planning.written import changed, is_written
from graftlm.training.method_section import QLORA
from graftlm.training.recipe import Recipe

Changes = Mapping[str, Mapping[str, Any]]

_METHODS: Mapping[str, Mapping[str, Any]] = {
    "lora, rank 64": {"type": "lora", "r": 64, "lora_alpha": 64, "use_rslora": True},
    "dora": {"type": "dora"},
    "full": {"type": "full"},
    "bottleneck": {"type": "bottleneck"},
    "ia3": {"type": "ia3"},
    "prefix": {"type": "prefix"},
    "prompt": {"type": "prompt"},
}
"""By the names of `quality.STANDINGS`; plain LoRA is what a recipe means that names none."""

_EVA: Mapping[str, Any] = {"type": "lora", "init_lora_weights": "eva"}
_STORAGES = ("none", "nf4", "int8")
_DENSE_ONLY = ("full", "lora, eva")
"""They read or copy the weights themselves."""
_HELD_BACK: Mapping[str, Any] = {"type": "lora", "r": 8, "lora_alpha": 16, "lora_dropout": 0.05}
_PATIENCE = 3
_STREAMED = {"cpu": "disk", "cuda": "host"}
"""Where layers lie that do not stay on a device."""


@dataclass(frozen=True)
class Candidate:
    """One recipe to be looked at."""

    name: str
    """The method, as in `quality.STANDINGS`."""
    storage: str
    """`model.quantization`."""
    recipe: Recipe
    """As written, with the changes."""
    changes: Changes
    """What the plan set."""
    standing: Standing

    @property
    def label(self) -> str:
        """Method, size and storage in few words, for a table."""
        method = self.recipe.method
        words = [method.type, *_sizes(method.config)]
        if self.storage != "none" and not (method.type == QLORA and self.storage == "nf4"):
            words.append(f"({self.storage})")
        if self.recipe.model.placement != "resident":
            words.append(f"from {self.recipe.model.placement}")
        return " ".join(words)


def candidates(
    recipe: Recipe, requirements: Requirements, facts: BaseFacts, rows: RowLengths
) -> Iterator[tuple[Candidate, ...]]:
    """Every recipe that a plan may look at: for each method, the plainest first, the ways to store the base,
    as it is stored first."""
    for name, fields in _methods(recipe, requirements, facts, rows):
        group = []
        for storage in _storages(recipe, facts, name):
            changes = _changes(recipe, name, fields, storage)
            try:
                made = changed(recipe, changes)
            except ConfigError:  # what was written does not go with this method or storage
                continue
            group.append(Candidate(name, storage, made, changes, STANDINGS.get(name, UNKNOWN)))
        yield tuple(group)


def frugal(recipe: Recipe, facts: BaseFacts) -> Iterator[Candidate]:
    """LoRA of half the usual rank with moments in 8 bits: before a weaker method is taken, or layers are
    streamed."""
    if _is_named(recipe) or is_written(recipe, "train.optim"):
        return
    for storage in _storages(recipe, facts, "lora")[:2]:
        changes = _changes(recipe, "lora", {"type": "lora", "r": 8, "lora_alpha": 16}, storage)
        changes["train"] = {"optim": "adamw_8bit"}
        yield Candidate("lora", storage, changed(recipe, changes), changes, STANDINGS["lora"])


def streamed(recipe: Recipe, facts: BaseFacts, device: str) -> Iterator[Candidate]:
    """Plain LoRA, or the method that was written, on a base whose layers are read anew in every pass: for
    where nothing else fits."""
    if is_written(recipe, "model.placement"):
        return
    name = name_of(recipe)
    for storage in _storages(recipe, facts, name):
        changes = _changes(recipe, name, None, storage)
        changes["model"] = {**changes.get("model", {}), "placement": _STREAMED[device]}
        try:
            made = changed(recipe, changes)
        except ConfigError:  # a method that trains every weight
            continue
        yield Candidate(name, storage, made, changes, STANDINGS.get(name, UNKNOWN))


def is_few(rows: RowLengths) -> bool:
    """Whether a run on these rows has to be held back from learning them by heart."""
    return len(rows.train) < FEW_EXAMPLES


def _is_named(recipe: Recipe) -> bool:
    return is_written(recipe, "method")


def _methods(
    recipe: Recipe, requirements: Requirements, facts: BaseFacts, rows: RowLengths
) -> Iterator[tuple[str, Mapping[str, Any] | None]]:
    """Name and fields; no fields where the method stays as it is written."""
    if _is_named(recipe):
        yield name_of(recipe), None
        return
    yield "lora", None
    if is_few(rows):
        yield HELD_BACK, _HELD_BACK
    yield from _METHODS.items()
    if requirements.is_quality_first and not facts.is_encoder_decoder:
        yield "lora, eva", _EVA


def name_of(recipe: Recipe) -> str:
    """The name under which `quality.STANDINGS` knows the method of a recipe."""
    config, kind = recipe.method.config, recipe.method.type
    if isinstance(config, LoraConfig):
        if config.use_dora:
            return "dora"
        if config.init_lora_weights == "eva":
            return "lora, eva"
        return "lora, rank 64" if config.r >= 64 else "lora"
    return kind


def _storages(recipe: Recipe, facts: BaseFacts, name: str) -> tuple[str, ...]:
    """Ways to store the base that go with a method."""
    is_fixed = facts.stored_quantised is not None or is_written(recipe, "model.quantization")
    if name in _DENSE_ONLY and not _is_named(recipe):
        return (
            () if facts.stored_quantised or (is_fixed and recipe.model.quantization != "none") else ("none",)
        )
    if is_fixed or recipe.method.type == QLORA:
        return (recipe.model.quantization,)
    return ("none",) if name in _DENSE_ONLY else _STORAGES


def _changes(
    recipe: Recipe, name: str, fields: Mapping[str, Any] | None, storage: str
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {} if fields is None else {"method": dict(fields)}
    if name == HELD_BACK and not is_written(recipe, "train.early_stopping_patience"):
        found["train"] = {"early_stopping_patience": _PATIENCE}
    if storage == recipe.model.quantization:
        return found
    found["model"] = {"quantization": storage}
    kind = found.get("method", {}).get("type", recipe.method.type)
    if storage == "nf4" and kind == "lora" and not _is_named(recipe):
        found["method"] = {**found.get("method", {}), "type": QLORA}  # the name by which people know it
    return found


def _sizes(config: MethodConfig) -> Iterator[str]:
    if isinstance(config, LoraConfig):
        yield f"{'rs ' if config.use_rslora else ''}r={config.r}"
        if config.init_lora_weights is not True:
            yield str(config.init_lora_weights)
    tokens = getattr(config, "num_virtual_tokens", None)
    if tokens is not None:
        yield str(tokens)
