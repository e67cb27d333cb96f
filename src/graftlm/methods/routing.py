"""One adapter per row of a batch, in forward, in training and in `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.core.errors import AdapterError
from graftlm.methods.place import Place, Route


class Router:
    """Sends row i of every batch to the adapter `rows[i]`; only `generate` may repeat rows, for beams."""

    def __init__(self, rows: Sequence[str | None], places: Iterable[Place]) -> None:
        self.rows = tuple(rows)
        self.places = tuple(places)
        self.is_generating = False

    def show(self, batch: int) -> None:
        """Tell every place which rows of a batch of this size belong to whom."""
        repeats, rest = divmod(batch, len(self.rows))
        if rest or repeats == 0 or (repeats > 1 and not self.is_generating):
            raise AdapterError(
                f"The batch has {batch} rows, but {len(self.rows)} were routed.",
                meaning="Routing names one adapter for each row of the batch.",
                fix="Give routed() exactly one name (or None for the base) per row.",
            )
        expanded = [name for name in self.rows for _ in range(repeats)]
        route = Route(
            {
                name: torch.tensor([i for i, n in enumerate(expanded) if n == name])
                for name in dict.fromkeys(expanded)
            },
            batch,
        )
        for place in self.places:
            place.route = route

    def hide(self) -> None:
        """The inverse of `show`."""
        for place in self.places:
            place.route = None

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook: batches may differ in size between calls."""
        self.show(batch_size(args, kwargs))

    def generating(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`generate` with rows that repeat for beams and samples."""

        @wraps(generate)
        def routed_generate(*args: Any, **kwargs: Any) -> Any:
            self.is_generating = True
            try:
                self.show(len(self.rows))
                return generate(*args, **kwargs)
            finally:
                self.is_generating = False

        return routed_generate


def batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Rows of the batch that a model's forward gets."""
    named = (kwargs.get(key) for key in ("input_ids", "inputs_embeds", "decoder_input_ids", "attention_mask"))
    for value in (*args, *named, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    raise AdapterError("The model was called without a tensor, so there are no rows to route.")


SHARED_BY_ROWS = ("relative_attention_bias", "embed_positions")
"""Ends of paths of layers that are called once for the whole batch: no row has an output of its own."""


@contextmanager
def routed(model: nn.Module, rows: Sequence[str | None], places: Mapping[str, Place]) -> Iterator[None]:
    """Route rows for the length of the block; everything is as before afterwards, also after an error."""
    _refuse_shared(rows, places)
    router = Router(rows, places.values())
    hook = model.register_forward_pre_hook(router.before_forward, with_kwargs=True)
    generate = getattr(model, "generate", None)
    is_own = "generate" in vars(model)
    if generate is not None:
        object.__setattr__(model, "generate", router.generating(generate))
    try:
        router.show(len(router.rows))
        yield
    finally:
        hook.remove()
        router.hide()
        if is_own:
            object.__setattr__(model, "generate", generate)
        elif generate is not None:
            object.__delattr__(model, "generate")


def require_routable(rows: Sequence[str | None], merged: Sequence[str]) -> None:
    """Refuse what cannot be routed.

    Raises:
        AdapterError: no rows, or an adapter that is merged.
    """
    if not rows or merged:
        raise AdapterError(
            "No rows were given to route." if not rows else f"Adapters {list(merged)} are merged.",
            meaning="" if not rows else "A merged adapter acts on every row.",
            fix="Give one name per row." if not rows else "First adapters.unmerge().",
        )


def _refuse_shared(rows: Sequence[str | None], places: Mapping[str, Place]) -> None:
    wanted = {name for name in rows if name is not None}
    problems = [
        f"{name} adapts {path}"
        for path, place in places.items()
        if path.endswith(SHARED_BY_ROWS)
        for name in place.names
        if name in wanted
    ]
    if problems:
        raise AdapterError(
            "These adapters cannot be routed by row.",
            problems=problems,
            meaning="The model computes these layers once for the whole batch.",
            fix="Exclude them with exclude_modules, or run the rows of each adapter in a batch of their own.",
        )
