"""One more adapter costs what the first did: counted in function calls, which no busy machine shifts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from graftlm.methods.lora import LoraConfig

from .tiny import graft

CONFIG = LoraConfig(r=2, target_modules=r"\d+")


def calls(action: Callable[[], Any]) -> int:
    """Python functions entered during `action`."""
    entered = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal entered
        entered += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(before)
    return entered


def deep(layers: int = 30) -> nn.Module:
    return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(layers)))


def test_the_64th_adapter_costs_what_the_second_did() -> None:
    adapters = graft(deep(), CONFIG, "a0")
    second = calls(lambda: adapters.add("a1", CONFIG))
    for number in range(2, 63):
        adapters.add(f"a{number}", CONFIG)
    assert calls(lambda: adapters.add("a63", CONFIG)) <= 1.1 * second


def test_a_switch_does_not_depend_on_how_many_there_are() -> None:
    adapters = graft(deep(), CONFIG, "a0")
    adapters.add("a1", CONFIG)
    few, few_trained = calls(lambda: adapters.activate("a1")), calls(lambda: adapters.train_only("a1"))
    for number in range(2, 32):
        adapters.add(f"a{number}", CONFIG)
    assert calls(lambda: adapters.activate("a0")) <= 1.1 * few
    assert calls(lambda: adapters.train_only("a2")) <= 1.1 * few_trained


def test_the_work_grows_with_the_layers_only_linearly() -> None:
    few, many = deep(20), deep(80)
    assert calls(lambda: graft(many, CONFIG)) <= 5 * calls(lambda: graft(few, CONFIG))
