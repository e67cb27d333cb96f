"""Which modules a spec chooses, on many architectures; near misses; agreement with PEFT."""

from __future__ import annotations

from functools import cache
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from graftlm.core.errors import AdapterError, TargetError
from graftlm.methods.copies import FullCopy
from graftlm.methods.families import roles_of
from graftlm.methods.lora import LoraConfig
from graftlm.methods.resolve import resolve
from graftlm.methods.targets import select

from .tiny import DECODER, KINDS, batch, graft, logits, snapshot, stir, tiny

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
QKVO = "q_proj k_proj v_proj o_proj"
QKV_OUT = "q_proj k_proj v_proj out_proj"
GATED = "gate_proj up_proj down_proj"

# model class: leaves of attention, of the feed-forward part, and of what is linear outside blocks
FAMILIES: dict[str, tuple[str, str, str]] = {
    "LlamaForCausalLM": (QKVO, GATED, ""),
    "MistralForCausalLM": (QKVO, GATED, ""),
    "Qwen2ForCausalLM": (QKVO, GATED, ""),
    "Qwen3ForCausalLM": (QKVO, GATED, ""),
    "Gemma2ForCausalLM": (QKVO, GATED, ""),
    "Gemma3ForCausalLM": (QKVO, GATED, ""),
    "Phi3ForCausalLM": ("qkv_proj o_proj", "gate_up_proj down_proj", ""),
    "PhiForCausalLM": ("q_proj k_proj v_proj dense", "fc1 fc2", ""),
    "SmolLM3ForCausalLM": (QKVO, GATED, ""),
    "Olmo2ForCausalLM": (QKVO, GATED, ""),
    "GPT2LMHeadModel": ("c_attn c_proj", "c_fc c_proj", ""),
    "GPTNeoXForCausalLM": ("query_key_value dense", "dense_h_to_4h dense_4h_to_h", ""),
    "GPTJForCausalLM": (QKV_OUT, "fc_in fc_out", ""),
    "OPTForCausalLM": (QKV_OUT, "fc1 fc2", ""),
    "BloomForCausalLM": ("query_key_value dense", "dense_h_to_4h dense_4h_to_h", ""),
    "FalconForCausalLM": ("query_key_value dense", "dense_h_to_4h dense_4h_to_h", ""),
    "MixtralForCausalLM": (QKVO, "", ""),
    "Qwen3MoeForCausalLM": (QKVO, "", ""),
    "BertForSequenceClassification": ("query key value dense", "dense", "dense"),
    "BertForMaskedLM": ("query key value dense", "dense", ""),
    "RobertaForSequenceClassification": ("query key value dense", "dense", ""),
    "DistilBertForSequenceClassification": ("q_lin k_lin v_lin out_lin", "lin1 lin2", ""),
    "DebertaV2ForSequenceClassification": ("query_proj key_proj value_proj dense", "dense", ""),
    "T5ForConditionalGeneration": ("q k v o", "wi wo", ""),
    "BartForConditionalGeneration": (QKV_OUT, "fc1 fc2", ""),
    "LlamaForSequenceClassification": (QKVO, GATED, ""),
    "LlamaModel": (QKVO, GATED, ""),
    "BertModel": ("query key value dense", "dense", "dense"),
    "GPT2Model": ("c_attn c_proj", "c_fc c_proj", ""),
}
OWN_NAMES: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "DistilBert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "T5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "Bart": KINDS["bart"][2] | {"encoder_layers": 2, "decoder_layers": 2},
}
FOREIGN = {"T5": ("num_hidden_layers", "head_dim"), "Bart": ("head_dim",), "Falcon": ("head_dim",)}


@cache
def model_of(name: str) -> Any:
    model_class: Any = getattr(transformers, name)
    config_class = model_class.config_class
    family = config_class.__name__.removesuffix("Config").removesuffix("Text")
    settings = DECODER | (EXPERTS if "Moe" in name or "Mixtral" in name else {}) | OWN_NAMES.get(family, {})
    for key in FOREIGN.get(family, ()):
        settings = {k: v for k, v in settings.items() if k != key}
    with torch.device("meta"):
        return model_class(config_class(**settings))


