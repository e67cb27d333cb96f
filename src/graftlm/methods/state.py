"""The state of all adapters of a model, as one immutable value."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from graftlm.core.errors import AdapterError
from graftlm.methods.place import Composition

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class State:
    """Which adapters are active, trainable, merged; how active ones act together, and whether at all."""

    active: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    composition: Composition = "sum"
    is_enabled: bool = True

    @property
    def applied(self) -> tuple[str, ...]:
        """What the sites add to the base: active, not already in the weights, not disabled."""
        return tuple(name for name in self.active if name not in self.merged) if self.is_enabled else ()


def check_name(name: str) -> str:
    """A name that is safe as a folder and as a key.

    >>> check_name("sql-v1.2")
    'sql-v1.2'
    """
    if not isinstance(name, str) or not NAME.fullmatch(name) or ".." in name:
        raise AdapterError(
            f"{name!r} cannot be the name of an adapter.",
            meaning="Names become folder names and keys of files.",
            fix="Use 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit.",
        )
    return name


def as_names(names: str | Iterable[str]) -> tuple[str, ...]:
    """One name or several, without repetition, in order."""
    return (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))


def without(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    """The other names, in order."""
    return tuple(other for other in names if other != name)
