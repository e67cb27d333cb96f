"""What the layers of a block are for, on many architectures, written down by hand."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from graftlm.core.errors import TargetError
from graftlm.methods.families import ROLES, Block, blocks_of, roles_of
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.resolve import resolve

from .test_targets import FAMILIES, model_of
from .tiny import DECODER, KINDS, graft, tiny

LLAMA = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj",
    "mlp.gate_proj mlp.up_proj",
    "mlp.down_proj",
)
BERT = (
    "attention.self.query attention.self.key attention.self.value attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
GPT2 = "attn.c_attn attn.c_attn attn.c_attn attn.c_proj", "mlp.c_fc", "mlp.c_proj"
BART = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj", "fc1", "fc2"


def fused(attention: str, output: str = "dense") -> tuple[str, str, str]:
    qkv = f"{attention}.query_key_value"
    return f"{qkv} {qkv} {qkv} {attention}.{output}", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"


# model class: queries, keys, values and end of self-attention; beginning and end of the feed-forward part
EXPECTED: dict[str, tuple[str, str, str]] = {
    **dict.fromkeys((name for name in FAMILIES if name.startswith(("Llama", "Mistral", "Qwen2"))), LLAMA),
    **dict.fromkeys(("Qwen3ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"), LLAMA),
    **dict.fromkeys(("SmolLM3ForCausalLM", "Olmo2ForCausalLM"), LLAMA),
    **dict.fromkeys(("MixtralForCausalLM", "Qwen3MoeForCausalLM"), (LLAMA[0], "", "")),
    "Phi3ForCausalLM": (
        "self_attn.qkv_proj self_attn.qkv_proj self_attn.qkv_proj self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    ),
    "PhiForCausalLM": (
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.dense",
        "mlp.fc1",
        "mlp.fc2",
    ),
    **dict.fromkeys(("GPT2LMHeadModel", "GPT2Model"), GPT2),
    "GPTNeoXForCausalLM": fused("attention"),
    **dict.fromkeys(("BloomForCausalLM", "FalconForCausalLM"), fused("self_attention")),
    "GPTJForCausalLM": (
        "attn.q_proj attn.k_proj attn.v_proj attn.out_proj",
        "mlp.fc_in",
        "mlp.fc_out",
    ),
    "OPTForCausalLM": BART,
    **dict.fromkeys((name for name in FAMILIES if name.startswith(("Bert", "Roberta"))), BERT),
    "DebertaV2ForSequenceClassification": (
        "attention.self.query_proj attention.self.key_proj attention.self.value_proj attention.output.dense",
        *BERT[1:],
    ),
    "DistilBertForSequenceClassification": (
        "attention.q_lin attention.k_lin attention.v_lin attention.out_lin",
        "ffn.lin1",
        "ffn.lin2",
    ),
    "T5ForConditionalGeneration": (
        "layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v layer.0.SelfAttention.o",
        "layer.N.DenseReluDense.wi",
        "layer.N.DenseReluDense.wo",
    ),
    "BartForConditionalGeneration": BART,
}


def described(block: Block) -> tuple[str, str, str]:
    """The block in the words of `EXPECTED`; the number of T5's feed-forward layer differs by stack."""

    def inside(*paths: str | None) -> str:
        return " ".join(str(path).removeprefix(f"{block.path}.") for path in paths)

    (own,) = (attention for attention in block.attentions if not attention.is_cross)
    attention = inside(*own.queries, *own.keys, *own.values, own.output)
    parts = block.feed_forwards
    begins, ends = inside(*(p for f in parts for p in f.inputs)), inside(*(f.output for f in parts))
    numbered = f"layer.{2 if block.stack == 'decoder' else 1}."
    return attention, begins.replace(numbered, "layer.N."), ends.replace(numbered, "layer.N.")


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks(name: str) -> None:
    blocks = blocks_of(model_of(name))
    is_seq2seq = name.startswith(("T5", "Bart"))
    assert [block.number for block in blocks] == list(range(4 if is_seq2seq else 2))
    stacks = ["encoder"] * 2 + ["decoder"] * 2 if is_seq2seq else [None] * 2
    assert [block.stack for block in blocks] == stacks
    assert {described(block) for block in blocks} == {EXPECTED[name]}
    crossed = [block.number for block in blocks for attention in block.attentions if attention.is_cross]
    assert crossed == ([2, 3] if is_seq2seq else [])
    has_experts = name.startswith(("Mixtral", "Qwen3Moe"))
    assert [block.mixture for block in blocks] == [
        f"{block.path}.mlp" if has_experts else None for block in blocks
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_roles_are_those_of_the_blocks(name: str) -> None:
    model = model_of(name)
    roles = roles_of(model)
    assert tuple(roles) == ROLES
    blocks = blocks_of(model)
    attentions = [attention for block in blocks for attention in block.attentions]
    for role in ("queries", "keys", "values"):
        assert {*roles[role]} == {path for a in attentions for path in getattr(a, role)}
        assert {*roles[role]} <= {*roles["attention"]}
    assert {*roles["attention-output"]} == {a.output for a in attentions}
    parts = [part for block in blocks for part in block.feed_forwards]
    assert {*roles["mlp-output"]} == {part.output for part in parts} <= {*roles["mlp"]}
    assert {*roles["mlp-input"]} == {path for part in parts for path in part.inputs} <= {*roles["mlp"]}
    order = [path for path, _ in model.named_modules()]
    assert all([*paths] == sorted(paths, key=order.index) for paths in roles.values())


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
MORE: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "GPT2LMHeadModel": (
        {**KINDS["gpt2"][2], "add_cross_attention": True, "n_layer": 1},
        {"queries": "c_attn q_attn", "keys": "c_attn c_attn", "attention-output": "c_proj c_proj"},
    ),
    "AlbertModel": (
        {**SMALL, "embedding_size": 16},
        {"keys": "key", "attention-output": "dense", "mlp-input": "ffn", "mlp-output": "ffn_output"},
    ),
    "ModernBertModel": (
        {**SMALL, "vocab_size": 60, "pad_token_id": 0, "num_hidden_layers": 1},
        {"values": "Wqkv", "attention-output": "Wo", "mlp-input": "Wi", "mlp-output": "Wo"},
    ),
    "MT5Model": (
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
        {"mlp-input": "wi_0 wi_1 wi_0 wi_1", "mlp-output": "wo wo", "values": "v v v"},
    ),
    "DeepseekV3ForCausalLM": (
        {**DECODER, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4}
        | {"qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1},
        {"queries": "q_b_proj q_b_proj", "keys": "kv_b_proj kv_b_proj", "values": "kv_b_proj kv_b_proj"},
    ),
    "GPTNeoForCausalLM": (
        {"hidden_size": 32, "num_layers": 1, "attention_types": [[["global"], 1]], "num_heads": 4},
        {"queries": "q_proj", "attention-output": "out_proj", "mlp-output": "c_proj"},
    ),
    "StableLmForCausalLM": (DECODER, {"mlp-output": "down_proj down_proj"}),
    "Starcoder2ForCausalLM": (DECODER, {"mlp-input": "c_fc c_fc", "mlp-output": "c_proj c_proj"}),
}


@pytest.mark.parametrize("name", MORE)
def test_more_structures(name: str) -> None:
    settings, expected = MORE[name]
    model_class = getattr(transformers, name)
    with torch.device("meta"):
        roles = roles_of(model_class(model_class.config_class(**settings)))
    found = {role: " ".join(path.rpartition(".")[2] for path in roles[role]) for role in expected}
    assert found == expected


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_do_not_hide_the_structure(kind: str) -> None:
    model = tiny(kind)
    roles, blocks = roles_of(model), blocks_of(model)
    assert all(roles.values())
    graft(model)
    assert (roles_of(model), blocks_of(model)) == (roles, blocks)


def test_equal_widths_leave_the_order() -> None:
    with torch.device("meta"):
        model = transformers.LlamaModel(transformers.LlamaConfig(**DECODER | {"intermediate_size": 32}))
    part = blocks_of(model)[0].feed_forwards[0]
    assert part.inputs == ("layers.0.mlp.gate_proj", "layers.0.mlp.up_proj")
    assert part.output == "layers.0.mlp.down_proj"


def test_a_role_that_nothing_has_asks_for_names() -> None:
    with pytest.raises(TargetError) as caught:
        resolve(model_of("MixtralForCausalLM"), IA3Config())
    assert "'mlp-output' is empty" in str(caught.value) and "k_proj" in str(caught.value)
    with pytest.raises(TargetError, match="'keys' is empty"):
        resolve(nn.Sequential(nn.Linear(4, 4)), IA3Config())


# Where PEFT's table scales queries in place of what the paper scales.
SLIPS = {
    **dict.fromkeys(("GPTJForCausalLM", "PhiForCausalLM", "BartForConditionalGeneration"), "keys"),
    **dict.fromkeys(("Gemma2ForCausalLM", "Gemma3ForCausalLM"), "keys"),
    **dict.fromkeys(("Qwen2ForCausalLM", "Qwen3ForCausalLM"), "keys"),
    "OPTForCausalLM": "values",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_defaults_of_ia3_are_pefts_table_but_for_slips(name: str) -> None:
    """Where an ending in PEFT's table also hits the end of attention (BERT), that is a slip of the ending."""
    model = model_of(name)
    kind = model.config.model_type
    constants = peft.utils.constants
    table = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    if kind not in table or kind == "mixtral":
        return
    paths = [path for path, _ in model.named_modules()]
    theirs = {path for path in paths for end in table[kind] if path.endswith(f".{end}") or path == end}
    theirs -= {path for path in theirs if path.endswith("attention.output.dense")}
    roles = roles_of(model)
    ours = {*resolve(model, IA3Config()).paths}
    if name in SLIPS:
        assert ours - theirs == {*roles[SLIPS[name]]} and theirs - ours == {*roles["queries"]}
    else:
        assert ours == theirs
    inner = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[kind]
    assert {path for path in ours if any(path.endswith(f".{end}") for end in inner)} - {
        *roles["attention-output"]
    } == {*roles["mlp-output"]}
