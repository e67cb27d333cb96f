"""How a base is loaded for a recipe, and for an adapter that has lost its run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graftlm.core.notices import forget_notices, notices_to
from graftlm.training.recipe import ModelSection
from graftlm.verbs import base
from graftlm.verbs.base import base_dtype, section_of
from graftlm.verbs.references import Reference


@pytest.mark.parametrize(
    ("fields", "hardware", "dtype"),
    [
        ({}, True, "auto"),
        ({"dtype": "float16"}, False, "float16"),
        ({"quantization": "nf4"}, True, "bfloat16"),
        ({"quantization": "nf4"}, False, "float32"),
        ({"quantization": "nf4", "dtype": "bfloat16"}, False, "bfloat16"),
        ({"quantization": "int8", "compute_dtype": "float16"}, False, "float16"),
    ],
)
def test_what_a_base_computes_in(
    fields: dict[str, Any], hardware: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "cpu_computes_bfloat16", lambda: hardware)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    forget_notices()
    heard: list[str] = []
    with notices_to(heard.append):
        assert base_dtype(ModelSection(name="mine", **fields)) == dtype
    assert bool(heard) == (dtype == "float32")


@pytest.mark.parametrize(
    ("facts", "quantization", "double_quant"),
    [
        (None, "none", True),
        ({"base": {}}, "none", True),
        ({"base_quantization": {"kind": "fp4", "double_quant": False, "block_size": 64}}, "fp4", False),
        ({"base_quantization": {"kind": "int8", "double_quant": False, "block_size": 64}}, "int8", True),
        ({"base_quantization": {"kind": "fp8_block", "double_quant": True, "block_size": 64}}, "none", True),
    ],
)
def test_an_adapter_alone_names_the_base_that_it_was_trained_on(
    facts: dict[str, Any] | None, quantization: str, double_quant: bool, tmp_path: Path
) -> None:
    if facts is not None:
        (tmp_path / "graft.json").write_text(json.dumps(facts), encoding="utf-8")
    section = section_of(Reference(tmp_path, "mine", run=None))
    assert (section.name, section.quantization, section.double_quant) == ("mine", quantization, double_quant)
