"""What an optimizer remembers, as named tensors for a checkpoint, and back to the last bit.

Keys are "<state>/<parameter name>"; tables that the states of all parameters share are stored once, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.core.errors import CheckpointError
from graftlm.training.low_bit_optim import CONSTANTS, empty_state, fill_state, is_low_bit

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""The state of torch's AdamW."""

Read = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Reads tensors of exactly the given names, shapes and dtypes, or raises a `CheckpointError`."""


def state_tensors(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """The state of every parameter that has one; empty before the first update."""
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        found |= _named(name, optimizer.state.get(parameter, {}))
    return found


def load_state(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    names: Collection[str],
    read: Read,
) -> Callable[[], None]:
    """Read what `state_tensors` gave, and return the function that puts it into a fresh optimizer.

    `names` are those of the file. A parameter that never had a gradient has no state.

    Raises:
        CheckpointError: the state belongs to another optimizer or other parameters; nothing has changed.
    """
    having = [name for name in parameters if f"step/{name}" in names]
    if is_low_bit(optimizer):
        return _load_low_bit({name: parameters[name] for name in having}, optimizer, read)
    expected = {f"step/{name}": torch.zeros((), dtype=torch.float32) for name in having}
    expected |= {f"{key}/{name}": parameters[name] for name in having for key in MOMENTS[1:]}
    saved = read(expected)
    return lambda: _put(optimizer, parameters, saved)


def _load_low_bit(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, read: Read
) -> Callable[[], None]:
    states = {name: empty_state(optimizer, parameter) for name, parameter in parameters.items()}
    expected: dict[str, Tensor] = {}
    for name, state in states.items():
        expected |= _named(name, state)
    try:
        saved = read(expected)
    except CheckpointError:
        optimizer.state.clear()
        raise

    def put() -> None:
        for name, state in states.items():
            fill_state(state, {key: saved[_key(key, name)] for key in state})

    return put


def _named(name: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        _key(key, name): value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)
        for key, value in state.items()
    }


def _key(key: str, name: str) -> str:
    return key if key in CONSTANTS else f"{key}/{name}"


def _put(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]
) -> None:
    """Through the optimizer's own loader, which knows on which device it wants its step counts."""
    names = {parameter: name for name, parameter in parameters.items()}
    groups = optimizer.state_dict()["param_groups"]
    state = {}
    for group, numbered in zip(optimizer.param_groups, groups, strict=True):
        for parameter, number in zip(group["params"], numbered["params"], strict=True):
            name = names[parameter]
            if f"step/{name}" in saved:
                # Cloned: the tensors that were read are backed by the checkpoint's file.
                state[number] = {key: saved[f"{key}/{name}"].clone() for key in MOMENTS}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
