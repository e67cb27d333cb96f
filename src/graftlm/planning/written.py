"""What somebody wrote of a recipe, apart from what it means: the defaults are left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from graftlm.core.config import Config, build
from graftlm.training.method_section import Method
from graftlm.training.recipe import Recipe


def written(recipe: Recipe) -> dict[str, Any]:
    """The fields that were given, as a mapping that `Recipe` reads; what is short for others is written out.

    >>> from graftlm.training.recipe import make_recipe
    >>> written(make_recipe({"model": "sprout", "data": "rows.jsonl", "method": {"type": "lora", "r": 8}}))
    {'model': {'name': 'sprout'}, 'data': {'path': 'rows.jsonl'}, 'method': {'type': 'lora', 'r': 8}}
    """
    found: dict[str, Any] = {}
    for name in type(recipe).model_fields:
        if name not in recipe.model_fields_set:
            continue
        section = getattr(recipe, name)
        if isinstance(section, Method):
            found[name] = method_fields(section)
        elif isinstance(section, Config):
            found[name] = section.model_dump(mode="json", exclude_unset=True)
        else:
            found[name] = section.as_dict()
    return found


def method_fields(method: Method) -> dict[str, Any]:
    """Its type, and the fields that differ from what the type starts with."""
    start = Method.parse(method.type).as_dict()
    return {"type": method.type, **{k: v for k, v in method.as_dict().items() if v != start.get(k)}}


def is_written(recipe: Recipe, path: str) -> bool:
    """Whether `section` or `section.field` was given.

    >>> from graftlm.training.recipe import make_recipe
    >>> recipe = make_recipe({"model": "sprout", "data": "rows.jsonl"})
    >>> is_written(recipe, "model.name"), is_written(recipe, "model.quantization")
    (True, False)
    """
    section, _, name = path.partition(".")
    if section not in recipe.model_fields_set:
        return False
    value = getattr(recipe, section)
    return not name or not isinstance(value, Config) or name in value.model_fields_set


def changed(recipe: Recipe, changes: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """The recipe with fields set as if they had been written, validated again. A method is replaced whole.

    Raises:
        ConfigError: the fields do not go together.

    >>> from graftlm.training.recipe import make_recipe
    >>> recipe = make_recipe({"model": "sprout", "data": "rows.jsonl"})
    >>> changed(recipe, {"model": {"quantization": "nf4"}}).model.quantization
    'nf4'
    """
    mapping = written(recipe)
    for section, fields in changes.items():
        before = {} if section == "method" else mapping.get(section, {})
        mapping[section] = {**before, **fields}
    return build(Recipe, mapping, source="The plan")


def recipe_text(recipe: Recipe) -> str:
    """YAML of what was written: what is not there is filled in by the run, for the base and the data."""
    return yaml.safe_dump(written(recipe), sort_keys=False, allow_unicode=True)
