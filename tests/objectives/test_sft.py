"""The chunked loss against the plain one: every path to the logits, packed and padded, both masks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core.errors import ModelError
from graftlm.data.batches import Batch, Batches
from graftlm.data.encode import Encoded
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.objectives import sft
from graftlm.objectives.sft import SftObjective
from graftlm.training.step import optimizer_step

VOCABULARY = 80
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES),
    "llama, tied": ("Llama", {**SIZES, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", GPT2 | NO_DROPOUT),
    "phi, bias in the head": ("Phi", {k: v for k, v in SIZES.items() if k != "head_dim"}),
    "gemma2, capped logits": ("Gemma2", {**SIZES, "query_pre_attn_scalar": 8, "sliding_window": 128}),
    "cohere, scaled logits": ("Cohere", {**SIZES, "logit_scale": 0.5}),
    "granite, scaled logits": ("Granite", {**SIZES, "logits_scaling": 4.0}),
}
CLASSES = {"GPT2": "GPT2LMHeadModel"}
FULL = {"gemma2, capped logits", "cohere, scaled logits", "granite, scaled logits"}
HEAD = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])


def make(kind: str, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    """A tiny model; its weights are large enough for caps and scales to matter."""
    family, sizes = MADE[kind]
    torch.manual_seed(3)
    if family == "Gemma2":
        attention = "eager"  # it has no other: it caps its attention scores too
    config = getattr(transformers, f"{family}Config")(**sizes, attn_implementation=attention)
    model = getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" in name:
                parameter.mul_(20)
    return model.to(dtype)


def documents(count: int = 9) -> list[Encoded]:
    """Unequal lengths, prompts without labels, and one row of prompt only."""
    draw = random.Random(5)
    rows = []
    for row in range(1, count + 1):
        ids = tuple(draw.randrange(1, VOCABULARY) for _ in range(draw.choice([5, 9, 17, 30])))
        prompt = draw.randrange(1, len(ids) - 1)
        rows.append(Encoded(ids, (-100,) * prompt + ids[prompt:], row, truncated=False))
    return rows


def batch_of(rows: list[Encoded], packing: bool) -> Batch:
    batches = Batches(rows, rows_per_batch=len(rows), max_length=64, packing=packing, seed=1, pad_token_id=0)
    assert batches.count(0) == 1
    return batches.batch(0, 0)


def alone(model: Any, rows: list[Encoded]) -> Tensor:
    """The sum of the losses of every document on its own, from all logits, in the model's precision."""
    total = torch.zeros((), dtype=next(model.parameters()).dtype)
    for row in rows:
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="sum")
    return total


def of_transformers(model: Any, rows: list[Encoded]) -> Tensor:
    """The same by the model's own loss function (float32 inside)."""
    losses = [
        model(
            input_ids=torch.tensor([row.input_ids]),
            labels=torch.tensor([row.labels]),
            num_items_in_batch=torch.tensor(1),
        ).loss
        for row in rows
    ]
    return torch.stack(losses).sum()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def tuned(model: Any, config: LoraConfig) -> Any:
    """The model with an adapter whose B is not zero, so that gradients reach everything."""
    adapters = attach(model, config, storage=FOLDER)
    with torch.no_grad():
        for name, parameter in adapters.named_parameters("default").items():
            if name.endswith("_B"):
                parameter.normal_(std=0.1)
    return model


