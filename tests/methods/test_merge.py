"""Merging: the same outputs, all or nothing, and back to the byte."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graftlm.core.errors import AdapterError, MergeError
from graftlm.methods.attach import adapters_of
from graftlm.methods.lora import LoraConfig
from graftlm.methods.site import Site

from .test_adapter_set import three
from .tiny import KINDS, batch, graft, logits, snapshot, stir, tiny


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", ["none", "all"])
def test_merged_outputs_are_the_unmerged_ones(kind: str, bias: str) -> None:
    model, inputs = tiny(kind), batch(kind)
    unchanged = snapshot(model)
    adapters = graft(model, LoraConfig(r=4, bias=bias))
    stir(adapters)
    expected = logits(model, inputs)
    adapters.merge()
    assert adapters.merged == ("default",)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=2e-5)
    adapters.unmerge()
    assert torch.equal(logits(model, inputs), expected)
    adapters.detach()
    unchanged()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_many_cycles_with_a_changing_adapter_leave_the_base_its_bytes(dtype: torch.dtype) -> None:
    model = tiny("llama-tied").to(dtype)
    unchanged = snapshot(model)
    adapters = graft(model, LoraConfig(r=4))
    for cycle in range(30):
        stir(adapters, seed=cycle)
        adapters.merge()
        adapters.unmerge()
    adapters.detach()
    unchanged()


def test_a_merged_weight_is_the_rounded_sum_in_float32() -> None:
    model = tiny("llama").to(torch.bfloat16)
    base = model.lm_head.weight.detach().clone()
    adapters = graft(model, LoraConfig(r=2, lora_alpha=4, target_modules=("lm_head",)))
    stir(adapters)
    own = adapters.named_parameters("default")
    adapters.merge()
    exact = base.float() + 2 * own["lm_head.lora_B"] @ own["lm_head.lora_A"]
    assert torch.equal(model.lm_head.base_layer.weight, exact.to(torch.bfloat16))


def test_several_are_merged_as_their_sum_and_taken_out_one_by_one() -> None:
    model, adapters = three()
    inputs = batch("llama")
    expected = {}
    for names in (["a", "b", "c"], ["a", "c"], ["c"]):
        adapters.activate(names)
        expected[len(names)] = logits(model, inputs)
    adapters.activate(["a", "b", "c"])
    adapters.merge()
    torch.testing.assert_close(logits(model, inputs), expected[3], rtol=1e-4, atol=2e-5)
    adapters.unmerge("b")
    adapters.activate(["a", "c"])
    torch.testing.assert_close(logits(model, inputs), expected[2], rtol=1e-4, atol=2e-5)
    adapters.unmerge("a")
    adapters.activate(["c"])
    torch.testing.assert_close(logits(model, inputs), expected[1], rtol=1e-4, atol=2e-5)
    adapters.unmerge()
    assert torch.equal(logits(model, inputs), expected[1])


def test_an_active_adapter_keeps_working_beside_a_merged_one() -> None:
    model, adapters = three()
    inputs = batch("llama")
    adapters.activate(["a", "b"])
    expected = logits(model, inputs)
    adapters.merge("a")
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=2e-5)
    with adapters.disabled():
        only_a = logits(model, inputs)
    assert adapters.merged == ("a",)
    adapters.activate([])
    assert torch.equal(logits(model, inputs), only_a)
    adapters.unmerge()
    assert torch.equal(logits(model, inputs), logits(tiny("llama"), inputs))


def test_merging_what_is_merged_warns_and_changes_nothing() -> None:
    model, adapters = three()
    adapters.merge()
    unchanged = snapshot(model)
    with pytest.warns(UserWarning, match="Already merged.*a"):
        adapters.merge()
    unchanged()
    assert adapters.merged == ("a",)


def test_what_is_merged_can_be_neither_deleted_nor_routed() -> None:
    _, adapters = three()
    adapters.merge()
    with pytest.raises(AdapterError, match=r"(?s)'a' is merged.*unmerge\('a'\)"):
        adapters.delete("a")
    with pytest.raises(AdapterError, match="merged"), adapters.routed(["b"]):
        pass
    adapters.unmerge()
    adapters.delete("a")


def test_a_merged_weight_does_not_follow_its_adapter() -> None:
    model, inputs = tiny("bert"), batch("bert")
    config = LoraConfig(r=2, target_modules=("query",), bias="all", modules_to_save=("classifier",))
    adapters = graft(model, config)
    stir(adapters)
    adapters.merge()
    merged = logits(model, inputs)
    stir(adapters, seed=5)
    assert torch.equal(logits(model, inputs), merged)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_merge_that_is_not_finite_is_refused_whole_and_by_name(poison: float) -> None:
    model, adapters = three()
    adapters.merge("c")
    last = list(adapters.parameters("b"))[-1]
    with torch.no_grad():
        last[0, 0] = poison
    base = [(site, key, p) for site in model.modules() for key, p in _base_parameters(site)]
    before, state = [p.clone() for _, _, p in base], adapters._state
    with pytest.raises(MergeError, match="'b'"):
        adapters.merge(["a", "b"])
    assert adapters._state == state
    for (site, key, parameter), value in zip(base, before, strict=True):
        assert site.base_layer.get_parameter(key) is parameter
        assert torch.equal(parameter, value)


def _base_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.base_layer.named_parameters()) if isinstance(module, Site) else []


def test_a_sum_that_overflows_is_refused() -> None:
    model = tiny("llama").to(torch.float16)
    adapters = graft(model, LoraConfig(r=1, lora_alpha=1, target_modules=("lm_head",)), "a")
    adapters.add("b", LoraConfig(r=1, lora_alpha=1, target_modules=("lm_head",)))
    for name in ("a", "b"):
        with torch.no_grad():
            for parameter in adapters.parameters(name):
                parameter.fill_(200.0)
    unchanged = snapshot(model)
    with pytest.raises(MergeError, match="'b'"):
        adapters.merge(["a", "b"])
    unchanged()
    assert adapters.merged == ()


def test_an_interrupted_merge_leaves_nothing_half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapters = three()
    unchanged, state = snapshot(model), adapters._state
    last = list(adapters.parts("a").values())[-1]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(last), "merged", lambda part, dense: _interrupt(part is last, dense))
        adapters.merge()
    unchanged()
    assert adapters._state == state


def _interrupt(now: bool, dense: Any) -> Any:
    if now:
        raise KeyboardInterrupt
    return {"weight": dense["weight"] + 1}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_packed_bases_are_refused_with_the_dtype_to_choose(dtype: torch.dtype) -> None:
    model = tiny("llama")
    adapters = graft(model, LoraConfig(r=2, target_modules=("q_proj",)))
    layer = model.model.layers[1].self_attn.q_proj.base_layer
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    before = model.model.layers[0].self_attn.q_proj.base_layer.weight
    with pytest.raises(MergeError, match="bfloat16"):
        adapters.merge()
    assert model.model.layers[0].self_attn.q_proj.base_layer.weight is before
    assert adapters.merged == ()


TIES = [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")]


@pytest.mark.parametrize("targets", TIES)
def test_merging_into_tied_embeddings_unties_says_so_and_survives_a_reload(
    targets: tuple[str, ...], tmp_path: Path
) -> None:
    model, inputs = tiny("llama-tied"), batch("llama")
    adapters = graft(model, LoraConfig(r=2, target_modules=targets))
    stir(adapters)
    expected = logits(model, inputs)
    with pytest.warns(UserWarning, match="unties"):
        adapters.merge()
    assert model.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    with adapters.disabled():
        torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="Already merged"):
        adapters.merge()
    plain: Any = adapters.merge_and_unload()
    assert adapters_of(plain) is None and plain is model
    plain.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, inputs), expected, rtol=1e-4, atol=1e-5)


def test_the_tie_and_its_flag_come_back_with_the_unmerge_that_restores_it() -> None:
    model = tiny("llama-tied")
    adapters = graft(model, LoraConfig(r=2, target_modules="attention"), "inner")
    adapters.add("head", LoraConfig(r=2, target_modules=("lm_head",)))
    adapters.merge("inner")
    assert model.config.tie_word_embeddings is True
    with pytest.warns(UserWarning, match="unties"):
        adapters.merge("head")
    assert model.config.tie_word_embeddings is False
    adapters.unmerge("head")
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.model.embed_tokens.weight
    adapters.unmerge()
    with pytest.warns(UserWarning, match="unties"):
        adapters.merge("head")
    adapters.detach()
    assert model.config.tie_word_embeddings is True


def test_a_warning_that_is_an_error_does_not_leave_the_flag_behind() -> None:
    model = tiny("llama-tied")
    adapters = graft(model, LoraConfig(r=2, target_modules=("lm_head",)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="unties"):
            adapters.merge()
    assert (adapters.merged == ("default",)) == (model.config.tie_word_embeddings is False)
    adapters.detach()
    assert model.config.tie_word_embeddings is True


def test_untied_embeddings_stay_what_they_are() -> None:
    model = tiny("llama")
    adapters = graft(model, LoraConfig(r=2, target_modules=("lm_head", "embed_tokens")))
    adapters.merge()
    assert model.config.tie_word_embeddings is False
    adapters.detach()


@pytest.mark.parametrize("is_merged", [False, True])
def test_merge_and_unload_gives_a_plain_model_with_the_flags_of_the_base(
    is_merged: bool, tmp_path: Path
) -> None:
    model, inputs = tiny("llama"), batch("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    names = [name for name, _ in model.named_modules()]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    adapters = graft(model, LoraConfig(r=4))
    stir(adapters)
    expected = logits(model, inputs)
    if is_merged:
        adapters.merge()
    adapters.merge_and_unload()
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    assert [name for name, _ in model.named_modules()] == names
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again, inputs), logits(model, inputs))


@pytest.mark.filterwarnings("ignore:Merging unties")
@pytest.mark.parametrize("targets", TIES)
def test_both_halves_of_a_tie_keep_their_flags_after_unloading(targets: tuple[str, ...]) -> None:
    model = tiny("llama-tied")
    adapters = graft(model, LoraConfig(r=2, target_modules=targets))
    stir(adapters)
    adapters.merge_and_unload()
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.lm_head.weight.requires_grad and model.model.embed_tokens.weight.requires_grad
