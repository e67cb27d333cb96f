"""Configs of bases that many people use, for a plan on a machine without a network.

The figures are those of each model's own `config.json` on the hub. Weights are never part of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig

SOURCE = "the table of known bases"

_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
_QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "dtype": "bfloat16"}
_QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "dtype": "bfloat16"}
_MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "dtype": "bfloat16"}
_GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "dtype": "float32"}
_T5 = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "dtype": "float32",
    "vocab_size": 32128,
    "decoder_start_token_id": 0,
    "n_positions": 512,
}
_FLAN = {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_LONG, _OLD = 131_072, 4096


def _decoder(kind: Mapping[str, Any], context: int, vocabulary: int, *, tied: bool = False) -> dict[str, Any]:
    return {
        **kind,
        "max_position_embeddings": context,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


def _sizes(width: int, inner: int, layers: int, heads: int, groups: int, head: int | None) -> dict[str, int]:
    sizes = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
    }
    return sizes if head is None else {**sizes, "head_dim": head}


def _t5(
    kind: Mapping[str, Any], width: int, head: int, inner: int, layers: int, heads: int
) -> dict[str, Any]:
    sizes = {"d_model": width, "d_kv": head, "d_ff": inner, "num_layers": layers, "num_heads": heads}
    return {**kind, **sizes, "num_decoder_layers": layers}


_LLAMA3, _LLAMA2 = _decoder(_LLAMA, _LONG, 128_256), _decoder(_LLAMA, _OLD, 32_000)
_LLAMA1 = _decoder(_LLAMA, 2048, 32_000)
_SMALL_LLAMA = _decoder(_LLAMA, _LONG, 128_256, tied=True)
_QWEN3_SMALL, _QWEN3_LARGE = (_decoder(_QWEN3, 40_960, 151_936, tied=tied) for tied in (True, False))
_QWEN2_SMALL = _decoder(_QWEN2, 32_768, 151_936, tied=True)
_QWEN2_LARGE = _decoder(_QWEN2, 32_768, 152_064)
_SMOL = _decoder(_LLAMA, 8192, 49_152, tied=True)

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "meta-llama/Llama-3.2-1B": {**_SMALL_LLAMA, **_sizes(2048, 8192, 16, 32, 8, 64)},
    "meta-llama/Llama-3.2-3B": {**_SMALL_LLAMA, **_sizes(3072, 8192, 28, 24, 8, 128)},
    "meta-llama/Meta-Llama-3-8B": {
        **_decoder(_LLAMA, 8192, 128_256),
        **_sizes(4096, 14_336, 32, 32, 8, None),
    },
    "meta-llama/Llama-3.1-8B": {**_LLAMA3, **_sizes(4096, 14_336, 32, 32, 8, None)},
    "meta-llama/Llama-3.1-70B": {**_LLAMA3, **_sizes(8192, 28_672, 80, 64, 8, None)},
    "meta-llama/Llama-3.3-70B": {**_LLAMA3, **_sizes(8192, 28_672, 80, 64, 8, None)},
    "meta-llama/Llama-2-7b-hf": {**_LLAMA2, **_sizes(4096, 11_008, 32, 32, 32, None)},
    "meta-llama/Llama-2-13b-hf": {**_LLAMA2, **_sizes(5120, 13_824, 40, 40, 40, None)},
    "meta-llama/Llama-2-70b-hf": {**_LLAMA2, **_sizes(8192, 28_672, 80, 64, 8, None)},
    "huggyllama/llama-7b": {**_LLAMA1, **_sizes(4096, 11_008, 32, 32, 32, None)},
    "huggyllama/llama-13b": {**_LLAMA1, **_sizes(5120, 13_824, 40, 40, 40, None)},
    "huggyllama/llama-30b": {**_LLAMA1, **_sizes(6656, 17_920, 60, 52, 52, None)},
    "huggyllama/llama-65b": {**_LLAMA1, **_sizes(8192, 22_016, 80, 64, 64, None)},
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": {**_LLAMA1, **_sizes(2048, 5632, 22, 32, 4, None)},
    "HuggingFaceTB/SmolLM2-135M": {**_SMOL, **_sizes(576, 1536, 30, 9, 3, None)},
    "HuggingFaceTB/SmolLM2-360M": {**_SMOL, **_sizes(960, 2560, 32, 15, 5, None)},
    "HuggingFaceTB/SmolLM2-1.7B": {**_SMOL, **_sizes(2048, 8192, 24, 32, 32, None)},
    "Qwen/Qwen2.5-0.5B": {**_QWEN2_SMALL, **_sizes(896, 4864, 24, 14, 2, None)},
    "Qwen/Qwen2.5-1.5B": {**_QWEN2_SMALL, **_sizes(1536, 8960, 28, 12, 2, None)},
    "Qwen/Qwen2.5-3B": {**_QWEN2_SMALL, **_sizes(2048, 11_008, 36, 16, 2, None)},
    "Qwen/Qwen2.5-7B": {**_QWEN2_LARGE, **_sizes(3584, 18_944, 28, 28, 4, None)},
    "Qwen/Qwen2.5-14B": {**_QWEN2_LARGE, **_sizes(5120, 13_824, 48, 40, 8, None)},
    "Qwen/Qwen2.5-32B": {**_QWEN2_LARGE, **_sizes(5120, 27_648, 64, 40, 8, None)},
    "Qwen/Qwen2.5-72B": {**_QWEN2_LARGE, **_sizes(8192, 29_568, 80, 64, 8, None)},
    "Qwen/Qwen3-0.6B": {**_QWEN3_SMALL, **_sizes(1024, 3072, 28, 16, 8, 128)},
    "Qwen/Qwen3-1.7B": {**_QWEN3_SMALL, **_sizes(2048, 6144, 28, 16, 8, 128)},
    "Qwen/Qwen3-4B": {**_QWEN3_SMALL, **_sizes(2560, 9728, 36, 32, 8, 128)},
    "Qwen/Qwen3-8B": {**_QWEN3_LARGE, **_sizes(4096, 12_288, 36, 32, 8, 128)},
    "Qwen/Qwen3-14B": {**_QWEN3_LARGE, **_sizes(5120, 17_408, 40, 40, 8, 128)},
    "Qwen/Qwen3-32B": {**_QWEN3_LARGE, **_sizes(5120, 25_600, 64, 64, 8, 128)},
    "mistralai/Mistral-7B-v0.1": {
        **_decoder(_MISTRAL, 32_768, 32_000),
        **_sizes(4096, 14_336, 32, 32, 8, None),
        "sliding_window": 4096,
    },
    "mistralai/Mistral-7B-v0.3": {
        **_decoder(_MISTRAL, 32_768, 32_768),
        **_sizes(4096, 14_336, 32, 32, 8, None),
        "sliding_window": None,
    },
    "openai-community/gpt2": {**_GPT2, "n_embd": 768, "n_layer": 12, "n_head": 12},
    "openai-community/gpt2-medium": {**_GPT2, "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "openai-community/gpt2-large": {**_GPT2, "n_embd": 1280, "n_layer": 36, "n_head": 20},
    "openai-community/gpt2-xl": {**_GPT2, "n_embd": 1600, "n_layer": 48, "n_head": 25},
    "google-bert/bert-base-uncased": {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "dtype": "float32",
        **_sizes(768, 3072, 12, 12, 12, None),
    },
    "FacebookAI/roberta-base": {
        "model_type": "roberta",
        "architectures": ["RobertaForMaskedLM"],
        "dtype": "float32",
        "vocab_size": 50_265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        **_sizes(768, 3072, 12, 12, 12, None),
    },
    "google-t5/t5-small": _t5(_T5, 512, 64, 2048, 6, 8),
    "google-t5/t5-base": _t5(_T5, 768, 64, 3072, 12, 12),
    "google-t5/t5-large": _t5(_T5, 1024, 64, 4096, 24, 16),
    "google-t5/t5-3b": _t5(_T5, 1024, 128, 16_384, 24, 32),
    "google/flan-t5-small": _t5(_FLAN, 512, 64, 1024, 8, 6),
    "google/flan-t5-base": _t5(_FLAN, 768, 64, 2048, 12, 12),
    "google/flan-t5-large": _t5(_FLAN, 1024, 64, 2816, 24, 16),
    "google/flan-t5-xl": _t5(_FLAN, 2048, 64, 5120, 24, 32),
}
"""Hub id -> what its config.json says, as far as memory and time depend on it."""

_VARIANTS = ("-instruct", "-chat-hf", "-chat", "-base", "-it", "-instruct-v0.1", "-instruct-v0.3")
_SHORT = {
    "meta-llama/Llama-2-7b-chat-hf": "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-2-13b-chat-hf": "meta-llama/Llama-2-13b-hf",
    "meta-llama/Llama-2-70b-chat-hf": "meta-llama/Llama-2-70b-hf",
    "mistralai/Mistral-7B-Instruct-v0.1": "mistralai/Mistral-7B-v0.1",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistralai/Mistral-7B-v0.3",
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "t5-small": "google-t5/t5-small",
    "t5-base": "google-t5/t5-base",
    "t5-large": "google-t5/t5-large",
    "t5-3b": "google-t5/t5-3b",
    "bert-base-uncased": "google-bert/bert-base-uncased",
    "roberta-base": "FacebookAI/roberta-base",
}
"""Other names of the same shapes."""


def known_config(name: str) -> Any | None:
    """The config of a base of the table, by its hub id in any case.

    Instruction-tuned variants have the shapes of their base.

    >>> known_config("meta-llama/Llama-3.1-8B-Instruct").hidden_size
    4096
    >>> known_config("nobody/nothing") is None
    True
    """
    by_name = {key.lower(): key for key in CONFIGS} | {key.lower(): name for key, name in _SHORT.items()}
    wanted = name.lower()
    for ending in ("", *_VARIANTS):
        found = by_name.get(wanted.removesuffix(ending)) if wanted.endswith(ending) else None
        if found is not None:
            fields = dict(CONFIGS[found])
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
            config._name_or_path = name
            return config
    return None
