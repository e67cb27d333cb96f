"""Attention over documents in a row: losses and gradients of the model's own, and nothing else changed."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from graftlm.core.errors import ModelError
from graftlm.data.batches import Batch, Batches
from graftlm.data.branches import Branched, branch_batch
from graftlm.data.encode import Encoded
from graftlm.data.forms import flat
from graftlm.formats.layout import FOLDER
from graftlm.kernels.attention import attention, attention_is_native
from graftlm.methods.adaption_prompt import AdaptionPromptConfig
from graftlm.methods.attach import attach
from graftlm.methods.base import MethodConfig
from graftlm.methods.lora import LoraConfig
from graftlm.methods.prefix import PrefixTuningConfig
from graftlm.methods.prompt import PromptTuningConfig
from graftlm.models.fusing import document_attention
from graftlm.models.fusing.attention import attention_layers
from graftlm.objectives.log_probs import AnswerLogProbs
from graftlm.objectives.sft import SftObjective, attention_of
from graftlm.testing.models import DECODER, VOCABULARY, batch, tiny
from graftlm.training.step import to_device

PLAIN = {key: value for key, value in DECODER.items() if key != "head_dim"}
MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", DECODER),
    "qwen2, one layer sliding": (
        "Qwen2",
        {**PLAIN, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", DECODER),
    "mistral, sliding": ("Mistral", {**DECODER, "sliding_window": 5}),
    "gemma3, sliding": ("Gemma3", {**DECODER, "query_pre_attn_scalar": 8, "sliding_window": 4}),
    "phi": ("Phi", PLAIN),
    "qwen3, experts": (
        "Qwen3Moe",
        {**DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "gpt2": ("GPT2", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}
OTHER_NAMES = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"), "GPT2": ("GPT2Config", "GPT2LMHeadModel")}
LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
METHODS: dict[str, MethodConfig] = {
    "lora": LORA,
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
    "prompt": PromptTuningConfig(num_virtual_tokens=3),
    "adaption prompt": AdaptionPromptConfig(adapter_len=3, adapter_layers=2),
}


@pytest.fixture(params=["operator", "document by document"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Through Graft's operator, whatever computes it here, and without it."""
    against = None if request.param == "operator" else "not in this test"
    monkeypatch.setattr(document_attention, "attention_is_native", lambda dtype, head_dim: against)
    yield request.param


def make(kind: str, *, dropout: float = 0.0, **changes: Any) -> Any:
    family, settings = MADE[kind]
    config_name, model_name = OTHER_NAMES.get(family, (f"{family}Config", f"{family}ForCausalLM"))
    torch.manual_seed(1)
    config = getattr(transformers, config_name)(**{**settings, **changes})
    for name in vars(config):
        if "dropout" in name or name.endswith("_pdrop"):
            setattr(config, name, dropout)
    model = getattr(transformers, model_name)(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)  # large enough for attention to matter
    return model


def rows() -> list[Encoded]:
    draw = random.Random(5)
    made = []
    for number, length in enumerate((9, 5, 14, 2, 11), start=1):
        ids = tuple(draw.randrange(3, VOCABULARY) for _ in range(length))
        made.append(Encoded(ids, (-100, *ids[1:]), number, truncated=False))
    return made


def batch_of(*, packing: bool) -> Batch:
    batches = Batches(rows(), rows_per_batch=9, max_length=24, packing=packing, seed=1, pad_token_id=0)
    assert batches.count(0) == 1
    return batches.batch(0, 0)


def step(model: Any, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    loss = SftObjective(model)(model, batch).loss_sum
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, trained))


