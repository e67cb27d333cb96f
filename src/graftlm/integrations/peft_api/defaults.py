"""Which modules PEFT adapts where a config names none."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from graftlm.core.errors import TargetError
from graftlm.methods.families import roles_of
from graftlm.methods.site import base_modules

QUERY_AND_VALUE: tuple[tuple[str, ...], ...] = (
    *(("q_proj", "v_proj"), ("query", "value"), ("q", "v"), ("query_proj", "value_proj")),
    *(("c_attn",), ("query_key_value",), ("Wqkv",), ("qkv_proj",), ("in_proj",)),
)
"""What the projections of queries and values are called; where one layer computes both, its name."""

LORA_EXCEPTIONS: Mapping[str, tuple[str, ...] | str] = {
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "rwkv": ("key", "value", "receptance", "output"),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
}
"""Model types for which PEFT's choice for LoRA is something else."""

IA3: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(("llama", "mistral"), (("k_proj", "v_proj"), ("down_proj",))),
    **dict.fromkeys(
        ("llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), (("q_proj", "v_proj"), ("down_proj",))
    ),
    "mixtral": (("k_proj", "v_proj"), ("w2",)),
    "t5": (("k", "v"), ("wo",)),
    "mt5": (("k", "v", "wi_1"), ()),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), (("c_attn",), ("mlp.c_proj",))),
    **dict.fromkeys(("bert", "roberta"), (("key", "value"), ("output.dense",))),
    "bart": (("q_proj", "v_proj"), ("fc2",)),
    "opt": (("q_proj", "k_proj"), ("fc2",)),
    "phi": (("q_proj", "v_proj"), ("fc2",)),
    "gptj": (("q_proj", "v_proj"), ("fc_out",)),
    "gpt_neo": (("q_proj", "v_proj"), ("c_proj",)),
    **dict.fromkeys(("gpt_neox", "falcon"), (("query_key_value",), ("dense_4h_to_h",))),
    "bloom": (("query_key_value",), ("mlp.dense_4h_to_h",)),
    "deberta-v2": (("key_proj", "value_proj"), ("output.dense",)),
    "deberta": (("in_proj",), ("output.dense",)),
}
"""PEFT's choice for IA3 by model type: (layers whose output is scaled, layers whose input is scaled).

It follows no rule (queries here, keys there), so it is written down."""


def lora_targets(model: nn.Module) -> tuple[str, ...] | str:
    """The names of the query and value projections, as PEFT chooses them for LoRA.

    >>> layer = nn.ModuleDict({"attn": nn.ModuleDict({"query": nn.Linear(2, 2), "value": nn.Linear(2, 2)})})
    >>> lora_targets(nn.ModuleList([layer]))
    ('query', 'value')

    Raises:
        TargetError: the model names them in none of the known ways.
    """
    exception = LORA_EXCEPTIONS.get(model_type(model))
    if isinstance(exception, str):
        return exception
    if exception is not None:
        everywhere = {path.rpartition(".")[2] for path in base_modules(model)}
        return tuple(name for name in exception if name in everywhere)
    leaves = {path.rpartition(".")[2] for path in roles_of(model)["attention"]}
    for names in QUERY_AND_VALUE:
        if leaves.issuperset(names):
            return names
    raise TargetError(
        "The config names no target_modules, and this model's query and value projections are not known.",
        meaning=f"Its attention layers are called: {', '.join(sorted(leaves)) or 'nothing known'}.",
        fix="Name them: target_modules=[...], or target_modules='all-linear'.",
    )


def ia3_targets(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """(target_modules, feedforward_modules) as PEFT chooses them for IA3; None where it lists none."""
    listed = IA3.get(model_type(model))
    if listed is None:
        return None
    outputs, inputs = listed
    return (*outputs, *inputs), inputs


def model_type(model: nn.Module) -> str:
    """The name of the architecture in the model's config."""
    return str(getattr(getattr(model, "config", None), "model_type", ""))
