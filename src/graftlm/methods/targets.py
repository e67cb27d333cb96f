"""Which modules an adapter goes to. Pure: nothing in the model is changed here.

A list entry is a role, a module path, or an ending of module paths; a string that is no role is one regular
expression for whole paths (as in PEFT). Every entry must match something.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from torch import nn

from graftlm.core.errors import TargetError
from graftlm.methods.families import ROLES, roles_of
from graftlm.methods.site import base_modules
from graftlm.quant.facts import is_in_few_bits


class Targeting(Protocol):
    """The fields of a config that say which layers are meant."""

    @property
    def target_modules(self) -> str | tuple[str, ...]: ...
    @property
    def exclude_modules(self) -> str | tuple[str, ...] | None: ...
    @property
    def layers_to_transform(self) -> int | tuple[int, ...] | None: ...
    @property
    def layers_pattern(self) -> str | tuple[str, ...] | None: ...
    def supports(self, module: nn.Module) -> bool: ...


def select(model: nn.Module, config: Targeting) -> list[str]:
    """Paths of the modules that `config` targets, in model order.

    Raises:
        TargetError: an entry matches nothing, or a matched module is of a kind that the method cannot adapt;
            all such entries at once, with near misses.
    """
    modules = {path: module for path, module in base_modules(model).items() if path}
    roles = roles_of(model)
    problems: list[str] = []
    wanted = _matching(config.target_modules, modules, roles, config.supports, problems)
    excluded = _matching(config.exclude_modules or (), modules, roles, config.supports, problems)
    chosen = [path for path in modules if path in wanted and path not in excluded]
    chosen = _of_layers(chosen, config, problems)
    if not problems and not chosen:
        problems.append("everything that target_modules matches is excluded again")
    if problems:
        raise TargetError(
            f"{_count(problems)} in the target modules of this {type(config).__name__}.",
            problems=problems,
            meaning="The name is spelled differently here, or the pattern is for another architecture.",
            fix="Use 'all-linear', 'attention' or 'mlp', or names from this model: "
            + _names(modules, config)
            + ".",
        )
    return chosen


def named(model: nn.Module, names: Iterable[str], field: str) -> list[str]:
    """Paths of the modules called `names` (or ending so), for `modules_to_save`; the outermost only."""
    modules = {path: module for path, module in base_modules(model).items() if path}
    problems: list[str] = []
    chosen: list[str] = []
    for name in names:
        paths = [path for path in modules if path == name or path.endswith(f".{name}")]
        if not paths:
            problems.append(f"{name!r} matches no module{_near(name, modules)}")
        elif not any(_holds(modules[path]) for path in paths):
            problems.append(f"{name!r} has no parameters")
        chosen += [p for p in paths if p not in chosen]
    if problems:
        raise TargetError(
            f"{_count(problems)} in {field}.", problems=problems, fix="Name modules of this model."
        )
    return [path for path in chosen if not any(path.startswith(f"{other}.") for other in chosen)]


def _holds(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or is_in_few_bits(module)


def _matching(
    spec: str | Sequence[str],
    modules: Mapping[str, nn.Module],
    roles: Mapping[str, Sequence[str]],
    supports: Callable[[nn.Module], bool],
    problems: list[str],
) -> set[str]:
    if isinstance(spec, str):
        if spec in ROLES:
            return _role(spec, roles, problems)
        return _supported(spec, _by_expression(spec, modules, problems), modules, supports, problems)
    found: set[str] = set()
    for entry in spec:
        paths = [path for path in modules if path == entry or path.endswith(f".{entry}")]
        if entry in ROLES and not any(supports(modules[path]) for path in paths):
            found |= _role(entry, roles, problems)
        elif not paths:
            problems.append(f"{entry!r} matches no module{_near(entry, modules)}")
        else:
            found |= _supported(entry, paths, modules, supports, problems)
    return found


def _role(role: str, roles: Mapping[str, Sequence[str]], problems: list[str]) -> set[str]:
    if not roles[role]:
        problems.append(f"the role {role!r} is empty: no such linear layers were found in this model")
    return set(roles[role])


def _by_expression(spec: str, modules: Mapping[str, nn.Module], problems: list[str]) -> list[str]:
    try:
        expression = re.compile(spec)
    except re.error as error:
        problems.append(f"{spec!r} is not a valid regular expression: {error}")
        return []
    paths = [path for path in modules if expression.fullmatch(path)]
    if not paths:
        listed = any(path == spec or path.endswith(f".{spec}") for path in modules)
        hint = (
            f"; a single string is a regular expression for whole paths: write [{spec!r}]"
            if listed
            else _near(spec, modules)
        )
        problems.append(f"the expression {spec!r} matches no module{hint}")
    return paths


def _supported(
    entry: str,
    paths: Sequence[str],
    modules: Mapping[str, nn.Module],
    supports: Callable[[nn.Module], bool],
    problems: list[str],
) -> set[str]:
    """An expression may graze containers; an entry that hits nothing but unsupported kinds is a mistake."""
    good = {path for path in paths if supports(modules[path])}
    if paths and not good:
        kinds = sorted({type(modules[path]).__name__ for path in paths})
        inner = next((p for p in modules if p.startswith(f"{paths[0]}.") and supports(modules[p])), None)
        hint = f"; did you mean the layers inside, such as {inner.rpartition('.')[2]!r}?" if inner else ""
        problems.append(f"{entry!r} matches {', '.join(kinds)}, which this method cannot adapt{hint}")
    return good


def _of_layers(chosen: list[str], config: Targeting, problems: list[str]) -> list[str]:
    if config.layers_to_transform is None:
        if config.layers_pattern is not None:
            problems.append("layers_pattern needs layers_to_transform")
        return chosen
    wanted = config.layers_to_transform
    wanted = (wanted,) if isinstance(wanted, int) else wanted
    pattern = config.layers_pattern or r"[^.]+"
    names = pattern if isinstance(pattern, str) else "|".join(pattern)
    index = re.compile(rf"(?:^|\.)(?:{names})\.(\d+)\.")
    layer_of = {path: int(match[1]) for path in chosen if (match := index.search(path))}
    missing = sorted(set(wanted) - set(layer_of.values()))
    if missing and chosen:
        seen = sorted(set(layer_of.values()))
        known = (
            f"targets lie in layers {seen[0]} to {seen[-1]}" if seen else "no target lies in a numbered layer"
        )
        problems.append(f"layers_to_transform names {missing}, but {known}")
    return [path for path in chosen if layer_of.get(path) in wanted]


def _near(name: str, modules: Mapping[str, nn.Module]) -> str:
    leaves = list(dict.fromkeys(path.rpartition(".")[2] for path in modules))
    leaves = [leaf for leaf in leaves if not leaf.isdigit()]
    near = difflib.get_close_matches(name.rpartition(".")[2], leaves, n=3, cutoff=0.5)
    return f"; near misses: {', '.join(map(repr, near))}" if near else ""


def _names(modules: Mapping[str, nn.Module], config: Targeting) -> str:
    leaves = dict.fromkeys(
        path.rpartition(".")[2] for path, module in modules.items() if config.supports(module)
    )
    return ", ".join(list(leaves)[:12])


def _count(problems: Sequence[str]) -> str:
    return f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
