from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from graftlm.core.errors import ModelError
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.models.generate import (
    Sampling,
    context_length,
    decode,
    evaluation_mode,
    generate_ids,
    generate_text,
    stop_token_ids,
)

CONTEXT = 32
PROMPTS = [[5], [0, 7, 9, 3], [0, 4, 4, 8, 8, 8, 11, 2, 13], [6, 5], [0, 3, 19, 18, 17, 4]]


def tiny(kind: str) -> Any:
    """Weights large enough that the likeliest token is never nearly tied."""
    torch.manual_seed(1)
    if kind == "gpt2":
        sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT}
        return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1, initializer_range=0.5))
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


def one_by_one(model: Any, prompts: list[list[int]], new_tokens: int, end: int | None = None) -> list[Any]:
    """What `transformers` writes for each prompt alone."""
    model.eval()
    found = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=39,
        )
        found.append(tuple(token for token in output[0, len(prompt) :].tolist() if token != end))
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("rows_per_batch", [1, 2, 16])
def test_batches_do_not_change_greedy_output(kind: str, rows_per_batch: int) -> None:
    model = tiny(kind)
    found = generate_ids(model, PROMPTS, max_new_tokens=12, stop_ids=[], rows_per_batch=rows_per_batch)
    assert [result.token_ids for result in found] == one_by_one(model, PROMPTS, 12)
    assert {result.finish for result in found} == {"length"}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_end_token_ends_its_row_only(kind: str) -> None:
    model = tiny(kind)
    free = one_by_one(model, PROMPTS, 12)
    end = free[2][3]
    found = generate_ids(model, PROMPTS, max_new_tokens=12, stop_ids=[end])
    assert [result.token_ids for result in found] == one_by_one(model, PROMPTS, 12, end)
    for result, whole in zip(found, free, strict=True):
        assert result.finish == ("end" if end in whole else "length")
        assert result.end_id == (end if end in whole else None)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapters_take_part(kind: str) -> None:
    model = tiny(kind)
    base = generate_ids(model, PROMPTS, max_new_tokens=10, stop_ids=[])
    adapters = attach(model, LoraConfig(r=4, target_modules="all-linear"), storage=FOLDER)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapters.parameters("default"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    adapted = generate_ids(model, PROMPTS, max_new_tokens=10, stop_ids=[])
    assert adapted != base
    assert [result.token_ids for result in adapted] == one_by_one(model, PROMPTS, 10)
    with adapters.disabled():
        assert generate_ids(model, PROMPTS, max_new_tokens=10, stop_ids=[]) == base


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_context_limit_is_kept(kind: str) -> None:
    model = tiny(kind)
    prompts = [[5] * (CONTEXT - 2), [6] * 4, [7] * (CONTEXT - 9)]
    longest: list[int] = []
    model.register_forward_pre_hook(
        lambda _m, _a, inputs: longest.append(int(inputs["position_ids"].max()) + 1), with_kwargs=True
    )
    found = generate_ids(model, prompts, max_new_tokens=8, stop_ids=[])
    assert [(len(result.token_ids), result.finish) for result in found] == [
        (2, "context"),
        (8, "length"),
        (8, "length"),
    ]
    assert max(longest) <= CONTEXT
    assert [result.token_ids for result in found[1:]] == one_by_one(model, prompts[1:], 8)


def test_recommended_settings_of_the_model_are_put_aside() -> None:
    model = tiny("llama")
    plain = generate_ids(model, PROMPTS, max_new_tokens=8, stop_ids=[])
    model.generation_config.update(do_sample=True, temperature=0.6, repetition_penalty=5.0, eos_token_id=7)
    kept = model.generation_config
    assert generate_ids(model, PROMPTS, max_new_tokens=8, stop_ids=[]) == plain
    assert model.generation_config is kept
    assert kept.repetition_penalty == 5.0


def test_sampling_is_seeded_and_leaves_the_global_state_alone() -> None:
    model = tiny("llama")
    before = torch.get_rng_state()
    first = generate_ids(model, PROMPTS, max_new_tokens=8, stop_ids=[], sampling=Sampling(seed=4))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == generate_ids(model, PROMPTS, max_new_tokens=8, stop_ids=[], sampling=Sampling(seed=4))
    assert first != generate_ids(model, PROMPTS, max_new_tokens=8, stop_ids=[], sampling=Sampling(seed=5))


def test_samples_follow_the_models_distribution() -> None:
    model = tiny("llama")
    drawn = generate_ids(
        model, [[0]] * 4000, max_new_tokens=1, stop_ids=[], sampling=Sampling(), rows_per_batch=4000
    )
    counts = torch.bincount(torch.tensor([result.token_ids[0] for result in drawn]), minlength=40)
    with torch.no_grad():
        expected = model(torch.tensor([[0]])).logits[0, -1].softmax(-1)
    error = (expected * (1 - expected) / 4000).sqrt()
    assert ((counts / 4000 - expected).abs() <= 4.5 * error + 1e-3).all()


def test_training_flags_come_back_and_dropout_is_off() -> None:
    model = tiny("gpt2").train()
    model.transformer.h[1].eval()
    flags = [module.training for module in model.modules()]
    first = generate_ids(model, PROMPTS, max_new_tokens=6, stop_ids=[])
    assert first == generate_ids(model, PROMPTS, max_new_tokens=6, stop_ids=[])
    assert [module.training for module in model.modules()] == flags


def test_evaluation_mode_comes_back_after_an_error() -> None:
    model = tiny("gpt2").train()
    with pytest.raises(RuntimeError, match="inside"), evaluation_mode(model):
        assert not model.training
        raise RuntimeError("inside")
    assert model.training
    assert torch.is_grad_enabled()


def test_progress_and_stop_flag() -> None:
    seen: list[tuple[int, int]] = []
    generate_ids(
        tiny("llama"),
        PROMPTS,
        max_new_tokens=2,
        stop_ids=[],
        rows_per_batch=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]
    flags = iter([False, True])
    found = generate_ids(
        tiny("llama"),
        PROMPTS,
        max_new_tokens=2,
        stop_ids=[],
        rows_per_batch=2,
        should_stop=lambda: next(flags),
    )
    # The two shortest prompts had their turn.
    assert [result.finish for result in found] == ["length", "cancelled", "cancelled", "length", "cancelled"]


def test_refusals_name_the_prompt() -> None:
    model = tiny("gpt2")
    with pytest.raises(ModelError, match="Prompt 1 is empty"):
        generate_ids(model, [[3], []], max_new_tokens=2, stop_ids=[])
    with pytest.raises(ModelError, match="Prompt 0 has 32 tokens; the model's context is 32"):
        generate_ids(model, [[3] * 32], max_new_tokens=2, stop_ids=[])
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "vocab_size": 20}
    bart = BartForConditionalGeneration(
        BartConfig(**sizes, encoder_attention_heads=1, decoder_attention_heads=1, decoder_ffn_dim=8)
    )
    with pytest.raises(ModelError, match="encoder-decoder"):
        generate_ids(bart, [[3]], max_new_tokens=2, stop_ids=[])


