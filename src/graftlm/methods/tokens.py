"""Trainable token rows: chosen rows of an embedding table are trained, the rest of the table stays frozen.

For new tokens, or a few old ones, at n x dim numbers instead of a whole table. The rows *replace* those of
the base. Wherever the same table is used again (a tied output head, the embeddings of an encoder-decoder),
the same rows take effect.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from pydantic import field_validator
from torch import Tensor, nn

from graftlm.core.errors import TargetError
from graftlm.methods.base import Dense, Layer, LayerAdapter, Maker, MethodConfig, Part
from graftlm.methods.low_rank import embedding_scale
from graftlm.methods.site import Site, base_modules
from graftlm.quant.facts import is_in_few_bits

Indices = tuple[int, ...]


class TrainableTokensConfig(MethodConfig):
    """Trained rows of embedding tables, and nothing else.

    >>> TrainableTokensConfig(token_indices=[3, 3])
    Traceback (most recent call last):
    graftlm.core.errors.ConfigError: TrainableTokensConfig has 1 problem.
      - token_indices: names a token twice (got [3, 3])
      fix: Correct the keys above.
    """

    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"

    token_indices: Indices
    """The ids of the tokens whose rows are trained."""
    target_modules: str | tuple[str, ...] | None = None
    """The embedding: a path, an ending of paths, a list of them or one expression for whole paths; by default
    the model's input embedding."""

    @field_validator("token_indices")
    @classmethod
    def _are_ids(cls, value: Indices) -> Indices:
        return checked_ids(value)

    @field_validator("modules_to_save")
    @classmethod
    def _nothing_else(cls, value: tuple[str, ...] | None) -> None:
        if value:
            raise ValueError(
                "cannot be written beside token rows alone; LoraConfig(trainable_token_indices=...) has both"
            )

    def places(self, model: nn.Module) -> Mapping[str, Maker]:
        wanted = self.target_modules
        if wanted is None:
            return token_places(model, self.token_indices, TokenRows)
        names = (wanted,) if isinstance(wanted, str) else wanted
        return token_places(model, dict.fromkeys(names, self.token_indices), TokenRows)

    def link(self, parts: Mapping[str, Part]) -> None:
        link_tied(parts)


class TokenRows(LayerAdapter):
    """The table of an embedding or an output head with some rows replaced.

    Shape: trainable_tokens_delta [n, dim]. The name is PEFT's; it holds whole rows, in the order of the ids.
    """

    is_additive: ClassVar[bool] = True

    def __init__(self, base: nn.Embedding | nn.Linear, token_indices: Sequence[int]) -> None:
        super().__init__()
        ids, order = torch.tensor(tuple(token_indices)).sort()
        rows = base.weight.detach()[torch.tensor(tuple(token_indices))].float()
        self.trainable_tokens_delta = nn.Parameter(rows.clone())
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("origin", rows.clone(), persistent=False)
        self.ids: Tensor
        self.order: Tensor
        self.origin: Tensor
        self.use = TableUse(base)

    def change(self) -> Tensor:
        """What is added to the rows `ids` of the base's table, [n, dim]."""
        return (self.trainable_tokens_delta - self.origin)[self.order]

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return self.use.shifted(x, y, self.ids, self.change())

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        rows = self.trainable_tokens_delta.detach()[self.order].to(dense["weight"].dtype)
        return {"weight": dense["weight"].index_copy(0, self.ids, rows)}


class NestedTokenRows(TokenRows):
    """Token rows that belong to the adapter of another method; files name them otherwise."""