def compare(model: Any, packing: bool, reference: Callable[[Any, list[Encoded]], Tensor], near: float) -> str:
    rows = documents()
    objective = SftObjective(model)
    parts = objective(model, batch_of(rows, packing))
    expected = reference(model, rows)
    assert parts.target_tokens == sum(label != -100 for row in rows for label in row.labels[1:])
    torch.testing.assert_close(parts.loss_sum, expected, rtol=near, atol=0.0, check_dtype=False)
    ours, theirs = gradients(model, parts.loss_sum), gradients(model, expected)
    assert ours.keys() == theirs.keys() != set()
    for name, gradient in theirs.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(ours[name], gradient, rtol=20 * near, atol=20 * near * scale)
    return objective.path


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", MADE)
def test_loss_and_gradients_are_those_of_transformers(kind: str, packing: bool, attention: str) -> None:
    targets = "c_attn" if kind == "gpt2" else "q_proj"
    model = tuned(make(kind, attention=attention), LoraConfig(r=4, target_modules=[targets]))
    path = compare(model, packing, of_transformers, 3e-6)
    assert path == ("full logits" if kind in FULL else "frozen head")


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(
    ("kind", "config", "path"),
    [
        ("llama", LoraConfig(r=4, target_modules=["q_proj"]), "frozen head"),
        ("llama", HEAD, "trained head"),
        ("llama", LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]), "trained head"),
        ("phi, bias in the head", LoraConfig(r=4, target_modules=["q_proj"], bias="all"), "trained head"),
        ("gemma2, capped logits", LoraConfig(r=4, target_modules=["q_proj"]), "full logits"),
    ],
    ids=["frozen", "adapted", "copied", "trained bias", "capped"],
)
def test_every_path_in_double_precision(kind: str, config: LoraConfig, path: str, packing: bool) -> None:
    model = tuned(make(kind, dtype=torch.float64), config).to(torch.float64)
    near = 1e-8 if "gemma2" in kind else 1e-12  # eager attention takes its softmax in float32
    assert compare(model, packing, alone, near) == path


@pytest.mark.parametrize("kind", ["llama", "gemma2, capped logits"])
def test_chunks_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned(make(kind), HEAD if kind == "llama" else LoraConfig(r=4, target_modules=["q_proj"]))
    whole = SftObjective(model)(model, batch_of(documents(), True)).loss_sum
    monkeypatch.setattr(sft, "rows_per_chunk", lambda vocabulary: 7)
    pieces = SftObjective(model)(model, batch_of(documents(), True)).loss_sum
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=0.0)


def test_a_cap_is_seen_where_it_hardly_bends() -> None:
    """Small logits pass a soft cap almost unchanged; trained on, they would grow into it."""
    model = make("gemma2, capped logits")
    with torch.no_grad():
        model.model.norm.weight.fill_(-0.999)  # Gemma multiplies by 1 + weight
    objective = SftObjective(model)
    assert objective.path == "full logits"
    assert "logits" in objective.why


def test_a_trained_head_without_adapter_on_it() -> None:
    model = make("phi, bias in the head").requires_grad_(False)
    model.lm_head.bias.requires_grad_(True)
    assert SftObjective(model).path == "trained head"
    assert compare(model, True, alone, 3e-6) == "trained head"


def test_the_probe_leaves_no_trace() -> None:
    model = make("gpt2").train()
    state = torch.random.get_rng_state()
    SftObjective(model)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)


def test_encoder_decoders_are_refused() -> None:
    config = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="encoder-decoder"):
        SftObjective(transformers.T5ForConditionalGeneration(config))


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_accumulation_weighs_tokens_not_batches(packing: bool) -> None:
    """Any cut of the same rows into micro-batches gives one loss and one update."""
    ends = []
    for rows_per_batch in (1, 2, 100):
        model = tuned(make("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
        batches = Batches(
            documents(), rows_per_batch=rows_per_batch, max_length=64, packing=packing, seed=1, pad_token_id=0
        )
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        stats = optimizer_step(
            model,
            SftObjective(model),
            [batches.batch(0, index) for index in range(batches.count(0))],
            parameters,
            torch.optim.SGD(parameters.values(), lr=0.1),
            max_grad_norm=None,
            stop_asked=lambda: False,
        )
        ends.append((stats.loss, {name: p.detach().clone() for name, p in parameters.items()}))
    loss, weights = ends[-1]
    model = tuned(make("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    rows = documents()
    targets = sum(label != -100 for row in rows for label in row.labels[1:])
    assert loss == pytest.approx(float(of_transformers(model, rows).detach()) / targets, rel=2e-6)
    for other, moved in ends[:-1]:
        assert other == pytest.approx(loss, rel=1e-6)
        for name, weight in weights.items():
            torch.testing.assert_close(moved[name], weight, rtol=1e-4, atol=1e-6)