def test_nothing_to_do_is_no_error() -> None:
    assert generate_ids(tiny("llama"), [], max_new_tokens=2, stop_ids=[]) == []


@pytest.mark.parametrize("name", ["stories260K", "gpt2-tiny-en"])
def test_real_models_write_the_same_text_in_batches(shared: Path, name: str) -> None:
    folder = shared / "models" / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["Once upon a time", "The dog", "She went to the market because she wanted a red", "One day"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    assert stop_token_ids(model, tokenizer) == (tokenizer.eos_token_id,)
    assert context_length(model) == tokenizer.model_max_length
    found = generate_text(model, tokenizer, prompts, max_new_tokens=24)
    end = tokenizer.eos_token_id
    assert found == [decode(tokenizer, ids) for ids in one_by_one(model, prompts, 24, end)]
    if name == "stories260K":
        assert found[0].startswith(", there was a little girl named Lily. She loved to play")


def test_end_tokens_of_chat_templates_are_found() -> None:
    class Chat:
        eos_token_id = 1

        def get_added_vocab(self) -> dict[str, int]:
            return {"<|im_end|>": 33, "<|im_start|>": 32}

    model = tiny("llama")
    model.generation_config.eos_token_id = [1, 6]
    assert stop_token_ids(model, Chat()) == (1, 6, 33)


def test_a_frozen_head_copies_no_weight_for_each_row() -> None:
    """A slice of three dimensions would be multiplied by a batched product, with a weight for every row."""
    model = tiny("llama").requires_grad_(False)
    head, states = model.get_output_embeddings(), torch.randn(4, 9, model.config.hidden_size)
    slices = (states[:, -1:], states[:1, -1:], states.flatten(0, 1)[None, :20], states, states[0])
    plain = [head(each) for each in slices]
    with Named() as ops, evaluation_mode(model):
        found = [head(each) for each in slices]
    assert "aten.bmm.default" not in ops.names
    for one, other in zip(plain, found, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other)
    with Named() as ops, torch.no_grad():
        head(states[:, -1:])
    assert "aten.bmm.default" in ops.names, "outside all is as before: if torch mended it, the hook can go"


class Named(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))
