"""Tiny models with random weights, one of each kind that adapters must work on, and what tests need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from graftlm.formats.layout import FOLDER
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.attach import attach
from graftlm.methods.base import MethodConfig
from graftlm.methods.lora import LoraConfig

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

ENCODER_DECODERS = ("t5", "bart")


def tiny(kind: str, *, seed: int = 0, **changes: Any) -> Any:
    """A model of that kind in eval mode, the same for the same seed. Dropout is off."""
    model_class, config_class, settings = KINDS[kind]
    settings = settings | changes
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**settings)
    for name in vars(config):
        if "dropout" in name or name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            setattr(config, name, 0.0)
    model = getattr(transformers, model_class)(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def batch(kind: str, *, rows: int = 3, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Inputs and labels that fit the kind of model."""
    generator = torch.Generator().manual_seed(100 + seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind in ("bert", "roberta"):
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


def graft(
    model: Any, config: MethodConfig | None = None, name: str = "default", **options: Any
) -> AdapterSet:
    """`attach` with folders as storage; by default a LoRA on all linear layers that changes the output."""
    config = config or LoraConfig(r=4, lora_alpha=8, init_lora_weights=False)
    return attach(model, config, name, storage=FOLDER, **options)


def stir(adapters: AdapterSet, name: str = "default", *, seed: int = 0, size: float = 0.3) -> None:
    """Give an adapter weights that visibly change the model, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.parameters(name):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((size * noise / parameter.shape[-1] ** 0.5).to(parameter.dtype))


def snapshot(model: nn.Module) -> Callable[[], None]:
    """A function that asserts that nothing in the model differs from now: modules, bytes, flags, modes."""
    modules = list(model.named_modules(remove_duplicate=False))
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = [(name, p, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)]
    modes = [module.training for _, module in modules]
    attributes = set(vars(model))

    def check() -> None:
        now = list(model.named_modules(remove_duplicate=False))
        assert [name for name, _ in now] == [name for name, _ in modules]
        assert all(a is b for (_, a), (_, b) in zip(now, modules, strict=True))
        assert [module.training for _, module in now] == modes
        flags = [(n, p, p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)]
        assert [(n, f) for n, _, f in flags] == [(n, f) for n, _, f in parameters]
        assert all(a is b for (_, a, _), (_, b, _) in zip(flags, parameters, strict=True))
        state = model.state_dict()
        assert state.keys() == values.keys()
        assert all(torch.equal(state[name], values[name]) for name in values)
        assert set(vars(model)) == attributes

    return check
