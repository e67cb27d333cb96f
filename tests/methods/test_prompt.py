"""Prompt tuning against its definition: the base, in float64, on the prompt followed by the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from graftlm.core.errors import ConfigError, GraftError, TargetError
from graftlm.data.batches import Batch
from graftlm.methods.lora import LoraConfig
from graftlm.methods.prompt import PromptTuningConfig
from graftlm.models.load import load_model
from graftlm.models.sprout import sprout_folder
from graftlm.objectives.sft import SftObjective

from .tiny import batch, graft, logits, stir, tiny

CONFIG = PromptTuningConfig(num_virtual_tokens=5)
DECODERS = ("llama", "gpt2", "gemma3")


def with_prompt(kind: str, **changes: Any) -> tuple[Any, Tensor]:
    """A model in float64 with a prompt, and the prompt."""
    model = tiny(kind, **changes).double()
    adapters = graft(model, CONFIG, dtype="base")
    stir(adapters)
    return model, next(adapters.parameters("default")).detach()[:5]


def defined(kind: str, prompt: Tensor, ids: Tensor) -> Tensor:
    """Logits of the real tokens, and before them those of the last virtual one. One row, no padding."""
    base = tiny(kind).double()
    real = base.get_input_embeddings()(ids.unsqueeze(0))
    found: Tensor = base(inputs_embeds=torch.cat((prompt.unsqueeze(0), real), 1), use_cache=False).logits
    return found[0, len(prompt) - 1 :]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", DECODERS)
@torch.no_grad()
def test_padding_on_either_side_does_not_count(kind: str, side: str) -> None:
    model, prompt = with_prompt(kind)
    inputs = batch(kind)
    for row, missing in enumerate((3, 0, 1)):
        inputs["attention_mask"][row, slice(missing) if side == "left" else slice(7 - missing, None)] = 0
    found = logits(model, inputs)
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        expected = defined(kind, prompt, inputs["input_ids"][row][mask])[1:]
        torch.testing.assert_close(found[row][mask], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", DECODERS)
def test_the_last_virtual_token_predicts_the_first_real_one(kind: str) -> None:
    model, prompt = with_prompt(kind)
    inputs = batch(kind)
    losses = [
        F.cross_entropy(defined(kind, prompt, ids)[:-1], ids, reduction="none") for ids in inputs["input_ids"]
    ]
    output = model(**inputs)
    torch.testing.assert_close(output.loss, torch.cat(losses).mean().float(), rtol=0, atol=1e-6)
    assert output.logits.shape[1] == inputs["input_ids"].shape[1]
    without_first = inputs["labels"].clone()
    without_first[:, 0] = -100
    loss = model(**{**inputs, "labels": without_first}).loss
    torch.testing.assert_close(loss, torch.stack(losses)[:, 1:].mean().float(), rtol=0, atol=1e-6)


def test_in_a_routed_batch_only_rows_with_a_prompt_predict_their_first_token() -> None:
    model, _ = with_prompt("llama")
    adapters, inputs = model.graft_adapters, batch("llama", rows=2)
    with adapters.routed(["default", None]):
        together = model(**inputs).loss
    own = {key: value[:1] for key, value in inputs.items()}
    with adapters.disabled():
        base = model(**{key: value[1:] for key, value in inputs.items()}).loss
    torch.testing.assert_close(together, (7 * model(**own).loss + 6 * base) / 13)


def test_the_objective_of_training_sees_real_tokens_only() -> None:
    model, prompt = with_prompt("llama")
    inputs = batch("llama", rows=2)
    labels = inputs.pop("labels")
    labels[:, 0] = -100
    parts = SftObjective(model)(model, Batch(inputs, labels, 12, 14, (0, 1)))
    expected = sum(
        F.cross_entropy(defined("llama", prompt, ids)[1:-1], ids[1:], reduction="sum")
        for ids in inputs["input_ids"]
    )
    torch.testing.assert_close(parts.loss_sum, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["t5", "bart"])
@torch.no_grad()
def test_an_encoder_decoder_reads_the_prompt_before_the_source(kind: str) -> None:
    model, prompt = with_prompt(kind)
    inputs = batch(kind)
    inputs["attention_mask"][1, 4:] = 0
    base = tiny(kind).double()
    real = base.get_encoder().get_input_embeddings()(inputs["input_ids"])
    embeddings = torch.cat((prompt.expand(3, -1, -1), real), 1)
    mask = F.pad(inputs["attention_mask"], (5, 0), value=1)
    expected = base(inputs_embeds=embeddings, attention_mask=mask, labels=inputs["labels"])
    found = model(**inputs)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=1e-9)


def test_a_prompt_begins_with_tokens_of_the_vocabulary() -> None:
    model = tiny("llama")
    prompt = next(graft(model, CONFIG).parameters("default"))
    table = model.get_input_embeddings().weight
    assert all((table == vector).all(dim=1).any() for vector in prompt)


def test_random_vectors_are_those_that_an_embedding_begins_with() -> None:
    torch.manual_seed(3)
    expected = torch.nn.Embedding(5, 32).weight
    model = tiny("llama")
    torch.manual_seed(3)
    adapters = graft(model, CONFIG.replace(prompt_tuning_init="RANDOM"))
    assert torch.equal(next(adapters.parameters("default")), expected)


@pytest.mark.parametrize("tokens", [3, 30])
def test_a_text_is_cut_or_repeated(tokens: int) -> None:
    model, tokenizer = load_model("sprout", dtype="float32")
    ids = tokenizer("Answer in one word: ")["input_ids"]
    adapters = graft(
        model,
        PromptTuningConfig(
            num_virtual_tokens=tokens,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="Answer in one word: ",
            tokenizer_name_or_path=str(sprout_folder()),
            tokenizer_kwargs={"trust_remote_code": True},
        ),
    )
    expected = model.get_input_embeddings().weight[torch.tensor((ids * tokens)[:tokens])]
    torch.testing.assert_close(next(adapters.parameters("default")), expected)


def test_what_cannot_begin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs prompt_tuning_init_text"):
        PromptTuningConfig(prompt_tuning_init="TEXT")
    with pytest.raises(ConfigError, match="TEXT only"):
        PromptTuningConfig(tokenizer_kwargs={"use_fast": True})
    text = PromptTuningConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text="Hello")
    model = tiny("llama")
    with pytest.raises(GraftError, match="no tokenizer"):
        graft(model, text)
    with pytest.raises(GraftError, match="No tokenizer can be loaded"):
        graft(model, text.replace(tokenizer_name_or_path=str(tmp_path)))
    assert not hasattr(model, "graft_adapters")


SMALL = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
OTHERS: dict[str, dict[str, Any]] = {
    "DeepseekV3": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
    | {"moe_intermediate_size": 16, "first_k_dense_replace": 1},
    "Qwen3Next": {"layer_types": ["linear_attention", "full_attention"], "num_experts": 0, "head_dim": 8}
    | {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
}


@pytest.mark.parametrize("name", OTHERS)
def test_it_generates_on_caches_of_other_kinds(name: str) -> None:
    """Keys and values of unlike shape, and layers that keep a state instead of them."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **HEADS, **OTHERS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    stir(graft(model, CONFIG))
    ids = batch("llama")["input_ids"]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, use_cache=False))


def test_a_model_without_a_cache_of_keys_is_refused() -> None:
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**SMALL, state_size=4))
    with pytest.raises(TargetError, match="keeps a state"):
        graft(model, CONFIG)


def test_an_adapted_embedding_does_not_colour_the_prompt() -> None:
    model = tiny("llama")
    table = model.get_input_embeddings().weight.detach().clone()
    adapters = graft(model, LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False), "lora")
    adapters.add("prompt", CONFIG)
    prompt = next(adapters.parameters("prompt"))
    assert all((table == vector).all(dim=1).any() for vector in prompt)
