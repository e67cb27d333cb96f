"""The gate: caches, positions, masks, several adapters at once and one per row, for all virtual tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from graftlm.core.errors import AdapterError, ModelError
from graftlm.methods.base import MethodConfig
from graftlm.methods.lora import LoraConfig
from graftlm.methods.prefix import PrefixTuningConfig
from graftlm.methods.prompt import PromptTuningConfig

from ..tiny import ENCODER_DECODERS, batch, graft, logits, snapshot, stir, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")

DECODERS = ("llama", "gpt2", "gemma3")
ENCODERS = ("bert", "roberta")
KINDS = (*DECODERS, *ENCODERS, *ENCODER_DECODERS)
PREFIX = PrefixTuningConfig(num_virtual_tokens=4)
PROMPT = PromptTuningConfig(num_virtual_tokens=5)
METHODS = {"prefix": PREFIX, "prompt": PROMPT}
FIRST = torch.tensor([[7, 12, 30, 9, 41]])
SECOND = torch.tensor([[22, 5, 17, 33]])


def adapted(kind: str, *configs: MethodConfig, **changes: Any) -> Any:
    """A model with these adapters active, named a, b, ..., each visibly changing the output."""
    model = tiny(kind, **changes)
    for number, (name, config) in enumerate(zip("abc", configs, strict=False)):
        adapters = graft(model, config, name)
        stir(adapters, name, seed=number + 1)
    adapters.activate(list("abc"[: len(configs)]))
    return model


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=3e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_behind(kind: str, method: str) -> None:
    model = tiny(kind)
    base, unchanged = logits(model, batch(kind)), snapshot(model)
    adapters = graft(model, METHODS[method])
    stir(adapters)
    assert not torch.allclose(logits(model, batch(kind)), base, atol=1e-4)
    with adapters.disabled():
        assert torch.equal(logits(model, batch(kind)), base)
    with adapters.activated([]):
        assert torch.equal(logits(model, batch(kind)), base)
    adapters.detach()
    unchanged()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(logits(model, batch(kind)), base)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_a_copy_of_the_model_has_its_own_adapter(kind: str, method: str) -> None:
    model = adapted(kind, METHODS[method])
    expected = logits(model, batch(kind))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.graft_adapters.parameters("a"):
            parameter.add_(1)
    assert torch.equal(logits(other, batch(kind)), expected)
    assert not torch.equal(logits(model, batch(kind)), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_gives_the_same_gradients(kind: str, method: str) -> None:
    gradients = []
    for is_on in (False, True):
        model = adapted(kind, METHODS[method]).train()
        model.graft_adapters.train_only("a")
        if is_on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch(kind)).loss.backward()
        gradients.append([parameter.grad for parameter in model.graft_adapters.parameters("a")])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-7)
        assert plain.abs().max() > 0


def test_re_entrant_checkpoints_are_refused_and_leave_nothing() -> None:
    model = adapted("llama", PREFIX).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ModelError, match="checkpointing"):
        model(**batch("llama"))
    model.gradient_checkpointing_disable()
    model.eval()
    with model.graft_adapters.disabled():
        assert torch.equal(logits(model, batch("llama")), logits(tiny("llama"), batch("llama")))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_it_compiles_as_one_graph(kind: str, method: str) -> None:
    torch._dynamo.reset()
    model = adapted(kind, METHODS[method])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(logits(compiled, batch(kind)), logits(model, batch(kind)))


@pytest.mark.parametrize("method", METHODS)
def test_a_half_precision_base_keeps_its_dtype(method: str) -> None:
    model = tiny("llama").to(torch.bfloat16)
    adapters = graft(model, METHODS[method])
    assert {parameter.dtype for parameter in adapters.parameters("default")} == {torch.float32}
    assert logits(model, batch("llama")).dtype == torch.bfloat16


COMBINATIONS: dict[str, tuple[MethodConfig, ...]] = {
    "prefix": (PREFIX,),
    "prompt": (PROMPT,),
    "both": (PREFIX, PROMPT),
    "two prompts": (PROMPT, PromptTuningConfig(num_virtual_tokens=2)),
}


@pytest.mark.parametrize("names", COMBINATIONS)
@pytest.mark.parametrize("kind", DECODERS)
@torch.no_grad()
def test_a_conversation_goes_on_in_its_cache(kind: str, names: str) -> None:
    model = adapted(kind, *COMBINATIONS[names])
    whole = model(torch.cat([FIRST, SECOND], 1)).logits
    cache = DynamicCache(config=model.config)
    output = model(FIRST, past_key_values=cache)
    close(output.logits, whole[:, :5])
    assert output.past_key_values is cache and cache.get_seq_length() == 5
    again = copy.deepcopy(cache)
    close(model(SECOND, past_key_values=cache).logits, whole[:, 5:])
    close(model(input_ids=SECOND, past_key_values=again).logits, whole[:, 5:])


@torch.no_grad()
def test_a_cache_is_not_shared_by_different_prompts() -> None:
    model = adapted("llama", PROMPT, PROMPT)
    cache = DynamicCache(config=model.config)
    with model.graft_adapters.activated("a"):
        model(FIRST, past_key_values=cache)
    with model.graft_adapters.activated("b"), pytest.raises(AdapterError, match="not begun with"):
        model(SECOND, past_key_values=cache)


@pytest.mark.parametrize("names", COMBINATIONS)
@torch.no_grad()
def test_a_sliding_window_sees_the_same_with_and_without_cache(names: str) -> None:
    layers = ["sliding_attention", "full_attention"]
    model = adapted("gemma3", *COMBINATIONS[names], sliding_window=6, layer_types=layers)
    ids = torch.cat([FIRST, SECOND, FIRST], 1)
    cache = DynamicCache(config=model.config)
    steps = [model(part, past_key_values=cache).logits for part in (ids[:, :3], *ids[:, 3:].split(1, dim=1))]
    close(torch.cat(steps, 1), model(ids, use_cache=False).logits)


@pytest.mark.parametrize("names", COMBINATIONS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_documents_in_one_window_are_each_alone(kind: str, attention: str, names: str) -> None:
    model = adapted(kind, *COMBINATIONS[names])
    model.set_attn_implementation(attention)
    document = torch.tensor([0] * 5 + [1] * 4)
    mask: Tensor = (document[:, None] == document).tril()[None, None]
    if attention == "eager":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    inputs = {"input_ids": torch.cat([FIRST, SECOND], 1), "position_ids": positions, "use_cache": False}
    for given in (inputs | {"attention_mask": mask}, inputs):  # a model can also tell them by position
        packed = model(**given).logits
        close(packed[:, :5], model(FIRST).logits)
        close(packed[:, 5:], model(SECOND).logits)


@pytest.mark.parametrize("pair", ["prefixes", "prompts", "prefix and prompt"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_rows_of_packed_documents_are_routed(attention: str, pair: str) -> None:
    model = adapted("gpt2", *PAIRS[pair])
    model.set_attn_implementation(attention)
    document = torch.tensor([0] * 5 + [1] * 4)
    mask: Tensor = (document[:, None] == document).tril()[None, None].expand(3, -1, -1, -1)
    if attention == "eager":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    ids, positions = torch.cat([FIRST, SECOND], 1), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    inputs = {"input_ids": ids.expand(3, -1), "position_ids": positions.expand(3, -1), "use_cache": False}
    for given in (inputs | {"attention_mask": mask}, inputs):
        with model.graft_adapters.routed(["a", None, "b"]):
            packed = model(**given).logits
        for row, name in enumerate(("a", None, "b")):
            with model.graft_adapters.activated([name] if name else []):
                close(packed[row, :5], model(FIRST).logits[0])
                close(packed[row, 5:], model(SECOND).logits[0])


def test_masks_that_leave_something_open_are_refused() -> None:
    model = adapted("llama", PREFIX)
    with pytest.raises(ModelError, match="type dict"):
        model(FIRST, attention_mask={"full_attention": None})
    with pytest.raises(ModelError, match="neither boolean nor additive"):
        model(FIRST, attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.long))
    encoder = adapted("bert", PROMPT)
    with pytest.raises(ModelError, match="bidirectional"):
        encoder(FIRST, attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))


PAIRS: dict[str, tuple[MethodConfig, MethodConfig]] = {
    "prefixes": (PREFIX, PrefixTuningConfig(num_virtual_tokens=2)),
    "prompts": (PROMPT, PromptTuningConfig(num_virtual_tokens=2)),
    "prefix and prompt": (PREFIX, PROMPT),
    "lora and prompt": (LoraConfig(r=4, init_lora_weights=False), PROMPT),
}
ROWS = ("b", None, "a", "b")


def padded(kind: str) -> dict[str, Tensor]:
    """Four rows; decoders are padded on the left, as for `generate`."""
    inputs = batch(kind, rows=len(ROWS))
    inputs["attention_mask"][0, slice(0, 3) if kind in DECODERS else slice(-3, None)] = 0
    return inputs


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_row_of_a_routed_batch_is_as_if_alone(kind: str, pair: str) -> None:
    model = adapted(kind, *PAIRS[pair])
    adapters, inputs = model.graft_adapters, padded(kind)
    with adapters.routed(ROWS):
        together = model(**inputs).logits
    for row, name in enumerate(ROWS):
        with adapters.activated([name] if name else []):
            alone = model(**{key: value[row : row + 1] for key, value in inputs.items()}).logits[0]
        real = inputs["attention_mask"][row].bool() if kind in DECODERS else slice(None)
        close(together[row][real], alone[real])


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_a_routed_batch_trains_every_row_as_if_alone(kind: str, pair: str) -> None:
    model = adapted(kind, *PAIRS[pair])
    adapters, inputs = model.graft_adapters, padded(kind)
    adapters.train_only(["a", "b"])
    parameters = [*adapters.parameters("a"), *adapters.parameters("b")]
    weights = torch.randn(model(**inputs).logits.shape)
    if kind in DECODERS:
        weights = weights * inputs["attention_mask"].unsqueeze(-1)
    inputs = {key: value for key, value in inputs.items() if key != "labels"} | (
        {"decoder_input_ids": inputs["labels"]} if kind in ENCODER_DECODERS else {}
    )
    with adapters.routed(ROWS):
        (model(**inputs).logits * weights).sum().backward()
    together = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    for row, name in enumerate(ROWS):
        if name is not None:
            with adapters.activated(name):
                alone = model(**{key: value[row : row + 1] for key, value in inputs.items()}).logits
                (alone * weights[row]).sum().backward()
    for parameter, gradient in zip(parameters, together, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart"])
def test_routed_rows_generate_as_if_alone(kind: str, pair: str, beams: int) -> None:
    model = adapted(kind, *PAIRS[pair])
    adapters, inputs = model.graft_adapters, padded(kind)
    del inputs["labels"]
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    with adapters.routed(ROWS):
        together = model.generate(**inputs, **options)
    for row, name in enumerate(ROWS):
        with adapters.activated([name] if name else []):
            one = {key: value[row : row + 1] for key, value in inputs.items()}
            alone = model.generate(**one, **options)[0]
        assert torch.equal(together[row][: len(alone)], alone)


@pytest.mark.parametrize("method", METHODS)
def test_generating_with_a_cache_is_generating_without(method: str) -> None:
    model = adapted("llama", METHODS[method])
    inputs = {key: value for key, value in padded("llama").items() if key != "labels"}
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert torch.equal(model.generate(**inputs, **options, prefill_chunk_size=2), expected)
    assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), expected)


def test_a_batch_of_another_size_than_was_routed_is_refused() -> None:
    model = adapted("llama", PREFIX)
    with model.graft_adapters.routed(["a", None]), pytest.raises(AdapterError, match="routed"):
        model.base_model(**{key: batch("llama")[key] for key in ("input_ids", "attention_mask")})
