"""Adapter files combined without a model: what comes out loads here and in PEFT, and is the weighted sum."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from graftlm.formats.layout import FOLDER
from graftlm.formats.without_model import content_of, read_files, tensors_of, write_files
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.attach import attach, attach_folder
from graftlm.methods.base import MethodConfig
from graftlm.methods.bottleneck import BottleneckConfig
from graftlm.methods.combining.combine import base_values, combine, combined
from graftlm.methods.combining.mixing import Mixing
from graftlm.methods.combining.terms import Term
from graftlm.methods.full import FullConfig
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lora import LoraConfig
from graftlm.methods.tokens import TrainableTokensConfig

from ..methods.tiny import batch, logits, stir, tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* is deprecated and will be removed in v6:FutureWarning",
    "ignore:Could not find a config file in:UserWarning",
    "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
)
"""What PEFT says about tiny models without a name."""

# kind of model, two adapters, whether PEFT has the method
PAIRS: dict[str, tuple[str, MethodConfig, MethodConfig, bool]] = {
    "same layers": (
        "llama",
        LoraConfig(r=3, target_modules=("q_proj", "v_proj")),
        LoraConfig(r=2, use_rslora=True, target_modules=("q_proj", "v_proj")),
        True,
    ),
    "other layers": (
        "llama",
        LoraConfig(r=3, target_modules="all-linear", layers_to_transform=1),
        LoraConfig(r=2, target_modules=("q_proj", "down_proj"), rank_pattern={"0.*q_proj": 5}),
        True,
    ),
    "embeddings": (
        "llama",
        LoraConfig(r=3, target_modules=("embed_tokens", "q_proj")),
        LoraConfig(r=2, target_modules=("embed_tokens", "lm_head")),
        True,
    ),
    "conv1d": (
        "gpt2",
        LoraConfig(r=3, target_modules=("c_attn",), lora_bias=True),
        LoraConfig(r=2, target_modules=("c_fc",)),
        True,
    ),
    "biases": (
        "bert",
        LoraConfig(r=3, target_modules=("query",), bias="all", modules_to_save=("classifier",)),
        LoraConfig(r=2, target_modules=("value",), bias="all"),
        True,
    ),
    "tokens": (
        "llama",
        LoraConfig(r=3, target_modules=("q_proj",), trainable_token_indices=(3, 7)),
        LoraConfig(r=2, target_modules=("q_proj",), trainable_token_indices=(7, 1)),
        True,
    ),
    "rows only": (
        "llama",
        TrainableTokensConfig(token_indices=(3, 7)),
        TrainableTokensConfig(token_indices=(7, 1)),
        True,
    ),
    "pissa": (
        "llama",
        LoraConfig(r=2, target_modules=("q_proj",), init_lora_weights="pissa"),
        LoraConfig(r=2, target_modules=("q_proj",)),
        True,
    ),
    "factors": (
        "llama",
        IA3Config(),
        IA3Config(target_modules=("q_proj", "v_proj"), feedforward_modules=()),
        True,
    ),
    "factors and head": ("bert", IA3Config(modules_to_save=("classifier",)), IA3Config(), True),
    "full": ("bert", FullConfig(), FullConfig(), False),
    "biases only": ("gpt2", FullConfig(parts="biases"), FullConfig(parts="biases"), False),
    "norms only": ("llama", FullConfig(parts="norms"), FullConfig(parts="norms"), False),
}
every_pair = pytest.mark.parametrize("pair", PAIRS)


def saved(kind: str, configs: Mapping[str, MethodConfig], folder: Path) -> AdapterSet:
    """A tiny model with adapters that change it, each saved in a folder of its name."""
    model: Any = tiny(kind)
    for seed, (name, config) in enumerate(configs.items()):
        adapters = attach(model, config, name, storage=FOLDER)
        stir(adapters, name, seed=seed)
        adapters.save(folder / name, name)
    return adapters


@every_pair
@pytest.mark.parametrize("how", ["linear", "ties"])
def test_files_are_summed_as_the_model_would(pair: str, how: Any, tmp_path: Path) -> None:
    kind, one, two, in_peft = PAIRS[pair]
    adapters = saved(kind, {"a": one, "b": two}, tmp_path)
    weights, mixing = {"a": 0.7, "b": -0.4}, Mixing(how=how)
    combine(adapters, weights, "c", how=how)
    adapters.activate("c")
    expected = logits(adapters.model, batch(kind))

    sources = [read_files(tmp_path / name) for name in weights]
    terms = [Term(n, w, source.adapter) for (n, w), source in zip(weights.items(), sources, strict=True)]
    found = combined(terms, mixing, base_values(adapters)).adapter
    content = content_of(found, sources, "tiny")
    write_files(tmp_path / "sum", content, tensors_of(found, sources), None)

    fresh: Any = tiny(kind)
    attach_folder(fresh, tmp_path / "sum", storage=FOLDER)
    torch.testing.assert_close(logits(fresh, batch(kind)), expected, rtol=1e-4, atol=1e-5)
    if in_peft:
        theirs = peft.PeftModel.from_pretrained(tiny(kind), tmp_path / "sum").eval()
        torch.testing.assert_close(logits(theirs, batch(kind)), expected, rtol=1e-4, atol=1e-5)
    adapters.activate(["a"])
    assert not torch.allclose(logits(adapters.model, batch(kind)), expected, atol=1e-3)


ALONE = {
    **{name: (kind, one) for name, (kind, one, _, _) in PAIRS.items()},
    "dora": ("llama", LoraConfig(r=2, use_dora=True)),
    "bottleneck": ("llama", BottleneckConfig()),
}


@pytest.mark.parametrize("name", ALONE)
def test_reading_and_writing_loses_nothing(name: str, tmp_path: Path) -> None:
    kind, config = ALONE[name]
    saved(kind, {"a": config}, tmp_path)
    source = read_files(tmp_path / "a")
    assert source.base is not None and not source.embeddings
    write_files(tmp_path / "again", source.content, tensors_of(source.adapter, [source]), None)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "a" / file).read_bytes()


def test_names_are_those_that_parts_have(tmp_path: Path) -> None:
    adapters = saved("bert", {"a": PAIRS["biases"][1]}, tmp_path)
    parts: dict[str, dict[str, Tensor]] = {
        path: dict(part.saved()) for path, part in adapters.parts("a").items()
    }
    read = read_files(tmp_path / "a").adapter.parts
    assert {path: part.keys() for path, part in read.items()} == {p: part.keys() for p, part in parts.items()}
