"""Graft's own methods as subjects of the suite: a row of the matrix each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from graftlm.methods.adaption_prompt import AdaptionPromptConfig
from graftlm.methods.base import MethodConfig
from graftlm.methods.bottleneck import BottleneckConfig
from graftlm.methods.full import FullConfig
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lora import LoraConfig
from graftlm.methods.prefix import PrefixTuningConfig
from graftlm.methods.prompt import PromptTuningConfig
from graftlm.methods.tokens import TrainableTokensConfig
from graftlm.testing.models import QUANTISED
from graftlm.testing.suite import Subject

EMBEDDING = {
    "llama": "embed_tokens",
    "gpt2": "wte",
    "bert": "word_embeddings",
    "roberta": "word_embeddings",
    "t5": "embed_tokens",
    "bart": "embed_tokens",
}
"""Name of the table of input embeddings, or of both in an encoder-decoder."""
HEAD = {"bert": "classifier", "roberta": "classifier"}
SHARED = {
    f"{name}/{kind}": "every row of a batch shares the embeddings of positions"
    for name in ("routed", "routed_training", "generates_routed")
    for kind in ("t5", "bart")
}
TOKENS = (29, 7, 11, 40, 13, 21)
VIRTUAL_TOKENS = {"identity": "a virtual token takes part in attention from the start"}
PREFIX = VIRTUAL_TOKENS | {"checkpointing_reentrant": "re-entrant checkpoints lose the gradients of a cache"}


def _lora_on_embeddings(kind: str) -> LoraConfig:
    return LoraConfig(r=4, target_modules=("attention", EMBEDDING[kind]))


def _dora_on_embeddings(kind: str) -> LoraConfig:
    return LoraConfig(r=4, target_modules=("attention", EMBEDDING[kind]), use_dora=True)


def _virtual_tokens(make: Callable[..., MethodConfig], **fields: Any) -> Callable[[str], MethodConfig]:
    """With a head of its own on classifiers, which PEFT asks of any prompt for them."""
    heads = {kind: (name,) for kind, name in HEAD.items()}
    return lambda kind: make(num_virtual_tokens=3, modules_to_save=heads.get(kind), **fields)


def _lora_with_head(kind: str) -> LoraConfig:
    return LoraConfig(r=4, target_modules="attention", modules_to_save=(HEAD.get(kind, "lm_head"),))


ROWS: Mapping[str, Subject] = {
    "lora": Subject(LoraConfig(r=4, lora_alpha=8)),
    "rslora": Subject(LoraConfig(r=4, lora_alpha=8, use_rslora=True)),
    "dora": Subject(LoraConfig(r=4, lora_alpha=8, use_dora=True)),
    "lora, own biases": Subject(LoraConfig(r=4, lora_alpha=12, target_modules="mlp", lora_bias=True)),
    "lora, base's biases": Subject(LoraConfig(r=4, lora_alpha=8, bias="all")),
    "lora, embeddings": Subject(_lora_on_embeddings),
    "dora, embeddings": Subject(_dora_on_embeddings),
    "lora, own head": Subject(_lora_with_head),
    "lora, token rows": Subject(LoraConfig(r=4, trainable_token_indices=TOKENS)),
    "lora, patterns": Subject(
        LoraConfig(r=4, rank_pattern={r".*\.0\..*": 2}, alpha_pattern={r".*\.0\..*": 6})
    ),
    "pissa": Subject(LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa")),
    "olora": Subject(LoraConfig(r=4, lora_alpha=8, init_lora_weights="olora")),
    "orthogonal": Subject(LoraConfig(r=4, lora_alpha=8, init_lora_weights="orthogonal")),
    "token rows": Subject(TrainableTokensConfig(token_indices=TOKENS)),
    "ia3": Subject(IA3Config()),
    "bottleneck, pfeiffer": Subject(BottleneckConfig(reduction_factor=4)),
    "bottleneck, houlsby": Subject(
        BottleneckConfig(placement="houlsby", cross_adapter=True, reduction_factor=8, non_linearity="gelu")
    ),
    "bottleneck, parallel": Subject(
        BottleneckConfig(placement="parallel", scaling="learned", reduction_factor=4, non_linearity="silu")
    ),
    "prefix": Subject(_virtual_tokens(PrefixTuningConfig), PREFIX),
    "prefix, projected": Subject(
        _virtual_tokens(PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=8), PREFIX
    ),
    "prompt": Subject(_virtual_tokens(PromptTuningConfig), VIRTUAL_TOKENS),
    "gated prompts": Subject(
        AdaptionPromptConfig(adapter_len=3, adapter_layers=1),
        refused=dict.fromkeys(
            ("gemma3", "bert", "roberta", "t5", "bart"), "its attention computes queries in a way of its own"
        ),
    ),
    "full": Subject(
        FullConfig(), SHARED, refused=dict.fromkeys(QUANTISED, "a step of training is lost between two codes")
    ),
    "full, biases": Subject(
        FullConfig(parts="biases"), refused={"llama": "it has no biases", "t5": "it has no biases"}
    ),
    "full, norms": Subject(FullConfig(parts="norms")),
}
