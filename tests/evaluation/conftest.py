"""Tiny causal models with random weights, a tokenizer of letters, and rows for them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from graftlm.evaluation.rows import IGNORED, Tokens

LETTERS = ["<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz "]
SHAPE = {
    "vocab_size": len(LETTERS),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """`make_model(kind, seed)`: a fresh model; "gemma2" caps its logits, so they are not head(hidden)."""

    def make(kind: str = "llama", seed: int = 0) -> Any:
        torch.manual_seed(seed)
        if kind == "llama":
            model = LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.4))
        elif kind == "gemma2":
            settings = SHAPE | {"pad_token_id": 0, "final_logit_softcapping": 0.5, "initializer_range": 0.4}
            model = Gemma2ForCausalLM(Gemma2Config(**settings))
        else:
            sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": len(LETTERS)}
            model = GPT2LMHeadModel(
                GPT2Config(**sizes, bos_token_id=0, eos_token_id=1, initializer_range=0.4)
            )
        return model

    return make


@pytest.fixture(scope="session")
def letters() -> Any:
    """One token per letter."""
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(LETTERS)}, unk_token="<unk>"))
    words.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., list[Tokens]]:
    """`make_rows(count)`: rows of 4 to 40 tokens with a prompt, seeded."""

    def make(count: int = 12, seed: int = 0) -> list[Tokens]:
        chance = random.Random(seed)
        rows = []
        for number in range(1, count + 1):
            prompt = [0, *(chance.randrange(3, len(LETTERS)) for _ in range(chance.randint(1, 19)))]
            answer = [*(chance.randrange(3, len(LETTERS)) for _ in range(chance.randint(1, 19))), 1]
            rows.append(Tokens((*prompt, *answer), (*[IGNORED] * len(prompt), *answer), row=number))
        return rows

    return make
