from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path

import pytest
import torch

from graftlm.core import environment
from graftlm.core.environment import (
    EXTRAS,
    Extra,
    cpu_computes_bfloat16,
    describe_environment,
    memory_bytes,
    usable_cores,
)
from graftlm.core.version import __version__


def test_facts_agree_with_other_sources() -> None:
    facts = describe_environment()
    assert facts.graft == __version__
    assert facts.packages["torch"] == torch.__version__
    assert 1 <= facts.cores <= (os.cpu_count() or 1)
    assert len(facts.gpus) == torch.cuda.device_count()
    if Path("/proc/meminfo").exists():
        kibibytes = int(re.findall(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[0])
        assert 0 < facts.memory_bytes <= kibibytes * 1024


def test_json_round_trip() -> None:
    facts = describe_environment().as_dict()
    again = json.loads(json.dumps(facts))
    assert set(again["extras"]) == set(EXTRAS)
    assert {"installed", "versions"} == set(again["extras"]["quant"])


def test_every_fast_path_says_why() -> None:
    paths = describe_environment().fast_paths
    assert paths
    assert all(path.why for path in paths)


def test_extras_are_those_of_the_project(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    declared = {
        extra: tuple(re.split(r"[^\w-]", name, maxsplit=1)[0] for name in names)
        for extra, names in project["optional-dependencies"].items()
        if extra not in ("test", "dev")
    }
    assert declared == EXTRAS


def test_an_extra_is_installed_when_all_of_it_is() -> None:
    assert Extra("quant", {"bitsandbytes": "0.50"}).installed
    assert not Extra("serve", {"fastapi": "0.1", "uvicorn": None}).installed


def test_processor_flags_decide_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    def machine(text: str) -> None:
        monkeypatch.setattr(environment, "_read", lambda path: text)

    machine("model name\t: Old\nflags\t\t: fpu avx2\nmodel name\t: Old\nflags\t\t: fpu avx2\n")
    assert not cpu_computes_bfloat16()
    assert describe_environment().instruction_sets == ("AVX2",)
    assert describe_environment().cpu == "Old"
    machine("flags : fpu avx2 avx512f avx512_bf16 amx_bf16\n")
    assert cpu_computes_bfloat16()
    machine("Features : fp asimd bf16\n")
    assert cpu_computes_bfloat16()
    machine("")
    assert not cpu_computes_bfloat16()


def test_a_container_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_read", lambda path: "1048576\n")
    assert memory_bytes() == 1048576
    monkeypatch.setattr(environment, "_read", lambda path: "max\n")
    assert memory_bytes() > 1048576
    assert usable_cores() >= 1
