"""Feed-forward parts that keep their input only; all inside comes back in backward, without the last product.

What the last linear layer needs is what the part computes up to it. So the computation is repeated up to
that layer and no further: of a gated part two products of three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from graftlm.core.errors import TrainingError
from graftlm.kernels.sources import forget, source_of
from graftlm.models.recompute.exchange import exchanged
from graftlm.models.recompute.keeping import Kept
from graftlm.models.recompute.places import FeedForward
from graftlm.models.recompute.replay import RandomState

Forward = Callable[[Tensor], Tensor]


@contextmanager
def recomputed_feed_forwards(parts: tuple[FeedForward, ...]) -> Iterator[None]:
    """Inside, these parts recompute while they are trained; the same gradients to the bit."""
    with ExitStack() as stack:
        for part in parts:
            recomputed = _Recomputed(part.module)
            stack.callback(part.end.register_forward_pre_hook(recomputed.at_end).remove)
            stack.enter_context(exchanged(part.module, recomputed.around))
        yield


class _Recomputed:
    """The forward of one part, and the call that is going on in it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.call: _Call | None = None

    def around(self, plain: Forward) -> Callable[..., Any]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if args or kwargs or not _learns(self.module, x):
                return plain(x, *args, **kwargs)
            call = _Call(self, plain, x)
            forget(x)  # inside it counts as given, the first time as when it is repeated
            with saved_tensors_hooks(call.pack, call.unpack), self.going_on(call):
                y = plain(x)
            call.finish()
            return y

        return forward

    @contextmanager
    def going_on(self, call: _Call) -> Iterator[None]:
        before, self.call = self.call, call
        try:
            yield
        finally:
            self.call = before

    def at_end(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        """The last layer is about to be called."""
        if self.call is not None and arguments and isinstance(arguments[0], Tensor):
            self.call.reached_end(arguments[0])


def _learns(module: nn.Module, x: Tensor) -> bool:
    if not (module.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return False  # what a compiled layer keeps is the compiler's choice
    return x.requires_grad or any(parameter.requires_grad for parameter in module.parameters())


@dataclass(frozen=True)
class _Inner:
    """The n-th tensor that was saved before the end."""

    number: int


@dataclass(frozen=True)
class _Middle:
    """The input of the last layer, or a view of it."""

    shape: torch.Size
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Other:
    """The n-th tensor that the last layer saved besides its input: thin ones and parameters."""

    number: int


class _End(Exception):
    """The repetition has come as far as it needs to."""


class _Call:
    """One call of a part. It lives as long as the graph refers to a tensor saved in it."""

    def __init__(self, owner: _Recomputed, plain: Forward, x: Tensor) -> None:
        self._owner, self._plain = owner, plain
        source = source_of(x)
        self._producer = source.producer if source else None
        self._input, self._requires_grad = Kept(*(source.inputs if source else (x,))), x.requires_grad
        self._random = RandomState(x.device)
        self._middle: Tensor | None = None
        """While the call goes on: the input of the last layer."""
        self._saved = 0
        self._others: list[Tensor] = []
        self._kept: tuple[Tensor, ...] | Kept = ()
        self._again: list[Tensor] | None = None
        self._middle_again: Tensor | None = None

    def pack(self, tensor: Tensor) -> _Inner | _Middle | _Other:
        middle = self._middle
        if middle is None:
            self._saved += 1
            return _Inner(self._saved - 1)
        if _place(tensor) == _place(middle) and tensor.numel() == middle.numel():
            return _Middle(tensor.shape, tensor.stride())
        self._others.append(tensor)
        return _Other(len(self._others) - 1)

    def reached_end(self, middle: Tensor) -> None:
        """In forward: from here on little is saved. In backward: all is there."""
        forget(middle)  # what it was made of is gone by then
        if self._again is not None:
            self._middle_again = middle.detach()
            raise _End
        self._middle = middle.detach()

    def finish(self) -> None:
        """The call is over: what the last layer saved is kept as if it had been saved outside."""
        self._kept, self._others, self._middle = Kept(*self._others), [], None

    def unpack(self, saved: _Inner | _Middle | _Other) -> Tensor:
        if isinstance(saved, _Other):
            if isinstance(self._kept, Kept):
                self._kept = self._kept.tensors()  # once: hooks around this place may allow no more
            return self._kept[saved.number]
        if self._again is None:
            self._repeat()
        if isinstance(saved, _Inner):
            assert self._again is not None
            return self._again[saved.number]
        assert self._middle_again is not None
        return self._middle_again.as_strided(saved.shape, saved.stride)

    def _repeat(self) -> None:
        inputs = self._input.tensors()
        x = self._producer(*inputs).detach() if self._producer else inputs[0]
        found: list[Tensor] = []
        self._again = found
        keep = saved_tensors_hooks(lambda tensor: found.append(tensor.detach()), _never)
        again = self._owner.going_on(self)
        with torch.enable_grad(), self._random.replayed(), keep, again, suppress(_End):
            self._plain(x.requires_grad_(self._requires_grad))
        if len(found) < self._saved:
            raise TrainingError(
                f"A feed-forward part saved {self._saved} tensors, and {len(found)} when it was repeated.",
                meaning="It computes in another way the second time; its gradient would be wrong.",
                fix="Set train.recompute to nothing or everything.",
            )


def _never(_: object) -> Tensor:
    raise AssertionError("the repetition has no backward of its own")


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where its values are, or would be: also of a tensor without values."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())
