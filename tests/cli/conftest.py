"""Running the command line inside the test process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from graftlm.cli.main import run


@dataclass(frozen=True)
class Outcome:
    """What one command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The last line of standard output."""
        loaded = json.loads(self.out.splitlines()[-1])
        assert isinstance(loaded, dict)
        return loaded


@pytest.fixture
def graft(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`graft("check", "x.jsonl")` -> exit code and both outputs."""

    def call(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = run(arguments)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call