@pytest.mark.parametrize("name", FAMILIES)
def test_roles(name: str) -> None:
    model = model_of(name)
    attention, mlp, outside = (set(leaves.split()) for leaves in FAMILIES[name])
    roles = roles_of(model)
    leaves = {role: {path.rpartition(".")[2] for path in paths} for role, paths in roles.items()}
    assert leaves["attention"] == attention
    assert leaves["mlp"] == mlp
    rest = set(roles["all-linear"]) - set(roles["attention"]) - set(roles["mlp"])
    assert {path.rpartition(".")[2] for path in rest} == outside
    blocks = 4 if name.startswith(("T5", "Bart")) else 2
    cross = 2 if blocks == 4 else 0
    last = [path for path in roles["attention"] if path.rpartition(".")[2] == sorted(attention)[-1]]
    assert len(last) == blocks + cross
    assert not set(roles["attention"]) & set(roles["mlp"])
    linear = {
        p for p, m in model.named_modules() if isinstance(m, nn.Linear | transformers.pytorch_utils.Conv1D)
    }
    assert set(roles["all-linear"]) <= linear
    heads = {path.partition(".")[0] for path in linear - set(roles["all-linear"])}
    assert heads <= {"lm_head", "classifier", "score", "cls", "pre_classifier", "embed_out", "pooler"}


# Where PEFT also adapts parts of the head: it leaves out the last layer of a head only.
WIDER = {
    "BertForMaskedLM": {"cls.predictions.transform.dense"},
    "RobertaForSequenceClassification": {"classifier.dense"},
    "DistilBertForSequenceClassification": {"pre_classifier"},
    "DebertaV2ForSequenceClassification": {"pooler.dense"},
}


@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_all_linear_is_pefts_but_for_layers_of_heads(name: str) -> None:
    model = model_of(name)
    task = "SEQ_CLS" if name.endswith("Classification") else None
    config = peft.LoraConfig(target_modules="all-linear", task_type=task)
    expanded = peft.tuners.tuners_utils._maybe_include_all_linear_layers(config, model)
    chosen = {
        path
        for path, _ in model.named_modules()
        if peft.tuners.tuners_utils.check_target_module_exists(expanded, path)
    }
    ours = set(select(model, LoraConfig(target_modules="all-linear")))
    assert ours <= chosen
    extra = {path for path in chosen - ours if not path.startswith("classifier.out_proj")}
    assert extra - {"classifier", "score"} == WIDER.get(name, set())


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ["model.layers.1.self_attn.q_proj", "lm_head"]},
        {"target_modules": r".*\.(q|k)_proj"},
        {"target_modules": r"model\.layers\.0\.mlp\..*_proj"},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*v_proj"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["embed_tokens"]},
    ],
)
def test_the_grammar_is_pefts(fields: dict[str, Any]) -> None:
    model = model_of("LlamaForCausalLM")
    config = peft.LoraConfig(**fields)
    theirs = [
        path
        for path, _ in model.named_modules()
        if peft.tuners.tuners_utils.check_target_module_exists(config, path)
    ]
    assert select(model, LoraConfig(**fields)) == theirs


@pytest.mark.parametrize(
    ("fields", "leaves"),
    [
        ({"target_modules": ["attention", "down_proj"]}, QKVO + " down_proj"),
        ({"target_modules": ("mlp", "lm_head")}, GATED + " lm_head"),
        ({"target_modules": "all-linear", "exclude_modules": "mlp"}, QKVO),
        ({"target_modules": "all-linear", "exclude_modules": ["mlp", "o_proj"]}, "q_proj k_proj v_proj"),
        ({"target_modules": {"v_proj", "q_proj"}}, "q_proj v_proj"),
        ({"target_modules": r".*\.layers\..*proj", "layers_to_transform": 1}, QKVO + " " + GATED),
    ],
)
def test_roles_mix_with_names(fields: dict[str, Any], leaves: str) -> None:
    chosen = select(model_of("LlamaForCausalLM"), LoraConfig(**fields))
    assert {path.rpartition(".")[2] for path in chosen} == set(leaves.split())
    assert chosen == [p for p, _ in model_of("LlamaForCausalLM").named_modules() if p in chosen]


