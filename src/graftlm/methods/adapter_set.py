"""The owner of all that is adapted on one model. Each change is validated first, then committed whole."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from graftlm.core.errors import AdapterError
from graftlm.methods import merge as merging
from graftlm.methods.base import MethodConfig, Part
from graftlm.methods.install import Installation
from graftlm.methods.lanes import Lanes
from graftlm.methods.place import Composition
from graftlm.methods.resolve import resolve
from graftlm.methods.routing import require_routable, routed
from graftlm.methods.stacking import stacked
from graftlm.methods.state import State, as_names, check_name, without
from graftlm.methods.storage import Storage
from graftlm.quant.facts import counted

ParameterType = Literal["float32", "base"]
ATTRIBUTE = "graft_adapters"


class AdapterSet:
    """All adapters of one model: which exist, are active, trainable, merged.

    Made by `attach`. The three states are independent: an adapter can be active and frozen, trainable and
    inactive, merged and inactive. Nothing here ever edits the base: `detach` puts back the very same modules.
    """

    def __init__(self, model: nn.Module, storage: Storage[AdapterSet]) -> None:
        self.model = model
        self._storage = storage
        self._installation = Installation(model)
        self._configs: dict[str, MethodConfig] = {}
        self._state = State()
        self._has_split_tie = False
        object.__setattr__(model, ATTRIBUTE, self)

    def __repr__(self) -> str:
        state = self._state
        return f"AdapterSet({list(self.names)}, active={state.active}, merged={state.merged})"

    def __contains__(self, name: object) -> bool:
        return name in self._configs

    # What there is.

    @property
    def names(self) -> tuple[str, ...]:
        """Every adapter that exists, in order of arrival."""
        return tuple(self._configs)

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters whose changes are applied (or are already in the weights)."""
        return self._state.active

    @property
    def trainable(self) -> tuple[str, ...]:
        """The adapters whose parameters require gradients."""
        return self._state.trainable

    @property
    def merged(self) -> tuple[str, ...]:
        """The adapters that are folded into the base's weights."""
        return self._state.merged

    def config(self, name: str) -> MethodConfig:
        """The config that the adapter was made from."""
        self._require(name)
        return self._configs[name]

    def parts(self, name: str) -> dict[str, Part]:
        """What one adapter has at each place, by module path, in model order."""
        self._require(name)
        return self._installation.parts(name)

    def named_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's own parameters by path; one that stands at two places (tied) comes once."""
        found: dict[nn.Parameter, str] = {}
        for path, part in self.parts(name).items():
            for key, parameter in part.named_parameters():
                found.setdefault(parameter, f"{path}.{key}")
        return {key: parameter for parameter, key in found.items()}

    def parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The adapter's own parameters."""
        return iter(self.named_parameters(name).values())

    def print_trainable_parameters(self) -> None:
        """`trainable params: ... || all params: ... || trainable%: ...`"""
        trainable, total = self.count_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def count_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters of the model with its adapters; of packed weights the true numbers."""
        counts = list(counted(self.model))
        return sum(n for is_trained, n in counts if is_trained), sum(n for _, n in counts)

    # Making and removing adapters.

    def add(self, name: str, config: MethodConfig, *, dtype: ParameterType = "float32") -> None:
        """Make a new adapter, inactive and frozen.

        Raises:
            AdapterError: the name is taken or malformed; TargetError: targets do not resolve.
        """
        check_name(name)
        if name in self._configs:
            raise AdapterError(
                f"An adapter named {name!r} exists already.",
                fix=f"Choose another name, or delete it first: adapters.delete({name!r}).",
            )
        self._require_attached()
        with merging.without_merges(self._installation.sites.values()):
            placements = resolve(self.model, config, sites=self._installation.sites).placements
            kept = torch.float32 if dtype == "float32" else None
            parts = {placement.path: placement.build(kept) for placement in placements}
            config.link(parts)
        self._installation.install(name, parts)
        self._configs[name] = config
        self._commit(self._state)

    def delete(self, name: str) -> None:
        """Remove an adapter. An error while it is merged."""
        self._require(name)
        self._require_unrouted()
        if name in self.merged:
            raise AdapterError(
                f"Adapter {name!r} is merged into the base.", fix=f"First adapters.unmerge({name!r})."
            )
        self._installation.remove(name)
        del self._configs[name]
        state = self._state
        self._commit(
            replace(state, active=without(state.active, name), trainable=without(state.trainable, name))
        )

    def detach(self) -> nn.Module:
        """Unmerge, remove every adapter; the model has its own modules and `requires_grad` flags again."""
        self._require_attached()
        self.unmerge()
        return self._leave()

    def merge_and_unload(self) -> nn.Module:
        """Merge what is active, and leave it in a plain model without adapters, dense in every layer."""
        return merging.made_dense(self.fold())

    def fold(self) -> nn.Module:
        """As `merge_and_unload`, but packed layers stay, with what is merged beside the packed weight."""
        self._require_attached()
        self._set_merged(tuple(dict.fromkeys((*self.merged, *self.active))))
        self._installation.keep_merged()
        return self._leave()

    # State.

    def activate(self, names: str | Iterable[str], how: Composition = "sum") -> None:
        """Apply exactly these adapters; `[]` for none.

        Their changes are summed, or with `how="stack"` each adapter takes what the ones before it give, as a
        task adapter upon a language adapter.
        """
        if how not in ("sum", "stack"):
            raise AdapterError(f"how={how!r} is no way to apply adapters.", fix="Use 'sum' or 'stack'.")
        self._commit(replace(self._state, active=self._known(names), composition=how))

    def train_only(self, names: str | Iterable[str]) -> None:
        """Require gradients of exactly these adapters."""
        self._commit(replace(self._state, trainable=self._known(names)))

    def activated(self, names: str | Iterable[str]) -> AbstractContextManager[None]:
        """The given adapters active for the length of a block."""
        return self._during(active=self._known(names))

    def disabled(self) -> AbstractContextManager[None]:
        """No unmerged adapter is applied for the length of a block; what is merged stays merged."""
        return self._during(is_enabled=False)

    def routed(self, rows: Sequence[str | None]) -> AbstractContextManager[None]:
        """One adapter per row of the batch (`None`: the base), in forward, `generate` and training."""
        self._known(name for name in rows if name is not None)
        self._require_unrouted()
        require_routable(rows, self.merged)
        return routed(self.model, rows, dict(self._installation.places))

    def stacked(self, names: Iterable[str]) -> AbstractContextManager[Lanes]:
        """Several adapters side by side in one batch, each on tokens of its own, for training."""
        self._require_unrouted()
        return stacked(self._known(names), self.merged, dict(self._installation.places))

    # Merging.

    def merge(self, names: str | Iterable[str] | None = None) -> None:
        """Fold adapters (default: the active ones) into the base's weights, all or nothing.

        Raises:
            MergeError: a method that cannot be merged, a packed base, or a result that is not finite.
        """
        wanted = self._known(self.active if names is None else names)
        if again := [name for name in wanted if name in self.merged]:
            warnings.warn(f"Already merged, nothing to do for: {', '.join(again)}", stacklevel=2)
        self._set_merged(tuple(dict.fromkeys((*self.merged, *wanted))))
        merging.say_cost(self._installation.sites.values())

    def unmerge(self, names: str | Iterable[str] | None = None) -> None:
        """Take adapters (default: all merged ones) out of the weights; the base gets its original bytes."""
        wanted = self._known(self.merged if names is None else names)
        self._set_merged(tuple(name for name in self.merged if name not in wanted))

    def _set_merged(self, names: tuple[str, ...]) -> None:
        if names == self.merged:
            return
        self._require_unrouted()
        merging.refuse_gates(self._installation.gates, names)
        merging.set_merged(self._installation.sites, names)
        self._commit(replace(self._state, merged=names))
        self._keep_tying_honest()

    def _keep_tying_honest(self) -> None:
        """Merging into one of a pair of tied weights unties the pair; the model's config must say so."""
        config: Any = getattr(self.model, "config", None)
        is_split = merging.splits_a_tie(self.model, self._installation.sites.values())
        if is_split and getattr(config, "tie_word_embeddings", False):
            self._has_split_tie, config.tie_word_embeddings = True, False
            warnings.warn(
                "Merging unties the embeddings: the config now says tie_word_embeddings=False.", stacklevel=4
            )
        elif self._has_split_tie and not is_split:
            self._has_split_tie, config.tie_word_embeddings = False, True

    # On disk.

    def save(self, directory: str | Path, name: str = "default") -> None:
        """Write one adapter into `directory` itself, in PEFT's layout."""
        self._require(name)
        self._storage.save(self, Path(directory), name)

    def load(self, directory: str | Path, name: str = "default", *, strict: bool = True) -> None:
        """Read an adapter under a new name, inactive and frozen."""
        self._storage.load(self, Path(directory), name, strict=strict)

    # One way to change anything.

    def _commit(self, state: State) -> None:
        self._installation.show(state.applied, state.composition, is_enabled=state.is_enabled)
        self._installation.train(state.trainable)
        self._state = state

    @contextmanager
    def _during(self, **changes: Any) -> Iterator[None]:
        before = self._state
        self._commit(replace(before, **changes))
        try:
            yield
        finally:
            active = tuple(name for name in before.active if name in self)
            self._commit(replace(self._state, active=active, is_enabled=before.is_enabled))

    def _leave(self) -> nn.Module:
        self._installation.uninstall()
        self._configs, self._state = {}, State()
        object.__delattr__(self.model, ATTRIBUTE)
        return self.model

    def _require_attached(self) -> None:
        if getattr(self.model, ATTRIBUTE, None) is not self:
            raise AdapterError(
                "These adapters were detached from their model.", fix="Attach again: gl.attach(model, ...)."
            )
        self._require_unrouted()

    def _require_unrouted(self) -> None:
        if any(place.route or place.lanes for _, place in self._installation.places):
            raise AdapterError(
                "Rows are routed to adapters at the moment.",
                meaning="What exists and what is merged must stay while a routed() block lasts.",
                fix="Leave the block first.",
            )

    def _known(self, names: str | Iterable[str]) -> tuple[str, ...]:
        wanted = as_names(names)
        for name in wanted:
            self._require(name)
        return wanted

    def _require(self, name: str) -> None:
        if name not in self._configs:
            known = f"Adapters of this model: {', '.join(map(repr, self.names)) or 'none'}."
            raise AdapterError(f"There is no adapter named {name!r}.", fix=known)