def expect_same(model: Any, packing: bool, *, near: float = 1e-5) -> str:
    expected, gradients = step(model, batch_of(packing=False))
    found = attention_layers(model)
    with found.in_use():
        loss, others = step(model, batch_of(packing=packing))
    torch.testing.assert_close(loss, expected, rtol=near, atol=0.0)
    for mine, its in zip(others, gradients, strict=True):
        assert (mine - its).norm() <= 20 * near * its.norm()
    return found.summary


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", MADE)
def test_the_same_loss_and_gradients(kind: str, packing: bool, way: str) -> None:
    model = make(kind)
    attach(model, LORA, storage=FOLDER)
    name = "native kernel" if way == "operator" else way
    assert expect_same(model, packing) == f"2 of 2 attention layers ({name})"


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_kind_of_adapter(kind: str, method: str, packing: bool, way: str) -> None:
    model = make(kind)
    attach(model, METHODS[method], storage=FOLDER)
    assert expect_same(model, packing).startswith("2 of 2")


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_count_in_a_sliding_window(method: str, way: str) -> None:
    model = make("mistral, sliding")
    attach(model, METHODS[method], storage=FOLDER)
    expect_same(model, True)


def test_a_prompt_behind_a_prefix(way: str) -> None:
    model = make("llama")
    adapters = attach(model, METHODS["prefix"], "first", storage=FOLDER)
    adapters.add("then", METHODS["prompt"])
    adapters.activate(["first", "then"])
    adapters.train_only(["first", "then"])
    expect_same(model, True)


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
def test_layers_that_are_computed_again(method: str, way: str) -> None:
    model = make("llama")
    attach(model, METHODS[method], storage=FOLDER)
    expected, gradients = step(model, batch_of(packing=True))
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    (options,) = (name for name in inspect.signature(enable).parameters if name.endswith("_kwargs"))
    enable(**{options: {"use_reentrant": False}})
    model.train()
    with attention_layers(model).in_use():
        loss, others = step(model, batch_of(packing=True))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
    for mine, its in zip(others, gradients, strict=True):
        assert (mine - its).norm() <= 2e-4 * its.norm()


@pytest.mark.parametrize("head_dim", [16, 64])
def test_in_16_bits(head_dim: int) -> None:
    """With the fast kernel where this machine has it."""
    model = make("llama", head_dim=head_dim).to(torch.bfloat16)
    attach(model, LORA, storage=FOLDER)
    summary = expect_same(model, True, near=5e-3)
    is_native = attention_is_native(torch.bfloat16, head_dim) is None
    assert summary.endswith("(native kernel)" if is_native else "(document by document)")


def test_no_document_sees_another(way: str) -> None:
    model = make("llama")
    one = flat(batch_of(packing=True))
    starts = one.inputs["cu_seq_lens_q"].tolist()
    changed = {**one.inputs, "input_ids": one.inputs["input_ids"].clone()}
    changed["input_ids"][0, starts[1] : starts[2]] = 4
    with attention_layers(model).in_use(), torch.no_grad():
        before, after = (model(**inputs, use_cache=False).logits[0] for inputs in (one.inputs, changed))
    same = (before == after).all(-1)
    assert same[: starts[1]].all() and same[starts[2] :].all() and not same[starts[1] : starts[2]].any()


def test_attention_with_dropout_runs_and_repeats() -> None:
    model = make("gpt2", dropout=0.3)
    attach(model, LORA, storage=FOLDER)
    objective, losses = SftObjective(model), []
    with attention_layers(model).in_use():
        model.train()
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            losses.append(float(objective(model, batch_of(packing=True)).loss_sum.detach()))
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("kind", ["llama", "mistral, sliding", "gemma3, sliding", "gpt2"])
def test_every_other_call_is_as_it_was(kind: str, way: str) -> None:
    """Padded on either side, without a mask, with positions of packed documents, with a cache, generating."""
    model = make(kind)
    ids = batch("llama", rows=2, length=9)["input_ids"]
    right, left = torch.ones_like(ids), torch.ones_like(ids)
    right[1, -3:], left[1, :3] = 0, 0
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]])
    calls: list[dict[str, Any]] = [
        {"attention_mask": right},
        {"attention_mask": left},
        {},
        {"position_ids": positions.expand(2, -1), "use_cache": False},
    ]
    found: list[list[Tensor]] = []
    for context in (nullcontext(), attention_layers(model).in_use()):
        with context, torch.no_grad():
            results = [model(ids, **call).logits for call in calls]
            results[0] = results[0][right.bool()]
            results[1] = results[1][left.bool()]
            options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            results.append(model.generate(ids, attention_mask=left, **options))
            found.append(results)
    for before, inside in zip(*found, strict=True):
        torch.testing.assert_close(inside, before, rtol=1e-4, atol=1e-4)


