"""AdamW with its state in 8 bits, or in pages that a GPU lends from the machine: those of bitsandbytes.

8-bit optimizers: Dettmers et al. 2022, arXiv 2110.02861. Tensors of fewer than 4,096 values keep 32 bits.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.core.errors import MissingDependency
from graftlm.core.notices import notice

EXTRA = "quant"
CONSTANTS = ("qmap1", "qmap2")
"""What the codes of a state mean: tables of 256 values that all tensors share."""


@dataclass(frozen=True)
class _Form:
    """One of bitsandbytes' classes, and the one that stands in where nothing can be paged."""

    paged: str
    unpaged: str


FORMS: Mapping[str, _Form] = {
    "adamw_8bit": _Form("AdamW8bit", "AdamW8bit"),
    "paged_adamw_8bit": _Form("PagedAdamW8bit", "AdamW8bit"),
    "paged_adamw_32bit": _Form("PagedAdamW32bit", "AdamW32bit"),
}


def require_optimizer(name: str) -> None:
    """Refuse an optimizer whose package is not installed, before anything is loaded.

    Raises:
        MissingDependency: names the extra that brings it.
    """
    if name in FORMS:
        _bitsandbytes()


def make_low_bit(
    name: str, groups: Sequence[dict[str, Any]], rate: float, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer of that name over the given groups.

    Without CUDA there is nothing to page to, and the same optimizer keeps its state in plain memory.

    Raises:
        MissingDependency: bitsandbytes is not installed.
    """
    form = FORMS[name]
    chosen = form.paged if device.type == "cuda" else form.unpaged
    if chosen != form.paged:
        notice(f"{name} runs without paging: there is no CUDA device whose memory could be paged.")
    made: torch.optim.Optimizer = getattr(_bitsandbytes().optim, chosen)(list(groups), lr=rate)
    return made


def is_low_bit(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is one of these, which keep `step` as a number and share their tables."""
    return type(optimizer).__module__.startswith("bitsandbytes")


def empty_state(optimizer: Any, parameter: nn.Parameter) -> dict[str, Any]:
    """Make the state of one parameter as it is before the first update, paged where it is to be paged."""
    for number, group in enumerate(optimizer.param_groups):
        for place, own in enumerate(group["params"]):
            if own is parameter:
                optimizer.init_state(group, parameter, number, place)
    state: dict[str, Any] = optimizer.state[parameter]
    if parameter.device.type == "cuda":
        torch.cuda.synchronize(parameter.device)  # pages are filled with zeros behind the host's back
    return state


def fill_state(state: dict[str, Any], saved: Mapping[str, Tensor]) -> None:
    """Put saved values into the tensors of `state`: pages stay pages, shared tables stay shared."""
    for key, value in saved.items():
        if key == "step":
            state[key] = int(value)
        else:
            state[key].copy_(value)


def _bitsandbytes() -> Any:
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns about kernels for inference, which nobody asked for
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise MissingDependency("bitsandbytes", extra=EXTRA) from error
    finally:
        log.setLevel(level)
