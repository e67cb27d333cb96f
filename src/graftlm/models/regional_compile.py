"""Decoder layers through `torch.compile`, one compiled code for all that are equal, while a model is trained.

The compiled code is that of a layer's forward as it runs: with the faster parts of `models.fusing` in place
and inside of activation checkpointing. It is compiled for one number of tokens; batches are filled up to that
(`data.filled`). Evaluation, which has other shapes, runs as before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graftlm.core.errors import TrainingError
from graftlm.core.notices import notice
from graftlm.data.forms import PARENTS
from graftlm.methods.families import blocks_of
from graftlm.methods.site import base_modules
from graftlm.models.recompute.exchange import exchanged

STARTS = "cu_seq_lens_q"
_CHECKPOINTING = "forward_with_checkpointing"
"""The code of `transformers` around a layer's own forward, which stays outside."""


Failure = Literal["stop", "go on"]
"""What follows if the compiler fails: an error, or a notice and layers that run as before."""


@dataclass(frozen=True)
class CompiledLayers:
    """The layers that are compiled, by path, of `total`."""

    total: int
    layers: Mapping[str, nn.Module]
    on_failure: Failure

    @property
    def summary(self) -> str:
        """As every `FasterPart`."""
        return f"{len(self.layers)} of {self.total} layers compiled"

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, they are compiled at their first call. Entered after all other parts.

        Raises:
            TrainingError: at that call, if the compiler fails and the run shall stop then.
        """
        compiler = _Compiler(self.on_failure)
        with ExitStack() as stack:
            for layer in self.layers.values():
                stack.enter_context(exchanged(layer, partial(compiler.around, layer)))
            yield


def compiled_layers(
    model: nn.Module, leaving_out: Collection[nn.Module] = (), *, on_failure: Failure = "stop"
) -> CompiledLayers:
    """The numbered layers of a model but for some, whose forward another part will stand in for."""
    modules = base_modules(model)
    layers = {block.path: modules[block.path] for block in blocks_of(model)}
    own = {path: layer for path, layer in layers.items() if layer not in leaving_out}
    return CompiledLayers(len(layers), own, on_failure)


def own_forward(layer: nn.Module) -> Callable[..., Any]:
    """What the class of a layer computes, without the switch for checkpointing around it."""
    found: Any = type(layer).forward
    is_wrapped = getattr(getattr(found, "__code__", None), "co_name", "") == _CHECKPOINTING
    own: Callable[..., Any] = found.__wrapped__ if is_wrapped and hasattr(found, "__wrapped__") else found
    return own


class _Compiler:
    """Compiled forwards of layers that are given up together."""

    def __init__(self, on_failure: Failure) -> None:
        # Imported here: whoever does not compile need not load a compiler.
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor.exc import InductorError

        self.errors = (TorchDynamoException, InductorError)
        self.on_failure = on_failure
        self.has_failed = False

    def around(self, layer: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
        """The forward that stands in for `plain`: that of the class, or what another part put there."""
        is_own = getattr(plain, "__func__", None) is type(layer).forward
        own = partial(own_forward(layer), layer) if is_own else plain
        compiled = torch.compile(own_forward(layer), dynamic=None)

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            starts = kwargs.get(STARTS)
            is_training = layer.training and torch.is_grad_enabled()
            has_virtual = isinstance(starts, Tensor) and int(starts[-1]) != hidden_states.shape[1]
            if self.has_failed or not is_training or has_virtual:
                return own(hidden_states, *args, **kwargs)
            if isinstance(starts, Tensor):
                for numbers in (starts, kwargs.get(PARENTS)):
                    if isinstance(numbers, Tensor):
                        torch._dynamo.maybe_mark_dynamic(numbers, 0)  # how many documents there are
            try:
                return compiled(layer, hidden_states, *args, **kwargs)
            except self.errors as error:
                self._give_up(layer, str(error).strip().splitlines()[0], error)
            return own(hidden_states, *args, **kwargs)

        return forward

    def _give_up(self, layer: nn.Module, reason: str, error: Exception) -> None:
        self.has_failed = True
        seen = f"torch.compile failed on {type(layer).__name__}: {reason}"
        if self.on_failure == "stop":
            raise TrainingError(
                seen,
                meaning="The model is fine; its layers cannot be compiled here (no compiler, or code that "
                "torch does not take).",
                fix="train.compile: off",
            ) from error
        notice(f"{seen}. Layers run as they are; train.compile: off does not try.")