def test_flat_batches_get_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gemma3, sliding")
    layers = attention_layers(model)
    masks = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    monkeypatch.setitem(masks._global_mapping, "sdpa", lambda *args, **kwargs: pytest.fail("a mask was made"))
    with layers.in_use():
        model(**flat(batch_of(packing=True)).inputs, use_cache=False)


def test_an_error_inside_leaves_nothing_behind() -> None:
    model = make("llama")
    layers = attention_layers(model)
    hooks = len(model.model._forward_pre_hooks)
    with pytest.raises(KeyError), layers.in_use():
        assert attention_of(model) == "graft"
        raise KeyError
    assert attention_of(model) == "sdpa"
    assert len(model.model._forward_pre_hooks) == hooks


SMALL = {**DECODER, "num_local_experts": 2, "num_experts_per_tok": 1}
LEFT_ALONE: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "caps": ("Gemma2Config", "Gemma2ForCausalLM", {**DECODER, "query_pre_attn_scalar": 8}, "softcap"),
    "sinks": ("GptOssConfig", "GptOssForCausalLM", SMALL, "s_aux"),
    "chunks": ("Llama4TextConfig", "Llama4ForCausalLM", {**SMALL, "intermediate_size_mlp": 48}, "chunked"),
    "convolutions": ("Lfm2Config", "Lfm2ForCausalLM", {**PLAIN, "full_attn_idxs": [0]}, "conv"),
    "distance instead of position": (
        "BloomConfig", "BloomForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "",
    ),
    "arguments not handed on": ("StableLmConfig", "StableLmForCausalLM", PLAIN, "0 of 2 layers ask"),
}  # fmt: skip


@pytest.mark.parametrize("what", LEFT_ALONE)
def test_attention_of_another_kind_is_left_alone(what: str) -> None:
    config_name, model_name, settings, why = LEFT_ALONE[what]
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**settings)).eval()
    own = attention_of(model)
    found = attention_layers(model)
    assert found.summary.startswith("0 of ") and why in found.summary
    with found.in_use():
        assert attention_of(model) == own


@pytest.mark.parametrize("kind", ["bert", "roberta", "t5", "bart"])
def test_models_that_do_not_continue_text_are_left_alone(kind: str) -> None:
    model = tiny(kind)
    found = attention_layers(model)
    assert found.summary.startswith("0 of ")
    expected = model(**batch(kind)).logits
    with found.in_use():
        assert torch.equal(model(**batch(kind)).logits, expected)


def test_what_is_no_model_of_transformers_is_left_alone() -> None:
    assert attention_layers(torch.nn.Linear(2, 2)).summary.startswith("0 of 0 attention layers")


def test_documents_with_a_mask_are_refused() -> None:
    model = make("llama")
    inputs = flat(batch_of(packing=True)).inputs
    mask = torch.ones(1, 1, 41, 41, dtype=torch.bool).tril()
    with attention_layers(model).in_use(), pytest.raises(ModelError, match="a mask of its own"):
        model(**inputs, attention_mask=mask, use_cache=False)


