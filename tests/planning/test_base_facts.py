"""Facts of a base against the base itself, and against published counts of parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graftlm.core.errors import ModelError
from graftlm.models.ending import Ending
from graftlm.models.load import load_model
from graftlm.planning.base_facts import base_facts, empty_model
from graftlm.planning.known_bases import CONFIGS, known_config
from graftlm.testing.models import KINDS, tiny

PUBLISHED = {
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "huggyllama/llama-65b": 65_285_660_672,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "openai-community/gpt2": 124_439_808,
    "google-t5/t5-base": 222_903_552,
    "google/flan-t5-base": 247_577_856,
}
"""Parameters as the models' own cards and checkpoints have them."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_known_bases(name: str) -> None:
    assert base_facts(name).total == PUBLISHED[name]


def test_every_known_base_can_be_built() -> None:
    rows = Ending("rows", ("a", "b"))
    for name, config in CONFIGS.items():
        is_encoder = config["model_type"] in ("bert", "roberta")
        facts = base_facts(name, rows) if is_encoder else base_facts(name)
        assert facts.layers > 0
        assert facts.source == "the table of known bases"


def test_names_of_variants() -> None:
    assert known_config("Meta-Llama/llama-3.1-8b-instruct").hidden_size == 4096
    assert known_config("gpt2").n_embd == 768
    assert known_config("someone/else") is None


def test_facts_are_those_of_the_model() -> None:
    model, _ = load_model("sprout", device="cpu")
    facts = base_facts("sprout")
    assert facts.total == model.num_parameters()
    assert facts.stored_bytes == facts.total * 2  # bfloat16
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert (
        sum(shape.parameters for shape in facts.linears if shape.in_block)
        == linear - facts.parameters["embeddings"] * facts.is_tied
    )
    assert facts.is_tied and facts.context == model.config.max_position_embeddings


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("bert", "roberta")])
def test_an_empty_model_has_the_parameters_of_a_full_one(kind: str) -> None:
    model = tiny(kind)
    model.config.architectures = [type(model).__name__]
    empty = empty_model(model.config, kind, Ending("text"))
    assert {name: p.shape for name, p in empty.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_no_such_base(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No folder"):
        base_facts(tmp_path / "nothing")
