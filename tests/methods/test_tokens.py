"""Trainable token rows: what a model gives whose table has these rows, wherever that table is used."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftlm.core.errors import ConfigError, TargetError
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach_folder
from graftlm.methods.lora import LoraConfig
from graftlm.methods.tokens import TiedTokenRows, TokenRows, TrainableTokensConfig

from .tiny import batch, graft, logits, snapshot, stir, tiny

IDS = (9, 3, 30)
KINDS = ("llama", "llama-tied", "gpt2", "gemma3", "bert", "t5", "bart")


def inputs_with(kind: str, ids: Sequence[int] = IDS) -> dict[str, Tensor]:
    found = batch(kind)
    found["input_ids"][0, : len(ids)] = torch.tensor(ids)
    return found


def with_rows(kind: str, rows: Tensor, ids: Sequence[int] = IDS) -> Any:
    """The definition: a model whose input table (and all tied to it) has these rows."""
    model = tiny(kind)
    with torch.no_grad():
        model.get_input_embeddings().weight[list(ids)] = rows.to(model.dtype)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_are_replaced_wherever_the_table_is_used(kind: str) -> None:
    model, inputs = tiny(kind), inputs_with(kind)
    base = logits(model, inputs)
    adapters = graft(model, TrainableTokensConfig(token_indices=IDS))
    assert torch.equal(logits(model, inputs), base)
    stir(adapters, size=1.0)
    (rows,) = adapters.parameters("default")
    expected = logits(with_rows(kind, rows.detach()), inputs)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, base, atol=1e-3)
    with adapters.disabled():
        assert torch.equal(logits(model, inputs), base)
    is_tied = model.config.tie_word_embeddings
    adapters.merge()
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=1e-5)
    assert model.config.tie_word_embeddings == is_tied
    if kind == "llama-tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight
    adapters.unmerge()
    adapters.detach()
    assert torch.equal(logits(model, inputs), base)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "t5"])
def test_the_gradient_is_that_of_the_rows_of_a_trained_table(kind: str) -> None:
    model, inputs = tiny(kind), inputs_with(kind)
    adapters = graft(model, TrainableTokensConfig(token_indices=IDS))
    model(**inputs).loss.backward()
    (rows,) = adapters.parameters("default")
    whole = tiny(kind)
    whole(**inputs).loss.backward()
    torch.testing.assert_close(rows.grad, whole.get_input_embeddings().weight.grad[list(IDS)])
    assert not any(p.grad is not None for n, p in model.named_parameters() if "adapters" not in n)


def test_parts_of_tied_modules_share_one_parameter() -> None:
    adapters = graft(tiny("t5"), TrainableTokensConfig(token_indices=IDS))
    parts = adapters.parts("default")
    assert [type(part) for part in parts.values()] == [TokenRows, *[TiedTokenRows] * 3]
    assert list(adapters.named_parameters("default")) == ["shared.trainable_tokens_delta"]


def test_a_copy_of_the_model_follows_its_own_rows() -> None:
    model, inputs = tiny("llama-tied"), inputs_with("llama-tied")
    adapters = graft(model, TrainableTokensConfig(token_indices=IDS))
    stir(adapters)
    (rows,) = adapters.parameters("default")
    expected = logits(with_rows("llama-tied", rows.detach()), inputs)
    other = copy.deepcopy(model)
    stir(adapters, seed=1)
    torch.testing.assert_close(logits(other, inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_16_bit_bases_get_the_nearest_rows(dtype: torch.dtype) -> None:
    table = nn.Embedding(10, 8).to(dtype)
    part = TokenRows(table, (4, 2))
    with torch.no_grad():
        part.trainable_tokens_delta.normal_()
    x = torch.tensor([[2, 3, 4]])
    found = part.post(x, table(x))
    assert found.dtype == dtype
    expected = part.trainable_tokens_delta.detach()[[1, 0]].to(dtype)
    torch.testing.assert_close(found[0, [0, 2]], expected, rtol=0, atol=1e-6 if dtype.itemsize > 2 else 1e-3)
    assert torch.equal(found[0, 1], table(x)[0, 1])


# Beside other adapters.


def test_it_goes_with_lora_in_one_adapter() -> None:
    model, inputs = tiny("llama-tied"), inputs_with("llama-tied")
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=IDS)
    adapters = graft(model, config)
    stir(adapters)
    expected = logits(model, inputs)
    values = adapters.named_parameters("default")
    other = with_rows("llama-tied", values["model.embed_tokens.trainable_tokens_delta"].detach())
    lora = graft(other, LoraConfig(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in lora.named_parameters("default").items():
            parameter.copy_(values[name])
    torch.testing.assert_close(logits(other, inputs), expected, rtol=0, atol=1e-5)


def test_a_table_by_name_and_a_head_of_its_own() -> None:
    model, inputs = tiny("llama"), inputs_with("llama")
    config = LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 9], "lm_head": [5]}
    )
    adapters = graft(model, config)
    values = adapters.named_parameters("default")
    with torch.no_grad():
        for name in ("model.embed_tokens", "lm_head"):
            values[f"{name}.trainable_tokens_delta"].normal_()
    other = with_rows("llama", values["model.embed_tokens.trainable_tokens_delta"].detach(), (1, 9))
    with torch.no_grad():
        other.lm_head.weight[5] = values["lm_head.trainable_tokens_delta"][0]
    torch.testing.assert_close(logits(model, inputs), logits(other, inputs), rtol=0, atol=1e-5)


def test_changes_of_two_adapters_are_summed_and_routed_rows_are_apart() -> None:
    model, inputs = tiny("llama-tied"), inputs_with("llama-tied")
    adapters = graft(model, TrainableTokensConfig(token_indices=[9, 3]), "a")
    adapters.add("b", TrainableTokensConfig(token_indices=[30]))
    stir(adapters, "a", size=1.0)
    stir(adapters, "b", size=1.0, seed=1)
    rows = torch.cat([next(adapters.parameters(name)).detach() for name in ("a", "b")])
    with adapters.activated(["a", "b"]):
        both = logits(with_rows("llama-tied", rows, (9, 3, 30)), inputs)
        torch.testing.assert_close(logits(model, inputs), both, rtol=0, atol=1e-5)
    with adapters.routed(["a", "b", None]):
        mixed = logits(model, inputs)
    for row, names in enumerate(["a", "b", []]):
        with adapters.activated(names):
            torch.testing.assert_close(mixed[row], logits(model, inputs)[row], rtol=0, atol=1e-5)


def test_new_tokens_are_trained_after_the_vocabulary_grew() -> None:
    model = tiny("llama-tied")
    model.resize_token_embeddings(50, mean_resizing=False)
    adapters = graft(model, TrainableTokensConfig(token_indices=[48, 49]))
    inputs = inputs_with("llama-tied", (48, 49))
    before = model(**inputs).loss
    before.backward()
    with torch.no_grad():
        for parameter in adapters.parameters("default"):
            parameter.sub_(parameter.grad, alpha=1.0)
    assert model(**inputs).loss < before


def test_new_tokens_come_back_on_a_vocabulary_that_grew_again(tmp_path: Path) -> None:
    """The base's own new rows are random and differ every time; the file's rows take their place."""

    def grown(seed: int) -> Any:
        model = tiny("llama-tied")
        torch.manual_seed(seed)
        model.resize_token_embeddings(50, mean_resizing=False)
        return model

    model, inputs = grown(1), inputs_with("llama-tied", (48, 49))
    adapters = graft(model, TrainableTokensConfig(token_indices=[48, 49]))
    stir(adapters)
    adapters.save(tmp_path)
    other = grown(2)
    assert not torch.equal(logits(other, inputs), logits(grown(1), inputs))
    attach_folder(other, tmp_path, storage=FOLDER)
    torch.testing.assert_close(logits(other, inputs), logits(model, inputs), rtol=0, atol=1e-5)


def test_it_compiles_whole() -> None:
    model, inputs = tiny("llama-tied"), inputs_with("llama-tied")
    adapters = graft(model, TrainableTokensConfig(token_indices=IDS))
    stir(adapters)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled, inputs), logits(model, inputs), rtol=0, atol=1e-5)


# Refusals.


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TrainableTokensConfig(token_indices=[48]), "has 48 rows: no \\[48\\]"),
        (TrainableTokensConfig(token_indices=[1], target_modules="embed"), "'embed' matches no embedding"),
        (LoraConfig(trainable_token_indices=[1], modules_to_save=["embed_tokens"]), "trained whole"),
        (LoraConfig(target_modules=["embed_tokens"], trainable_token_indices=[1]), "adapted otherwise"),
        (LoraConfig(target_modules=["lm_head"], trainable_token_indices=[1]), "lm_head is adapted otherwise"),
        (
            LoraConfig(trainable_token_indices={"embed_tokens": [1], "lm_head": [2]}),
            "share one table, but name different tokens",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(config: Any, words: str) -> None:
    model = tiny("llama-tied")
    check = snapshot(model)
    with pytest.raises(TargetError, match=words):
        graft(model, config)
    check()


@pytest.mark.parametrize("ids", [[], [-1], [2, 2]])
def test_wrong_ids_are_refused(ids: list[int]) -> None:
    with pytest.raises(ConfigError, match="token"):
        TrainableTokensConfig(token_indices=ids)
    with pytest.raises(ConfigError, match="token"):
        LoraConfig(trainable_token_indices=ids)
    with pytest.raises(ConfigError, match="token"):
        LoraConfig(trainable_token_indices={"embed_tokens": ids})


def test_tables_named_as_tied_with_the_same_tokens_are_one() -> None:
    indices = {"embed_tokens": [1, 2], "lm_head": [1, 2]}
    adapters = graft(
        tiny("llama-tied"), LoraConfig(target_modules=["q_proj"], trainable_token_indices=indices)
    )
    assert isinstance(adapters.parts("default")["lm_head"], TiedTokenRows)
