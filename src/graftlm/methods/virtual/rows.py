"""Virtual tokens of a batch: which rows have which, from the adapters that are shown or routed.

Two kinds: tokens of the *input* (prompt tuning), which the layers read like any token, and tokens of the
*cache* (prefix tuning), whose keys and values every layer finds there. In a row the latter come first.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm.methods.base import ModelAdapter, Part
from graftlm.methods.place import Route


class InputTokens(ModelAdapter):
    """Virtual tokens that the layers read."""

    @abstractmethod
    def embeddings(self) -> Tensor:
        """Shape: [tokens, hidden size]."""


class CacheTokens(ModelAdapter):
    """Virtual tokens whose keys and values stand in the cache."""

    @abstractmethod
    def states(self) -> Tensor:
        """Shape: [layers, 2, heads, tokens, head dim]; keys before values."""


@dataclass(frozen=True)
class Group:
    """Rows that have the same adapters; `name` identifies these."""

    name: tuple[str, ...]
    parts: tuple[Part, ...]
    first_row: int

    @property
    def inputs(self) -> list[InputTokens]:
        return [part for part in self.parts if isinstance(part, InputTokens)]

    @property
    def cached(self) -> list[CacheTokens]:
        return [part for part in self.parts if isinstance(part, CacheTokens)]


@dataclass(frozen=True)
class Layout:
    """Where virtual tokens stand in a batch: on the right of `width` columns.

    count: how many are a row's own, a number or [B, 1]. seen: [B, width], which of them each
    row has; None: all.
    """

    width: int
    count: Tensor | int
    seen: Tensor | None


NOTHING = Layout(0, 0, None)


@dataclass(frozen=True)
class Rows:
    """The rows of a batch by group. `index` [B] gives each row's group; None: there is one, of all rows."""

    groups: tuple[Group, ...]
    index: Tensor | None

    def layout(self, counts: Sequence[int], device: torch.device) -> Layout:
        """Columns for groups that have that many virtual tokens each."""
        width = max(counts)
        if self.index is None or width == 0:
            return Layout(width, width, None)
        count = torch.tensor(counts, device=device)[self.index.to(device)].unsqueeze(1)
        return Layout(width, count, torch.arange(width, device=device).unsqueeze(0) >= width - count)

    def spread(self, tokens: Sequence[Tensor | None], dim: int) -> Tensor | None:
        """Each row's tokens, which lie along `dim` of each group's; [1 or B, ...]. None if nobody has any."""
        some = next((one for one in tokens if one is not None), None)
        if some is None or self.index is None:
            return None if some is None else some.unsqueeze(0)
        width = max(0 if one is None else one.shape[dim] for one in tokens)
        stacked = torch.stack([_right_aligned(one, width, dim, some) for one in tokens])
        return stacked[self.index.to(some.device)]


def rows_of(shown: Sequence[tuple[str, Part]], route: Route | None, routed: dict[str, Part]) -> Rows | None:
    """The groups of a batch; None where no row has any virtual token.

    `shown` are the active parts by name, `routed` those that exist by name.
    """
    if route is None:
        group = Group(tuple(name for name, _ in shown), tuple(part for _, part in shown), 0)
        return Rows((group,), None) if shown else None
    groups = [Group((), (), 0)]
    index = torch.zeros(route.batch, dtype=torch.long)
    for name, rows in route.rows.items():
        if name is not None and name in routed:
            index[rows] = len(groups)
            groups.append(Group((name,), (routed[name],), int(rows[0])))
    return Rows(tuple(groups), index) if len(groups) > 1 else None


def joined(tokens: Sequence[Tensor], dim: int) -> Tensor | None:
    """Several adapters' tokens one after the other."""
    return torch.cat(list(tokens), dim=dim) if tokens else None


def _right_aligned(tokens: Tensor | None, width: int, dim: int, like: Tensor) -> Tensor:
    if tokens is None:
        shape = list(like.shape)
        shape[dim] = width
        return like.new_zeros(shape)
    missing = width - tokens.shape[dim]
    behind = tokens.dim() - 1 - dim
    return F.pad(tokens, (0, 0) * behind + (missing, 0)) if missing else tokens
