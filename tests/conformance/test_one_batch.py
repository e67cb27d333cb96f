"""All methods on one model, and one row for each in one batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graftlm.formats.layout import FOLDER
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.attach import attach
from graftlm.testing.case import stir
from graftlm.testing.expect import expect_close
from graftlm.testing.models import batch
from graftlm.testing.rows import ROWS
from graftlm.testing.suite import MATRIX


def base(kind: str) -> Any:
    """The plain tiny model."""
    return ROWS["lora"].case(kind).base()


def everything(kind: str) -> tuple[Any, AdapterSet, list[str | None]]:
    """A model with an adapter of every method that goes on it, and their names with the base in between."""
    rows: list[str | None] = [None]
    model = base(kind)
    for number, subject in enumerate(ROWS.values()):
        if kind in subject.refused or subject.case(kind).exception("routed"):
            continue
        name = f"m{number}"
        adapters = attach(model, subject.case(kind).config, name, storage=FOLDER)
        stir(adapters, name, seed=number)
        rows += [name, None] if number % 5 == 4 else [name]
    return model, adapters, rows


def function(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits, and a number whose gradients are sums over rows."""
    found = model(**inputs, use_cache=False).logits
    return found.detach(), found.logsumexp(-1).sum()


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in ("llama", "bert", "bart") else pytest.param(kind, marks=pytest.mark.slow)
        for kind in MATRIX
    ],
)
def test_every_method_has_a_row_of_one_batch(kind: str) -> None:
    model, adapters, rows = everything(kind)
    adapters.train_only(adapters.names)
    model.train()
    inputs = batch(kind, rows=len(rows))
    alone = []
    for number, name in enumerate(rows):
        with adapters.activated([] if name is None else name):
            own = {key: value[number : number + 1] for key, value in inputs.items()}
            found, total = function(model, own)
            if name is not None:
                total.backward()
            alone.append(found)
    wanted = {f"{n}.{key}": p.grad for n in adapters.names for key, p in adapters.named_parameters(n).items()}
    model.zero_grad()
    with adapters.routed(rows):
        together, total = function(model, inputs)
        total.backward()
    expect_close(together, torch.cat(alone), "logits of the batch")
    for n in adapters.names:
        for key, p in adapters.named_parameters(n).items():
            gradient = wanted[f"{n}.{key}"]
            assert gradient is not None and p.grad is not None, (n, key)
            expect_close(p.grad, gradient, f"the gradient of {n} {key}", rtol=1e-3)
    first = {key: value[:1] for key, value in inputs.items()}
    expect_close(together[:1], function(base(kind), first)[0], "the base's row")
