"""What a snapshot must notice: otherwise `detach` and refusals would pass for nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from graftlm.testing.models import tiny
from graftlm.testing.snapshot import snapshot


def swap_module(model: Any) -> None:
    model.model.layers[0].mlp.up_proj = type(model.lm_head)(32, 48, bias=False)


def swap_parameter(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def change_one_number(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "module": (swap_module, "another object"),
    "more modules": (lambda m: m.add_module("extra", nn.Linear(1, 1)), "modules changed: .*extra"),
    "parameter": (swap_parameter, "lm_head.weight is another object"),
    "number": (change_one_number, "norm.weight has other values"),
    "flag": (lambda m: m.lm_head.weight.requires_grad_(False), "requires_grad of lm_head.weight"),
    "mode": (lambda m: m.model.layers[1].train(), "training of 'model.layers.1"),
    "hook": (lambda m: m.model.register_forward_pre_hook(lambda *_: None), "hooks of 'model'"),
    "attribute": (lambda m: setattr(m.model, "note", []), "attributes of 'model'"),
    "value": (lambda m: setattr(m.model.norm, "variance_epsilon", 0.5), "values of attributes"),
    "forward": (lambda m: setattr(m, "forward", m.forward), "attributes of ''"),
    "config": (lambda m: setattr(m.config, "use_cache", False), "config"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_noticed(what: str) -> None:
    model = tiny("llama")
    unchanged = snapshot(model)
    unchanged()
    change, words = CHANGES[what]
    change(model)
    with pytest.raises(AssertionError, match=words):
        unchanged()


def test_what_a_model_does_in_its_work_is_no_change() -> None:
    model = tiny("bert")
    unchanged = snapshot(model)
    ids = torch.tensor([[3, 4, 5]])
    model(input_ids=ids, labels=torch.tensor([1])).loss.backward()
    unchanged()
