"""LoRA on parameters that no layer of their own calls, such as the stacked weights of a model's experts.

For a stack of E experts, expert e gets W_e + s B_e A_e. The factors of all experts lie in one pair, in PEFT's
layout: A [E r, in] with the rows of one expert together, B [out, r E] with the columns of one rank together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from graftlm.core.errors import TargetError
from graftlm.methods.base import Dense, Layer, Maker, WeightAdapter
from graftlm.methods.site import base_modules
from graftlm.methods.starts.initialise import start
from graftlm.quant.facts import is_packed


@dataclass(frozen=True)
class Update:
    """The rank and scaling of the update of one parameter, and how its random factors start."""

    r: int
    scaling: float
    init: bool | str


class ParameterLora(WeightAdapter):
    """Updates of several parameters of one module, which is called with the changed ones in place.

    Shapes: parameter [E, out, in], or [E, in, out] where the module says `is_transposed`, or [out, in].
    """

    def __init__(self, base: nn.Module, updates: Mapping[str, Update]) -> None:
        """`updates` by name of parameter."""
        super().__init__()
        named = dict(base.named_parameters(recurse=False))
        self.factors = nn.ModuleDict(
            {
                name: Factors(named[name], updates[name], is_transposed=getattr(base, "is_transposed", False))
                for name in named
                if name in updates
            }
        )
        names = tuple(f"factors.{name}.lora_B" for name in self.factors)
        self.output_side = names  # type: ignore[misc]  # of a class everywhere else; these are the base's names

    def changed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._of(name).added(weights[name]) for name in self.factors}

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        return self.changed(dense)

    def outer(self, name: str) -> int:
        """How many of the updated parameters come after `name` in the module."""
        names = list(self.factors)
        return len(names) - 1 - names.index(name)

    def _of(self, name: str) -> Factors:
        found = self.factors[name]
        assert isinstance(found, Factors)
        return found


class Factors(nn.Module):
    """The pair of one parameter. Shapes: lora_A [E r, in], lora_B [out, r E]."""

    def __init__(self, weight: Tensor, update: Update, *, is_transposed: bool) -> None:
        super().__init__()
        self.experts = weight.shape[0] if weight.dim() == 3 else 1
        self.is_stack = weight.dim() == 3
        self.is_transposed = is_transposed and self.is_stack
        self.scaling = update.scaling
        rows, columns = weight.shape[-2:]
        shape = (columns, rows) if self.is_transposed else (rows, columns)
        each = [start(update.init, shape, update.r, update.scaling) for _ in range(self.experts)]
        self.lora_A = nn.Parameter(torch.cat([begin.a for begin in each]))
        self.lora_B = nn.Parameter(torch.cat([begin.b for begin in each], dim=1))

    def added(self, weight: Tensor) -> Tensor:
        """The parameter plus its update, in its own dtype and layout."""
        a = self.lora_A.to(weight.dtype).unflatten(0, (self.experts, -1))
        b = self.lora_B.to(weight.dtype).unflatten(1, (-1, self.experts)).permute(2, 0, 1)
        if not self.is_stack:
            return torch.addmm(weight, b[0], a[0], alpha=self.scaling)
        left, right = (a.mT, b.mT) if self.is_transposed else (b, a)
        return torch.baddbmm(weight, left, right, alpha=self.scaling)


def parameter_paths(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Parameters by path of the module that owns them, for names that are paths or endings of paths.

    Raises:
        TargetError: a name matches no parameter, or one that is neither a matrix nor a stack of matrices.
    """
    found: dict[str, list[str]] = {}
    problems = []
    wrong = "is neither a matrix nor a stack of matrices"
    modules = base_modules(model)
    packed = [f"{path}.weight" for path, module in modules.items() if is_packed(module)]
    owned = {
        f"{path}.{name}".lstrip("."): (path, name, parameter)
        for path, module in modules.items()
        for name, parameter in module.named_parameters(recurse=False)
        if f"{path}.{name}" not in packed
    }
    for wanted in names:
        hits = [full for full in owned if full == wanted or full.endswith(f".{wanted}")]
        quantised = [full for full in packed if full == wanted or full.endswith(f".{wanted}")]
        if quantised:
            problems.append(f"{quantised[0]} is quantised: name its layer in target_modules")
        elif not hits:
            problems.append(f"{wanted!r} matches no parameter")
        problems += [f"{full} {wrong}" for full in hits if owned[full][2].dim() not in (2, 3)]
    for full, (path, name, _) in owned.items():
        if any(full == wanted or full.endswith(f".{wanted}") for wanted in names):
            found.setdefault(path, []).append(name)
    if problems:
        stacks = [full for full, (_, _, parameter) in owned.items() if parameter.dim() == 3]
        raise TargetError(
            "target_parameters does not fit this model.",
            problems=problems,
            fix=f"Name matrices or stacks of matrices, such as {stacks[0]!r}." if stacks else "",
        )
    return {path: tuple(found[path]) for path in found}


def parameter_places(
    paths: Mapping[str, Sequence[str]], updates: Mapping[str, Update], *, taken: Sequence[str]
) -> dict[str, Maker]:
    """Makers by path of the owning module; `updates` by path of the parameter.

    Raises:
        TargetError: `taken`, where the same adapter puts something else, names one of these modules.
    """
    if clash := sorted(set(paths) & set(taken)):
        raise TargetError(
            "Modules are named by target_parameters and by another field of the same config.",
            problems=clash,
            fix="Take them out of one of the two.",
        )
    return {
        path: partial(_build, updates={name: updates[f"{path}.{name}".lstrip(".")] for name in names})
        for path, names in paths.items()
    }


def _build(layer: Layer, *, updates: Mapping[str, Update]) -> ParameterLora:
    return ParameterLora(layer.module, updates)