class TiedTokenRows(LayerAdapter):
    """The same rows at a further module that uses the same table. It has no parameters of its own."""

    is_additive: ClassVar[bool] = True

    def __init__(self, base: nn.Embedding | nn.Linear, owner: str) -> None:
        super().__init__()
        self.owner, self.use = owner, TableUse(base)
        self._rows: tuple[TokenRows, ...] = ()  # in a tuple: a module of its own elsewhere, not a child here

    def follow(self, rows: TokenRows) -> None:
        """Take the rows of the part that owns them."""
        self._rows = (rows,)

    @property
    def rows(self) -> TokenRows:
        return self._rows[0]

    def saved(self) -> dict[str, Tensor]:
        """A copy of the rows, as PEFT writes them for token rows alone; nothing within another method."""
        is_nested = isinstance(self.rows, NestedTokenRows)
        return {} if is_nested else {name: rows.clone() for name, rows in self.rows.saved().items()}

    def load_saved(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing: the part that owns the rows loads them."""

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return self.use.shifted(x, y, self.rows.ids, self.rows.change())

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        return self.rows.merged(dense)


class TableUse:
    """How a module uses a table [vocabulary, dim]: as an embedding of ids, or as a head that gives logits."""

    def __init__(self, base: nn.Embedding | nn.Linear) -> None:
        self.is_head = isinstance(base, nn.Linear)
        self.scale = 1.0 if isinstance(base, nn.Linear) else embedding_scale(base)

    def shifted(self, x: Tensor, y: Tensor, ids: Tensor, change: Tensor) -> Tensor:
        """The module's output `y` for the input `x`, with `change` [n, dim] added to the sorted rows `ids`.

        Shapes: embedding x [...], y [..., dim]; head x [..., dim], y [..., vocabulary].
        """
        if self.is_head:
            return y.index_add(-1, ids, x.to(y.dtype) @ change.to(y.dtype).t())
        slot = torch.searchsorted(ids, x).clamp(max=len(ids) - 1)
        is_trained = (ids[slot] == x).unsqueeze(-1)
        precise = torch.promote_types(y.dtype, change.dtype)
        moved = y.to(precise) + change[slot] * self.scale
        return torch.where(is_trained, moved.to(y.dtype), y)


def token_places(
    model: nn.Module,
    indices: Indices | Mapping[str, Indices],
    kind: type[TokenRows],
    *,
    taken: Iterable[str] = (),
    copied: Iterable[str] | None = None,
) -> dict[str, Maker]:
    """Where token rows go: tables that are named (a plain list: the input embedding), and all tied to them.

    Args:
        taken: paths at which the same adapter puts something else.
        copied: names of modules that the adapter copies whole.

    Raises:
        TargetError: a name matches no table, an id lies outside, or the place is taken; all problems at once.
    """
    modules = base_modules(model)
    problems: list[str] = []
    if isinstance(indices, Mapping):
        wanted = {path: ids for name, ids in indices.items() for path in _tables(modules, name, problems)}
    else:
        wanted = dict.fromkeys(_input_embedding(model, modules, problems), indices)
    blocked = {path: "is adapted otherwise by the same config" for path in taken}
    for name in copied or ():
        same = [path for path in modules if path == name or path.endswith(f".{name}")]
        blocked |= dict.fromkeys(same, "is trained whole (modules_to_save)")
    makers: dict[str, Maker] = {}
    owners: dict[str, str] = {}
    for path, ids in wanted.items():
        if is_in_few_bits(modules[path]):
            problems.append(f"{path} is stored in few bits: load the base with its embeddings in 16")
            continue
        table = modules[path].get_parameter("weight")
        if outside := [i for i in ids if i >= len(table)]:
            problems.append(f"{path} has {len(table)} rows: no {outside}")
        if path in owners:
            if ids != wanted[owners[path]]:
                problems.append(f"{path} and {owners[path]} share one table, but name different tokens")
            continue
        makers[path] = partial(_owned, kind=kind, ids=ids)
        for other in _tied(modules, path):
            owners[other] = path
            makers[other] = partial(_following, owner=path)
    problems += [f"{path} {blocked[path]}" for path in makers if path in blocked]
    if problems:
        raise TargetError(
            "Token rows cannot go where they are asked for.",
            problems=problems,
            fix="Name an embedding that nothing else of this adapter changes, and ids of its tokens"
            " (model.resize_token_embeddings comes before attaching).",
        )
    return makers


def link_tied(parts: Mapping[str, Part]) -> None:
    """Let every tied use know the rows that it follows; for `MethodConfig.link`."""
    for part in parts.values():
        if isinstance(part, TiedTokenRows):
            owner = parts[part.owner]
            assert isinstance(owner, TokenRows)
            part.follow(owner)


def checked_ids(ids: Indices) -> Indices:
    """Token ids as a config may name them; ValueError otherwise, for pydantic."""
    if not ids or min(ids) < 0:
        raise ValueError("needs token ids, counted from 0")
    if len(set(ids)) < len(ids):
        raise ValueError("names a token twice")
    return ids


def _owned(layer: Layer, *, kind: type[TokenRows], ids: Indices) -> Part:
    return kind(_table(layer.module), ids)


def _following(layer: Layer, *, owner: str) -> Part:
    return TiedTokenRows(_table(layer.module), owner)


def _table(module: nn.Module) -> nn.Embedding | nn.Linear:
    assert isinstance(module, nn.Embedding | nn.Linear)
    return module


def _is_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.Linear) and not is_in_few_bits(module)


def _tables(modules: Mapping[str, nn.Module], name: str, problems: list[str]) -> list[str]:
    paths = [path for path in modules if path == name or path.endswith(f".{name}")]
    paths = paths or [path for path in modules if re.fullmatch(name, path)]
    found = [path for path in paths if _is_table(modules[path])]
    if not found:
        problems.append(f"{name!r} matches no embedding")
    return found


def _input_embedding(model: nn.Module, modules: Mapping[str, nn.Module], problems: list[str]) -> list[str]:
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    embedding = embedding.base_layer if isinstance(embedding, Site) else embedding
    paths = [path for path, module in modules.items() if module is embedding]
    if not paths:
        problems.append("the model has no input embedding; name the table: {'embed_tokens': [ids]}")
    return paths


def _tied(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    """Other modules whose weight is the very same storage."""
    weight = modules[path].get_parameter("weight")
    return [
        other
        for other, module in modules.items()
        if other != path and _is_table(module) and _is_same(module.get_parameter("weight"), weight)
    ]


def _is_same(one: Tensor, other: Tensor) -> bool:
    same_place = one.data_ptr() == other.data_ptr() != 0
    return one is other or (same_place and one.shape == other.shape and one.dtype == other.dtype)
