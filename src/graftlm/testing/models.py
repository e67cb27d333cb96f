"""Tiny models with random weights, one of each kind that adapters must work on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.quant.convert import quantise
from graftlm.quant.scheme import Scheme

VOCABULARY = 48

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_labels": 3,
    "pad_token_id": 1,
}
SEQ2SEQ = {"vocab_size": VOCABULARY, "d_model": 32, "decoder_start_token_id": 0, "pad_token_id": 0}

KINDS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**DECODER, "tie_word_embeddings": False}),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**DECODER, "tie_word_embeddings": True}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**DECODER, "query_pre_attn_scalar": 8, "sliding_window": 16, "layer_types": ["full_attention"] * 2},
    ),
    "bert": ("BertForSequenceClassification", "BertConfig", {**ENCODER, "pad_token_id": 0}),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", ENCODER),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**SEQ2SEQ, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "eos_token_id": 2},
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {**SEQ2SEQ, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
        | {
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "scale_embedding": True,
        }
        | {"max_position_embeddings": 64, "eos_token_id": 2, "bos_token_id": 1, "forced_eos_token_id": None},
    ),
}
"""Name of a kind -> class of the model, class of its config, settings."""

QUANTISED: Mapping[str, tuple[str, str]] = {
    f"{kind}-{scheme}": (kind, scheme)
    for kind, scheme in (
        *(("llama", scheme) for scheme in ("nf4", "fp4", "int8", "fp8")),
        *((kind, "nf4") for kind in ("gpt2", "bert", "t5", "bart")),
    )
}
"""Name of a kind whose linear layers are stored in few bits -> the kind it is made from, the scheme."""

ENCODERS = ("bert", "roberta")
ENCODER_DECODERS = ("t5", "bart")


def tiny(kind: str, *, seed: int = 0, **changes: Any) -> Any:
    """A model of that kind in eval mode, the same for the same seed. Dropout is off, biases are not zero.

    >>> sum(p.numel() for p in tiny("llama").parameters())
    18592
    >>> tiny("llama-nf4").model.layers[0].mlp.up_proj
    QuantisedLinear(32, 48, bias=False, nf4)
    """
    import transformers

    if kind in QUANTISED:
        kind, scheme = QUANTISED[kind]
        model = tiny(kind, seed=seed, **changes)
        quantise(model, Scheme.parse(scheme))
        return model
    model_class, config_class, settings = KINDS[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**(settings | changes))
    for name in vars(config):
        if "dropout" in name or name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            setattr(config, name, 0.0)
    model = getattr(transformers, model_class)(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def unquantised(kind: str) -> str:
    """The kind that a quantised kind is made from; a plain kind is its own.

    >>> unquantised("llama-nf4"), unquantised("llama-tied")
    ('llama', 'llama-tied')
    """
    return QUANTISED.get(kind, (kind, ""))[0]


def batch(kind: str, *, rows: int = 3, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Inputs and labels that fit the kind of model; ids [rows, length]."""
    generator = torch.Generator().manual_seed(100 + seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kind = unquantised(kind)
    if kind in ENCODERS:
        return inputs | {"labels": torch.randint(3, (rows,), generator=generator)}
    if kind in ENCODER_DECODERS:
        labels = torch.randint(3, VOCABULARY, (rows, length - 2), generator=generator)
        return inputs | {"labels": labels}
    return inputs | {"labels": ids.clone()}


@torch.no_grad()
def logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The model's logits, detached."""
    found: Tensor = model(**inputs).logits
    return found.clone()
