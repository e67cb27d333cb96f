"""Tiny checkpoints of many architectures, for the tests of loading and saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from graftlm.testing.models import KINDS, VOCABULARY, tiny

_WIDE = {"hidden_size": 64, "intermediate_size": 128}
_DECODER = {
    **_WIDE,
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
WIDER: dict[str, dict[str, Any]] = {
    "llama": _WIDE | {"head_dim": 16},
    "llama-tied": _WIDE | {"head_dim": 16},
    "gpt2": {"n_embd": 64},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128},
    "bart": {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128},
}
"""Sizes that are multiples of a block: the CPU code of bitsandbytes misreads others."""

_EXPERTS = {**_DECODER, "num_experts_per_tok": 2}
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_EXPERTS, "num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16, "mlp_only_layers": [0]},
    ),
    "cut-up": (  # its checkpoints hold gate, query, key and value in one tensor
        "HrmTextForCausalLM",
        "HrmTextConfig",
        {**_DECODER, "num_key_value_heads": 4, "head_dim": 16},
    ),
}
CAUSAL_AND_SEQUENCE = ("llama", "llama-tied", "gpt2", "gemma3", "t5", "bart", *OTHERS)


def small(kind: str, **changes: Any) -> Any:
    """A model of that kind with random weights, in evaluation mode."""
    if kind in KINDS:
        return tiny(kind, **WIDER.get(kind, {}) | changes)
    model_class, config_class, settings = OTHERS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings | changes)
    return getattr(transformers, model_class)(config).eval()


def tokenizer() -> Any:
    words = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklm"]
    made = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def checkpoint(folder: Path, kind: str, *, shards: str = "5GB", dtype: torch.dtype = torch.float32) -> Path:
    """A folder as `save_pretrained` writes it."""
    small(kind).to(dtype).save_pretrained(folder, max_shard_size=shards)
    tokenizer().save_pretrained(folder)
    return folder
