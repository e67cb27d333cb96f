"""One adapter per row: each row is what it would be alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from graftlm.core.errors import AdapterError
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.lora import LoraConfig

from .test_adapter_set import three
from .tiny import KINDS, batch, graft, logits, snapshot, stir, tiny

ROWS = ["a", None, "b", "a"]


def two(kind: str, **fields: Any) -> tuple[Any, AdapterSet]:
    model = tiny(kind)
    adapters = graft(model, LoraConfig(r=4, **fields), "a")
    adapters.add("b", LoraConfig(r=2, lora_alpha=6, **fields))
    for seed, name in enumerate("ab"):
        stir(adapters, name, seed=seed)
    return model, adapters


def row_by_row(model: Any, adapters: AdapterSet, call: Callable[[int], Tensor]) -> list[Tensor]:
    found = []
    for number, name in enumerate(ROWS):
        with adapters.activated([] if name is None else name):
            found.append(call(number))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", ["none", "all"])
def test_each_row_is_what_its_adapter_gives_alone(kind: str, bias: str) -> None:
    model, adapters = two(kind, bias=bias)
    inputs = batch(kind, rows=len(ROWS))
    alone = row_by_row(model, adapters, lambda i: logits(model, {k: v[i : i + 1] for k, v in inputs.items()}))
    with adapters.routed(ROWS):
        routed = logits(model, inputs)
    torch.testing.assert_close(routed, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "bart", "t5"])
def test_adapted_embeddings_are_routed_too(kind: str) -> None:
    model, adapters = two(kind, target_modules=("embed_tokens",))
    inputs = batch(kind, rows=len(ROWS))
    alone = row_by_row(model, adapters, lambda i: logits(model, {k: v[i : i + 1] for k, v in inputs.items()}))
    with adapters.routed(ROWS):
        torch.testing.assert_close(logits(model, inputs), torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_routed_full_copy_answers_for_its_own_rows_only() -> None:
    model, adapters = two("bert", modules_to_save=("classifier",))
    inputs = batch("bert", rows=len(ROWS))
    alone = row_by_row(model, adapters, lambda i: logits(model, {k: v[i : i + 1] for k, v in inputs.items()}))
    with adapters.routed(ROWS):
        torch.testing.assert_close(logits(model, inputs), torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_expands_rows_for_beams(kind: str, beams: int) -> None:
    model, adapters = two(kind)
    ids = batch(kind, rows=len(ROWS))["input_ids"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False}

    def generated(rows: Tensor) -> Tensor:
        found: Tensor = model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **options)
        return found

    alone = row_by_row(model, adapters, lambda i: generated(ids[i : i + 1]))
    with adapters.routed(ROWS):
        together = generated(ids)
        again = generated(ids)
    assert torch.equal(together, torch.cat(alone)) and torch.equal(again, together)


def test_gradients_of_a_routed_batch_are_the_sums_over_rows() -> None:
    model, adapters = two("llama")
    adapters.train_only(["a", "b"])
    inputs = batch("llama", rows=len(ROWS))
    parameters = {f"{n}.{k}": p for n in "ab" for k, p in adapters.named_parameters(n).items()}

    def backward(i: int) -> Tensor:
        loss: Tensor = model(**{k: v[i : i + 1] for k, v in inputs.items()}).loss
        if loss.requires_grad:
            loss.backward()
        return loss.detach()

    row_by_row(model, adapters, backward)
    expected = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    with adapters.routed(ROWS):
        (model(**inputs).loss * len(ROWS)).backward()
    assert expected.keys() == parameters.keys()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")
def test_checkpointing_inside_the_block_gives_the_same_gradients() -> None:
    found = []
    for is_checkpointed in (False, True):
        model, adapters = two("llama")
        adapters.train_only(["a", "b"])
        model.train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with adapters.routed(ROWS):
            model(**batch("llama", rows=4), use_cache=False).loss.backward()
        found.append([p.grad for name in "ab" for p in adapters.parameters(name)])
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [2, 3, 8])
def test_a_batch_of_another_size_is_refused(rows: int) -> None:
    model, adapters = two("llama")
    with pytest.raises(AdapterError, match=f"{rows} rows"), adapters.routed(ROWS):
        logits(model, batch("llama", rows=rows))
    logits(model, batch("llama", rows=rows))


def test_everything_is_as_before_after_the_block_and_after_an_error() -> None:
    model, adapters = three()
    inputs = batch("llama")
    model.generate = generate = model.generate
    before = logits(model, inputs)
    unchanged, hooks = snapshot(model), len(model._forward_pre_hooks)
    with pytest.raises(KeyError), adapters.routed(["a", "b", None]):
        raise KeyError
    unchanged()
    assert len(model._forward_pre_hooks) == hooks and model.generate is generate
    assert torch.equal(logits(model, inputs), before)


def test_disabled_inside_a_routed_block_is_the_base() -> None:
    model, adapters = two("llama")
    inputs = batch("llama", rows=len(ROWS))
    with adapters.routed(ROWS):
        routed = logits(model, inputs)
        with adapters.disabled():
            assert torch.equal(logits(model, inputs), logits(tiny("llama"), inputs))
        assert torch.equal(logits(model, inputs), routed)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.merge(),
        lambda a: a.delete("b"),
        lambda a: a.add("c", LoraConfig(r=1)),
        lambda a: a.detach(),
        lambda a: a.merge_and_unload(),
        lambda a: a.routed(["a"]).__enter__(),
    ],
)
def test_what_exists_and_is_merged_stays_while_rows_are_routed(
    change: Callable[[AdapterSet], object],
) -> None:
    model, adapters = two("llama")
    inputs = batch("llama", rows=len(ROWS))
    with adapters.routed(ROWS):
        expected = logits(model, inputs)
        with pytest.raises(AdapterError, match="routed"):
            change(adapters)
        assert torch.equal(logits(model, inputs), expected)
    assert adapters.names == ("a", "b")


class Pooled(torch.nn.Linear):
    """Gives one row for two rows of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[::2]


def test_a_layer_without_a_row_for_each_row_is_refused_not_left_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), Pooled(4, 4))
    adapters = graft(model, LoraConfig(r=2, target_modules=("1",)), "a")
    with adapters.routed(["a", None, "a", None]), pytest.raises(AdapterError, match="a row for each row"):
        model(torch.ones(4, 4))