def test_the_probe_leaves_no_trace() -> None:
    model = make("gpt2", dropout=0.3).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    attention_layers(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert attention_of(model) == "sdpa" and not model.transformer._forward_pre_hooks


@pytest.mark.parametrize("window", [None, 4])
def test_windows_as_the_attention_of_torch_counts_them(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its window is of the keys before a token's own."""
    asked: list[dict[str, Any]] = []

    def varlen(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        asked.append({"starts": rest[0].tolist(), "longest": rest[2:], **options})
        before, after = options["window_size"]
        assert rest[0].dtype == rest[1].dtype == torch.int32 and after == 0
        whole = window_attention(rest[0].long(), None if before < 0 else before + 1, options["scale"])
        return whole._one_by_one(q, k, v, whole.window)

    def window_attention(starts: Tensor, size: int | None, scale: float) -> Any:
        return document_attention._Documents(starts, starts.int(), None, scale, size, 0.0)

    q, k, v = torch.randn(11, 4, 8), torch.randn(11, 2, 8), torch.randn(11, 2, 8)
    documents = window_attention(torch.tensor([0, 7, 11]), window, 0.5)
    expected, way = documents.attended(q, k, v)
    assert way == "document by document"
    monkeypatch.setattr(document_attention, "way_of", lambda x: "torch varlen")
    monkeypatch.setattr(document_attention, "_varlen", lambda: varlen)
    found, way = documents.attended(q, k, v)
    assert way == "torch varlen" and torch.equal(found, expected)
    assert asked[0]["longest"] == (7, 7) and asked[0]["enable_gqa"]
    behind_a_prefix = documents.attended(q[:11], torch.cat([k[:2], k]), torch.cat([v[:2], v]))
    assert behind_a_prefix[1] == "document by document"


def test_documents_that_continue_another_in_the_attention_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It aligns queries and keys at their ends, where there are fewer of the former."""

    def varlen(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen = []
        for (start, stop), (first, last) in zip(*(pairwise(ends.tolist()) for ends in rest[:2]), strict=True):
            one = [x.transpose(0, 1) for x in (q[start:stop], k[first:last], v[first:last])]
            mask = torch.ones(stop - start, last - first).tril(last - first - (stop - start)).bool()
            out = torch.nn.functional.scaled_dot_product_attention(
                *one, attn_mask=mask, scale=options["scale"], enable_gqa=True
            )
            seen.append(out.transpose(0, 1))
            assert rest[2] >= stop - start and rest[3] >= last - first
        return torch.cat(seen)

    q, k, v = torch.randn(14, 4, 8), torch.randn(14, 2, 8), torch.randn(14, 2, 8)
    starts, parents = torch.tensor([0, 5, 7, 11, 14]), torch.tensor([-1, 0, -1, 0])
    documents = document_attention._Documents(starts, starts.int(), parents, 0.5, None, 0.0)
    expected, way = documents.attended(q, k, v)
    assert way == "document by document"
    by_operator = attention(q, k, v, starts, scale=0.5, parents=parents)
    torch.testing.assert_close(expected, by_operator, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(document_attention, "way_of", lambda x: "torch varlen")
    monkeypatch.setattr(document_attention, "_varlen", lambda: varlen)
    found, way = documents.attended(q, k, v)
    assert way == "torch varlen"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_answers_to_one_prompt_on_cuda(kind: str) -> None:
    model = make(kind, **({"head_dim": 16} if kind != "gpt2" else {})).to("cuda", torch.bfloat16)
    attach(model, LORA, storage=FOLDER)
    row = Branched(tuple(range(3, 20)), (tuple(range(5, 14)), (7, 8), (9,)), 1, truncated=False)
    batch = to_device(branch_batch([row], 0), torch.device("cuda"))
    log_probs, layers = AnswerLogProbs(model), attention_layers(model)
    if not layers.summary.endswith("(torch varlen)"):
        pytest.skip(layers.summary)
    expected = log_probs(model, batch).log_probs
    with layers.in_use():
        found = log_probs(model, batch).log_probs
        found.sum().backward()
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "mistral, sliding", "gpt2"])
def test_on_cuda_with_the_attention_of_torch(kind: str) -> None:
    model = make(kind, **({"head_dim": 16} if kind != "gpt2" else {})).to("cuda", torch.bfloat16)
    attach(model, LORA, storage=FOLDER)
    found = attention_layers(model)
    if not found.summary.endswith("(torch varlen)"):
        pytest.skip(found.summary)
    objective = SftObjective(model)
    padded, packed = (to_device(batch_of(packing=p), torch.device("cuda")) for p in (False, True))
    expected = objective(model, padded).loss_sum
    with found.in_use():
        loss = objective(model, packed).loss_sum
        loss.backward()
    torch.testing.assert_close(loss, expected, rtol=5e-3, atol=0.0)
