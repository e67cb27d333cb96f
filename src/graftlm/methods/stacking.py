"""Adapters of one model side by side: each batch has tokens of several of them (`methods.lanes`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from graftlm.core.errors import AdapterError
from graftlm.methods.lanes import Lanes
from graftlm.methods.place import Place
from graftlm.methods.site import Site


@contextmanager
def stacked(names: Sequence[str], merged: Sequence[str], places: Mapping[str, Place]) -> Iterator[Lanes]:
    """Inside, sites apply these adapters by lanes; everything is as before afterwards, also after an error.

    Raises:
        AdapterError: one of them acts on more than single layers, or an adapter is merged.
    """
    _refuse_merged(merged)
    _refuse_gates(names, places)
    lanes = Lanes({name: torch.Generator() for name in names})
    sites = [place for place in places.values() if isinstance(place, Site)]
    for site in sites:
        site.lanes = lanes
    try:
        yield lanes
    finally:
        for site in sites:
            site.lanes = None


def _refuse_merged(merged: Sequence[str]) -> None:
    if merged:
        raise AdapterError(
            f"Adapters {list(merged)} are merged.",
            meaning="A merged adapter acts on the tokens of all.",
            fix="First adapters.unmerge().",
        )


def _refuse_gates(names: Sequence[str], places: Mapping[str, Place]) -> None:
    problems = [
        f"{name} acts at {path or 'the whole model'}"
        for path, place in places.items()
        if not isinstance(place, Site)
        for name in names
        if place.has(name)
    ]
    if problems:
        raise AdapterError(
            "These adapters cannot share a batch.",
            problems=problems,
            meaning="They act on what a whole stack of layers reads, not on single layers.",
            fix="Train them one after the other.",
        )
