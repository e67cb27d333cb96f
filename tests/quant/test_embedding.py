"""Embeddings and output heads in 8 bits: the same model within rounding, the table stored once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from graftlm.core.errors import ModelError
from graftlm.quant.embedding import QuantisedEmbedding, TiedHead, packed_head, quantise_embeddings
from graftlm.quant.linear import QuantisedLinear
from graftlm.quant.packed import encode
from graftlm.quant.scheme import Scheme
from graftlm.testing.models import batch, tiny

UNTIED, TIED = ("llama", "llama-nf4"), ("llama-tied", "gpt2")


def table_of(kind: str, dtype: torch.dtype = torch.float32) -> QuantisedEmbedding:
    random = torch.Generator().manual_seed(0)
    return QuantisedEmbedding(encode(torch.randn(50, 24, generator=random), Scheme(kind)), dtype)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (3, 7), (0,)], ids=str)
def test_a_look_up_gives_the_decoded_rows(kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    table = table_of(kind, dtype)
    ids = torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(1))
    out = table(ids)
    assert out.dtype == dtype and out.shape == (*shape, 24)
    assert torch.equal(out, table.weight[ids])


def test_a_dense_table_that_stands_in_is_looked_up() -> None:
    table = table_of("int8")
    table.dense = nn.Parameter(torch.randn(50, 24), requires_grad=False)
    head = TiedHead(table, None)
    assert torch.equal(table(torch.tensor([3, 4])), table.dense[[3, 4]])
    x = torch.randn(2, 24)
    assert torch.equal(head(x), x @ table.dense.t())


@pytest.mark.parametrize("kind", [*UNTIED, *TIED])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_a_model_keeps_its_loss(kind: str, scheme: str) -> None:
    model, inputs = tiny(kind), batch(kind)
    before = model(**inputs).loss
    head_path = next(path for path, m in model.named_modules() if m is model.get_output_embeddings())
    paths = quantise_embeddings(model, scheme)
    assert len(paths) == 2 and paths[1] == head_path
    assert isinstance(model.get_input_embeddings(), QuantisedEmbedding)
    head = model.get_output_embeddings()
    assert isinstance(head, TiedHead if kind in TIED else QuantisedLinear)
    held = packed_head(head)
    assert held is not None and held.tensors.keys() == {"codes", "scales"}
    assert (model(**inputs).loss - before).abs() < 0.01
    assert head.weight.shape == (head.out_features, head.in_features)


@pytest.mark.parametrize("change", ["deepcopy", "to", "meta"])
def test_a_tied_head_stays_tied(change: str) -> None:
    model = tiny("llama-tied")
    quantise_embeddings(model)
    tables = [tensor for name, tensor in model.state_dict().items() if name.endswith("embed_tokens.weight")]
    assert len(tables) == 1 and not any("lm_head" in name for name in model.state_dict())
    changed = {
        "deepcopy": copy.deepcopy,
        "to": lambda m: m.to(torch.bfloat16),
        "meta": lambda m: m.to("meta"),
    }[change](model)
    table, head = changed.get_input_embeddings(), changed.get_output_embeddings()
    assert head.embedding is table and (change != "deepcopy" or table is not model.get_input_embeddings())
    if change != "meta":
        inputs = batch("llama-tied")
        assert torch.isfinite(changed(**inputs).loss)
        assert (
            head.weight.dtype == table.weight.dtype == (torch.bfloat16 if change == "to" else torch.float32)
        )


@pytest.mark.parametrize("kind", [*UNTIED, *TIED])
def test_a_state_dict_goes_through(kind: str) -> None:
    model, other = tiny(kind), tiny(kind, seed=1)
    for one in (model, other):
        quantise_embeddings(one)
    result = other.load_state_dict(model.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    inputs = batch(kind)
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("kind", ["gemma3", "t5", "bart"])
def test_tables_that_do_more_or_belong_to_several_stay(kind: str) -> None:
    model = tiny(kind)
    before = model(**batch(kind)).loss
    assert quantise_embeddings(model) == []
    assert torch.equal(model(**batch(kind)).loss, before)


def test_blocks_and_bad_values_are_refused() -> None:
    model = tiny("llama")
    for kind in ("nf4", "fp8_block"):
        with pytest.raises(ModelError, match=f"cannot be stored as {kind}"):
            quantise_embeddings(model, kind)
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 4] = torch.nan
    with pytest.raises(ModelError, match=r"model\.embed_tokens\.weight holds 1 values"):
        quantise_embeddings(model)
    assert type(model.model.embed_tokens) is nn.Embedding


def test_it_is_done_once() -> None:
    model = tiny("llama-tied")
    assert len(quantise_embeddings(model)) == 2
    assert quantise_embeddings(model) == []


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_the_gradient_reaches_what_feeds_a_packed_head(kind: str) -> None:
    model = tiny(kind)
    quantise_embeddings(model)
    head: Any = model.get_output_embeddings()
    x = torch.randn(3, 32, requires_grad=True)
    head(x).square().sum().backward()
    expected = 2 * (x @ head.weight.t()) @ head.weight
    torch.testing.assert_close(x.grad, expected.detach(), rtol=1e-4, atol=1e-4)
