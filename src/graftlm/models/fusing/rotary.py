"""Rotary embeddings of queries and keys, in one pass over both."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.kernels.pointwise import rope
from graftlm.quant.facts import device_of, dtype_of

_NAME = "apply_rotary_pos_emb"
"""What model code calls the function that turns queries and keys, a global of its file."""

Rotation = Callable[..., tuple[Tensor, Tensor]]
Globals = dict[str, Any]


@dataclass(frozen=True)
class Rotations:
    """Functions of model code that have a stand-in, each in the globals where attention parts look it up."""

    total: int
    """Attention parts that call such a function."""
    covered: int
    """Those among them whose function has a stand-in."""
    stand_ins: tuple[tuple[Globals, Rotation], ...]

    @property
    def summary(self) -> str:
        """As every `FasterPart`.

        >>> Rotations(4, 4, ()).summary
        '4 of 4 rotary embeddings'
        """
        return f"{self.covered} of {self.total} rotary embeddings"

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The globals hold the stand-ins, for every model of the same code; then the functions again."""
        before = [(place, place[_NAME]) for place, _ in self.stand_ins]
        for place, stand_in in self.stand_ins:
            place[_NAME] = stand_in
        try:
            yield
        finally:
            for place, function in reversed(before):
                place[_NAME] = function


def rotary_embeddings(model: nn.Module) -> Rotations:
    """The rotary embeddings of a model whose code turns halves of heads."""
    callers = [(module, place) for module in model.modules() if (place := _place(module)) is not None]
    found: dict[int, tuple[Globals, Rotation] | None] = {}
    for module, place in callers:
        if id(place) not in found:
            stand_in = _stand_in(place[_NAME], module)
            found[id(place)] = None if stand_in is None else (place, stand_in)
    covered = sum(found[id(place)] is not None for _, place in callers)
    return Rotations(len(callers), covered, tuple(each for each in found.values() if each is not None))


def _place(module: nn.Module) -> Globals | None:
    """The globals in which the forward of its class looks the function up; None if it does not."""
    forward = inspect.unwrap(type(module).forward)
    code, place = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    return place if code is not None and _NAME in code.co_names and _NAME in place else None


def _stand_in(plain: Rotation, caller: nn.Module) -> Rotation | None:
    """One that computes what `plain` does, wherever shapes fit; None if the operator does not."""
    whole, part = (_agrees(plain, caller, turning) for turning in (8, 4))
    if not (whole or part):
        return None

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        fits = not (rest or named) and _fits(q, k, cos, sin)
        if fits and (whole if cos.shape[-1] == q.shape[-1] else part):
            return rope(q, k, cos, sin)
        return plain(q, k, cos, sin, *rest, **named)

    return rotate


def _fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    if not (q.dim() == k.dim() == 4 and cos.dim() == 3 and cos.shape == sin.shape and q.dtype == k.dtype):
        return False
    (batch, _, tokens, width), (rows, angles, turning) = q.shape, cos.shape
    of_k = (k.shape[0], k.shape[2], k.shape[3])
    turns = turning <= width and turning % 2 == 0 and not (cos.requires_grad or sin.requires_grad)
    return turns and of_k == (batch, tokens, width) and rows in (1, batch) and angles == tokens


@torch.no_grad()
def _agrees(plain: Rotation, caller: nn.Module, turning: int) -> bool:
    """Whether both turn the first `turning` of 8 values the same way."""
    dtype, device = dtype_of(caller), device_of(caller)
    values = torch.linspace(-2.0, 2.0, 2 * 3 * 3 * 8).view(2, 3, 3, 8).to(device=device, dtype=dtype)
    q, k = values, values[:, 1:]
    angle = torch.linspace(0.0, 3.0, 2 * 3 * (turning // 2)).view(2, 3, turning // 2).to(device)
    angle = torch.cat((angle, angle), dim=-1)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    try:
        expected = plain(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError):  # it takes other arguments
        return False
    if not (isinstance(expected, tuple) and len(expected) == 2):
        return False
    tolerance = 8 * torch.finfo(dtype).eps
    return all(
        theirs.shape == mine.shape and bool(((mine - theirs).abs().max() <= tolerance).all())
        for mine, theirs in zip(rope(q, k, cos, sin), expected, strict=True)
    )