def test_a_role_that_is_also_the_name_of_a_container_is_the_role() -> None:
    """BERT has modules called `attention`, Llama has modules called `mlp`."""
    for name, role in (("BertModel", "attention"), ("LlamaForCausalLM", "mlp")):
        model = model_of(name)
        assert select(model, LoraConfig(target_modules=(role,))) == list(roles_of(model)[role])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"target_modules": ["q_prj", "v_proj", "up_prj"]},
            ["2 problems", "'q_prj'", "'q_proj'", "'up_prj'"],
        ),
        ({"target_modules": "q_proj"}, ["regular expression", "['q_proj']"]),
        ({"target_modules": "(q_proj"}, ["not a valid regular expression"]),
        ({"target_modules": r".*\.nothing"}, ["matches no module"]),
        ({"target_modules": ["self_attn"]}, ["LlamaAttention", "'q_proj'"]),
        ({"target_modules": ["norm"]}, ["LlamaRMSNorm"]),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_prj"]}, ["'q_prj'", "'q_proj'"]),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, ["excluded again"]),
        ({"target_modules": ["q_proj"], "exclude_modules": ["self_attn"]}, ["LlamaAttention", "'q_proj'"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}, ["[2]", "0 to 1"]),
        ({"target_modules": ["lm_head"], "layers_to_transform": 0}, ["no target lies in a numbered layer"]),
        ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, ["layers_to_transform"]),
        ({"target_modules": ["q_proj"], "modules_to_save": ["scores", "lm_hed"]}, ["'scores'", "'lm_head'"]),
        ({"target_modules": ["q_proj"], "modules_to_save": ["act_fn"]}, ["no parameters"]),
    ],
)
def test_every_entry_must_match_and_near_misses_are_named(fields: dict[str, Any], words: list[str]) -> None:
    model = model_of("LlamaForCausalLM")
    unchanged = [*model.named_modules()]
    with pytest.raises(TargetError) as caught:
        resolve(model, LoraConfig(**fields))
    for word in words:
        assert word in str(caught.value)
    assert [*model.named_modules()] == unchanged


def test_an_empty_role_is_an_error() -> None:
    with pytest.raises(TargetError, match="'mlp' is empty"):
        select(model_of("MixtralForCausalLM"), LoraConfig(target_modules="mlp"))
    with pytest.raises(TargetError, match="'all-linear' is empty"):
        select(nn.Sequential(nn.ReLU()), LoraConfig())


def test_resolving_is_pure_and_counts_exactly() -> None:
    for kind in KINDS:
        model = tiny(kind)
        config = LoraConfig(r=3, bias="all", modules_to_save=("classifier",) if "bert" in kind else None)
        unchanged, before = snapshot(model), torch.get_rng_state()
        resolution = resolve(model, config)
        assert torch.equal(torch.get_rng_state(), before)
        unchanged()
        adapters = graft(model, config)
        assert resolution.parameters == sum(p.numel() for p in adapters.parameters("default"))
        assert resolution.bytes == 4 * resolution.parameters
        assert list(resolution.paths) == list(adapters.parts("default"))
        assert resolve(model, config).paths == resolution.paths, "sites are looked through"


def test_targets_inside_a_full_copy_are_part_of_the_copy() -> None:
    adapters = graft(
        tiny("roberta"),
        LoraConfig(r=2, target_modules=("query", "dense"), modules_to_save=("classifier",)),
    )
    parts = adapters.parts("default")
    copied = [path for path, part in parts.items() if isinstance(part, FullCopy)]
    assert copied == ["classifier.dense", "classifier.out_proj"], "layer by layer, and no LoRA upon them"


def test_a_copy_and_a_lora_of_the_same_layer_are_two_adapters_like_others() -> None:
    model, inputs = tiny("roberta"), batch("roberta")
    adapters = graft(model, LoraConfig(r=2, target_modules=("classifier.dense",)), "inner")
    adapters.add("outer", LoraConfig(r=2, target_modules=("query",), modules_to_save=("classifier",)))
    stir(adapters, "inner")
    stir(adapters, "outer", seed=1)
    with adapters.activated("outer"):
        outer = logits(model, inputs)
    adapters.activate(["inner", "outer"])
    assert not torch.allclose(logits(model, inputs), outer)


class Owner(nn.Module):
    """A module with a parameter of its own around a layer: a copy of it is a copy of both."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x) * self.scale
        return out


def test_one_adapter_inside_the_full_copy_of_another_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Owner())
    adapters = graft(model, LoraConfig(r=2, target_modules=("inner",)), "inner")
    unchanged = snapshot(model)
    with pytest.raises(AdapterError, match=r"1\.inner lies inside 1"):
        adapters.add("outer", LoraConfig(r=2, target_modules=("0",), modules_to_save=("1",)))
    unchanged()


def test_a_layer_that_is_bypassed_by_its_owner_is_refused() -> None:
    """`nn.MultiheadAttention` reads the weight of its `out_proj` and never calls it."""
    model = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8))
    assert select(model, LoraConfig()) == ["1"]
    with pytest.raises(TargetError, match="out_proj"):
        select(model, LoraConfig(target_modules=("out_proj",)))
