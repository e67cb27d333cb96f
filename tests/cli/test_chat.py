from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from graftlm.models.sprout import FOLDER

pytestmark = pytest.mark.skipif(
    not (FOLDER / "config.json").exists(), reason="the embedded base is not built yet"
)


def test_one_answer(graft: Callable[..., Any]) -> None:
    plain = graft("chat", "sprout", "--prompt", "Hello", "--max-new-tokens", "5")
    assert plain.code == 0, plain.err
    machine = graft("chat", "sprout", "--prompt", "Hello", "--max-new-tokens", "5", "--json")
    assert machine.json["prompt"] == "Hello"
    assert plain.out == machine.json["reply"] + "\n"
    assert json.dumps(machine.json)


def test_a_conversation(graft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["Hello", "", "/reset", "/base", "/zorp", "Hello"])

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    outcome = graft("chat", "sprout", "--max-new-tokens", "5")
    assert outcome.code == 0, outcome.err
    first, second = outcome.out.splitlines()
    assert first == second, "greedy: the same words get the same answer after /reset"
    assert "starts afresh" in outcome.err
    assert "error: This is a base without an adapter." in outcome.err
    assert "/zorp is none of" in outcome.err
