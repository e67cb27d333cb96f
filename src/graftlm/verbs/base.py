"""The base that a recipe names, loaded as the recipe says: the one way of every verb that has a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

from graftlm.core.config import build, read_yaml
from graftlm.core.environment import cpu_computes_bfloat16
from graftlm.core.notices import notice
from graftlm.core.progress import loading
from graftlm.formats.layout import EXTRA
from graftlm.models.ending import TEXT, Ending
from graftlm.models.load import load_model
from graftlm.models.precision import AUTO, advise_precision, choose_device
from graftlm.quant.facts import device_of, dtype_of
from graftlm.quant.scheme import Scheme
from graftlm.training.recipe import ModelSection, Quantization, Recipe
from graftlm.verbs.references import RECIPE, Reference


def load_base(section: ModelSection, name: str | None = None, *, ending: Ending = TEXT) -> tuple[Any, Any]:
    """Model and tokenizer, with the end that a task needs; `name` stands in for the recipe's name.

    Raises:
        ModelError: it cannot be loaded, or cannot be quantised.
    """
    called = name or section.name
    with loading(called) as tick:
        model, tokenizer = load_model(
            called,
            dtype=base_dtype(section),
            quantization=section.quantization,
            double_quant=section.double_quant,
            placement=section.placement,
            embeddings=section.embeddings,
            ending=ending,
            progress=tick,
        )
    if section.dtype == AUTO:
        advise_precision(dtype_of(model), device_of(model), parameters=model.num_parameters(), name=called)
    return model, tokenizer


def base_dtype(section: ModelSection) -> str:
    """What `load_model` takes as `dtype`.

    A quantised base computes in `compute_dtype`, except that a processor without bfloat16 arithmetic computes
    in float32 unless `dtype` insists.
    """
    if section.quantization == "none" or section.dtype != AUTO:
        return section.dtype
    is_slow = choose_device(AUTO).type == "cpu" and not cpu_computes_bfloat16()
    if section.compute_dtype == "bfloat16" and is_slow:
        notice(f"{section.name} computes in float32: this processor has no bfloat16 arithmetic.")
        return "float32"
    return section.compute_dtype


def section_of(reference: Reference) -> ModelSection:
    """The base that an adapter was trained on: as its run's recipe says, else as the files beside it say."""
    if reference.run is not None:
        return stored_recipe(reference.run).model
    facts = reference.adapter / EXTRA
    content = json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {}
    stored = content.get("base_quantization")
    if stored is None or stored["kind"] not in get_args(Quantization):
        return ModelSection(name=reference.base)  # dense, or in a format that only its own files give
    scheme = Scheme(**stored)
    scales = {"double_quant": scheme.double_quant} if scheme.is_four_bit else {}
    return ModelSection(name=reference.base, quantization=stored["kind"], **scales)


def stored_recipe(run: Path) -> Recipe:
    """The complete recipe of a run.

    Raises:
        ConfigError: the file was edited into something that is no recipe.
    """
    return build(Recipe, read_yaml(run / RECIPE), source=str(run / RECIPE))
