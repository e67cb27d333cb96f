"""Everything about a model that an adapter may not leave behind, written down to be compared later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from graftlm.testing.expect import expect

HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_forward_hooks_always_called"),
)
INNER = frozenset(("_parameters", "_buffers", "_modules", "training", *HOOKS))


def snapshot(model: nn.Module) -> Callable[[], None]:
    """A function that asserts that nothing in the model differs from now.

    Compared are module objects, parameter objects and their bytes, `requires_grad`, `training`, buffers,
    hooks, attributes of every module, and the model's config.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> unchanged = snapshot(model)
    >>> hook = model[0].register_forward_hook(print)
    >>> unchanged()
    Traceback (most recent call last):
    AssertionError: hooks of '0' changed
    """
    modules = _modules(model)
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = _parameters(model)
    inner = {name: _inner(module) for name, module in modules}
    config = _config(model)

    def check() -> None:
        now = _modules(model)
        expect([n for n, _ in now] == [n for n, _ in modules], f"modules changed: {_first(now, modules)}")
        for (name, module), (_, before) in zip(now, modules, strict=True):
            expect(module is before, f"module {name!r} is another object than before")
        _check_parameters(_parameters(model), parameters)
        state = model.state_dict()
        expect(
            state.keys() == values.keys(), f"the state dict has other keys: {state.keys() ^ values.keys()}"
        )
        for name, value in values.items():
            expect(torch.equal(state[name], value), f"{name} has other values")
        for name, module in now:
            after = _inner(module)
            for what, before in inner[name].items():
                expect(after[what] == before, f"{what} of {name!r} changed")
        expect(_config(model) == config, "the model's config changed")

    return check


def _check_parameters(
    now: list[tuple[str, nn.Parameter, bool]], before: list[tuple[str, nn.Parameter, bool]]
) -> None:
    expect([n for n, _, _ in now] == [n for n, _, _ in before], "parameters were added or removed")
    for (name, parameter, flag), (_, old, old_flag) in zip(now, before, strict=True):
        expect(parameter is old, f"parameter {name} is another object than before")
        expect(flag == old_flag, f"requires_grad of {name} is {flag}, before {old_flag}")


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(model.named_modules(remove_duplicate=False))


def _parameters(model: nn.Module) -> list[tuple[str, nn.Parameter, bool]]:
    return [(n, p, p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)]


def _inner(module: nn.Module) -> dict[str, Any]:
    """What a module holds beside parameters, buffers and children."""
    hooks = {key: list(vars(module).get(key, {}).values()) for key in HOOKS}
    attributes = {key: value for key, value in vars(module).items() if key not in INNER}
    plain = {key: value for key, value in attributes.items() if isinstance(value, bool | int | float | str)}
    return {
        "training": module.training,
        "hooks": hooks,
        "attributes": sorted(attributes),
        "values of attributes": plain,
    }


def _config(model: nn.Module) -> Any:
    """`problem_type` aside: transformers itself writes it when a classifier first computes a loss."""
    config: Any = getattr(model, "config", None)
    return {**config.to_dict(), "problem_type": None} if hasattr(config, "to_dict") else None


def _first(now: list[tuple[str, nn.Module]], before: list[tuple[str, nn.Module]]) -> list[str]:
    return sorted({n for n, _ in now} ^ {n for n, _ in before})[:3]
