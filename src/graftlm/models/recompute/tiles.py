"""Feed-forward parts over many rows, a tile of rows at a time: only a tile's intermediate values exist.

Rows do not mix there, so tiles give the same outputs. Nothing but the input is kept; in backward each tile is
computed again and at once followed back. The gradients of the part's parameters are sums over tiles, so they
agree with those of all rows together within rounding. Dropout draws anew for each tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graftlm.models.recompute.exchange import exchanged
from graftlm.models.recompute.keeping import Kept
from graftlm.models.recompute.places import FeedForward
from graftlm.models.recompute.replay import RandomState

ROWS = 2048
"""Rows of a tile: enough for matrix units."""
FROM = 4096
"""Rows from which tiles are used."""


@contextmanager
def tiled_feed_forwards(parts: tuple[FeedForward, ...], least: int | None = None) -> Iterator[None]:
    """Inside, these parts take `least` rows (default: `FROM`) and more in tiles while they are trained."""
    least = FROM if least is None else least
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(exchanged(part.module, partial(_tiled, part.module, least)))
        yield


def _tiled(module: nn.Module, least: int, plain: Callable[..., Any]) -> Callable[..., Any]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        is_long = x.dim() == 3 and x.shape[0] * x.shape[1] >= least
        learns = module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if args or kwargs or not (is_long and learns):
            return plain(x, *args, **kwargs)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if not (x.requires_grad or trained):
            return plain(x)
        # Kept before anything is computed: a layer that is repeated for this input alone can stop here.
        return _Tiles.apply(Kept(x), plain, x, *trained)  # type: ignore[no-untyped-call]

    return forward


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kept: Kept, plain: Callable[[Tensor], Tensor], x: Tensor, *trained: Tensor
    ) -> Tensor:
        ctx.kept, ctx.plain, ctx.trained = kept, plain, trained
        ctx.random = RandomState(x.device)
        rows = x.reshape(1, -1, x.shape[-1])
        out: Tensor | None = None
        for start in range(0, rows.shape[1], ROWS):
            tile = plain(rows[:, start : start + ROWS])
            if out is None:
                out = tile.new_empty(1, rows.shape[1], tile.shape[-1])
            out[:, start : start + ROWS] = tile
        assert out is not None
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.kept.tensors()
        need_x, need_trained = ctx.needs_input_grad[2], ctx.needs_input_grad[3:]
        rows = x.reshape(1, -1, x.shape[-1])
        grad = grads[0].reshape(1, -1, grads[0].shape[-1])
        dx = torch.empty_like(rows) if need_x else None
        wanted = [each for each, need in zip(ctx.trained, need_trained, strict=True) if need]
        sums: list[Tensor | None] = [None] * len(wanted)
        with ctx.random.replayed():
            for start in range(0, rows.shape[1], ROWS):
                here = slice(start, start + ROWS)
                tile = rows[:, here].detach().requires_grad_(need_x)
                with torch.enable_grad():
                    out = ctx.plain(tile)
                inputs = [tile, *wanted] if need_x else wanted
                found = list(torch.autograd.grad(out, inputs, grad[:, here], allow_unused=True))
                if dx is not None:
                    dx[:, here] = found.pop(0)
                sums = [_plus(total, part) for total, part in zip(sums, found, strict=True)]
        by_parameter = iter(sums)
        of_trained = [next(by_parameter) if need else None for need in need_trained]
        return None, None, dx.view(x.shape) if dx is not None else None, *of_trained


def _plus(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if total is None or part is None:
        return part if total is None else total
    return total + part
