"""`graft combine`: several adapters as one. The base is loaded only where its own values are needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graftlm.core.errors import AdapterError, GraftError, UsageError
from graftlm.formats.fingerprint import BaseIdentity, identify
from graftlm.formats.without_model import (
    AdapterFiles,
    content_of,
    copied_by,
    read_files,
    tensors_of,
    write_files,
)
from graftlm.methods.base import MethodConfig
from graftlm.methods.combining.combine import combined, is_copy_of_one
from graftlm.methods.combining.mixing import Mixing
from graftlm.methods.combining.terms import Combination, Term
from graftlm.methods.lora import LoraConfig
from graftlm.methods.site import base_modules
from graftlm.models.ending import TEXT, Ending
from graftlm.models.heads import ending_of_adapter, facts_of
from graftlm.models.load import load_model
from graftlm.verbs.outputs import require_new_output
from graftlm.verbs.references import adapter_reference

Weights = Mapping[str, float] | Mapping[Path, float] | Mapping[str | Path, float]
"""Adapter folder or run folder to weight."""


@dataclass(frozen=True)
class CombineResult:
    """A new adapter and what it was made of."""

    out: Path
    weights: Mapping[str, float]
    how: str
    method: str
    rank: int | None
    """The largest rank of a layer; None for methods without ranks."""
    kept: float
    """Fraction of the squared norm of the combined change that the adapter holds; 1 if it is exact."""
    lowest_kept: float
    lowest_at: str
    passed: bool = True

    @property
    def verdict(self) -> str:
        if self.kept == 1.0:
            return "Combined."
        return f"Combined; rank {self.rank} keeps {100 * self.kept:.2f} % of the change."

    @property
    def lines(self) -> tuple[str, ...]:
        terms = " ".join(f"{weight:+g} {Path(name).name}" for name, weight in self.weights.items())
        rank = "" if self.rank is None else f", rank {self.rank}"
        whole = (f"Combine: {terms} by {self.how}, {self.method}{rank} -> {self.out}",)
        if self.kept == 1.0:
            return whole
        return (
            *whole,
            f"Kept: {100 * self.kept:.2f} %, least {100 * self.lowest_kept:.2f} % at {self.lowest_at}",
        )

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "out": str(self.out),
            "weights": dict(self.weights),
            "how": self.how,
            "method": self.method,
            "rank": self.rank,
            "kept": self.kept,
            "lowest_kept": self.lowest_kept,
            "lowest_at": self.lowest_at,
            "passed": self.passed,
            "verdict": self.verdict,
        }


def combine(
    weights: Weights, out: str | Path, *, how: str = "linear", base: str | None = None,
    **options: Any,
) -> CombineResult:  # fmt: skip
    """Write the weighted combination of adapters into `out`, a new folder in PEFT's layout.

    Args:
        weights: adapter folder or run folder to weight; negative weights subtract.
        out: the new folder.
        how: `linear` or `cat` (exact), `svd`, `ties`, `dare`, `magnitude`.
        base: the base model, where the adapters do not say or it moved. It is loaded only if adapters hold
            copies of its own parameters (biases, heads) and the weights do not add up to 1.
        options: `rank`, `density`, `majority_sign`, `seed` (see `methods.combine_mixing.Mixing`).

    Raises:
        AdapterError: the combination has no meaning, with the reason; nothing is written.
        UsageError: wrong options, or `out` exists.
    """
    mixing = Mixing(how=how, **options)
    target = Path(out)
    require_new_output(target)
    if not weights:
        raise UsageError("No adapters were given to combine.", fix="graft combine A:0.7 B:0.3 --out DIR")
    references = [adapter_reference(str(name), base) for name in weights]
    sources = [read_files(reference.adapter) for reference in references]
    terms = [
        Term(str(name), float(weight), source.adapter)
        for (name, weight), source in zip(weights.items(), sources, strict=True)
    ]
    model = _Base(base or references[0].base, sources)
    model.require_same(named_by_user=base is not None)
    found = combined(terms, mixing, model.value)
    _write(target, terms, sources, found, mixing, model)
    config = found.adapter.config
    return CombineResult(
        target, {str(name): float(weight) for name, weight in weights.items()}, mixing.how, config.peft_type,
        _largest_rank(config), found.kept, found.lowest_kept, found.lowest_at,
    )  # fmt: skip


def _largest_rank(config: MethodConfig) -> int | None:
    return max(config.r, *config.rank_pattern.values(), 0) if isinstance(config, LoraConfig) else None


def _write(
    target: Path, terms: Sequence[Term], sources: Sequence[AdapterFiles], found: Combination, mixing: Mixing,
    model: _Base,
) -> None:  # fmt: skip
    history = {
        **mixing.model_dump(exclude_none=True),
        "weights": [{"adapter": Path(term.name).name, "weight": term.weight} for term in terms],
        "kept": found.kept,
    }
    acting = [source for source, term in zip(sources, terms, strict=True) if term.weight != 0] or list(
        sources
    )
    alone = [term for term in terms if term.weight != 0]
    content = (
        dict(acting[0].content)
        if is_copy_of_one(alone, mixing)
        else content_of(found.adapter, acting, model.name)
    )
    identity = model.identity(copied_by(found.adapter))
    ending = {"ending": facts_of(model.ending)} if model.ending else {}
    extra = {**identity.as_dict(), **ending, "combined": history} if identity else None
    write_files(target, content, tensors_of(found.adapter, acting), extra)


class _Base:
    """The base that all sources belong to; loaded when something asks for its values."""

    def __init__(self, name: str, sources: Sequence[AdapterFiles]) -> None:
        self.name = name
        self._sources = sources
        self.ending = _common_ending(sources)
        self._model: nn.Module | None = None

    def require_same(self, *, named_by_user: bool) -> None:
        """Refuse adapters of different bases, by what their files say.

        Raises:
            AdapterError: they belong to different bases.
        """
        first = self._sources[0]
        for other in self._sources[1:]:
            if first.base is None or other.base is None:
                is_other = not named_by_user and first.base_name != other.base_name
            elif first.copied == other.copied:
                is_other = not _is_same(first.base, other.base)
            else:  # each identity leaves out the modules that its adapter copies
                self._load()
                is_other = False
            if is_other:
                raise AdapterError(
                    "The adapters belong to different bases.",
                    problems=[
                        f"{source.folder}: {source.base_name or 'unnamed'}" for source in (first, other)
                    ],
                    meaning="Changes of different weights have no sum.",
                    fix="Combine adapters of one base. If it only has two names: --base MODEL.",
                )

    def value(self, path: str, parameter: str) -> Tensor:
        """The base's own value of one parameter."""
        modules = base_modules(self._load())
        if path not in modules:
            raise AdapterError(f"{self.name} has no module {path}.", meaning="It is not the adapters' base.")
        return modules[path].get_parameter(parameter).detach()

    def identity(self, copied: frozenset[str]) -> BaseIdentity | None:
        """What `graft.json` of an adapter with these copies says of the base."""
        if self._model is not None:
            return identify(self._model, without=sorted(copied))
        return next(
            (source.base for source in self._sources if source.base and source.copied == copied), None
        )

    def _load(self) -> nn.Module:
        if self._model is None:
            try:
                model, _ = load_model(self.name, ending=self.ending or TEXT)
            except GraftError as error:
                raise AdapterError(
                    "The base is needed to combine these adapters, and cannot be loaded.",
                    problems=[error.seen],
                    meaning="They replace parameters of it (biases, heads), and changes start from those.",
                    fix="Name the base with --base, or give weights that add up to 1.",
                ) from error
            for source in self._sources:
                ours = identify(model, without=sorted(source.copied))
                if source.base is not None and not _is_same(ours, source.base):
                    raise AdapterError(
                        f"{source.folder} was trained on another base than {self.name}.",
                        meaning="The weights of the base are not those it was trained on.",
                        fix="Name the base with --base.",
                    )
            self._model = model
        return self._model


def _common_ending(sources: Sequence[AdapterFiles]) -> Ending | None:
    """What their base ends in; None where no file says.

    Raises:
        AdapterError: their heads are for different labels.
    """
    said = {source.folder: ending for source in sources if (ending := ending_of_adapter(source.folder))}
    if len(set(said.values())) > 1:
        raise AdapterError(
            "The adapters have heads for different labels.",
            problems=[f"{folder}: {', '.join(ending.labels[:8])}" for folder, ending in said.items()],
            meaning="A sum of heads has a meaning only where every output stands for the same label.",
            fix="Combine adapters of one set of labels.",
        )
    return next(iter(said.values()), None)


def _is_same(one: BaseIdentity, other: BaseIdentity) -> bool:
    return one.is_same(other) or one.is_close(other)
