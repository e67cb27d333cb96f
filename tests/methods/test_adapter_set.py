"""What the adapters of a model may be told, what follows, and that a refusal leaves everything as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from graftlm.core.errors import AdapterError, GraftError, TargetError
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.attach import adapters_of
from graftlm.methods.lora import LoraConfig
from graftlm.methods.low_rank import LoraLinear

from .tiny import KINDS, batch, graft, logits, snapshot, stir, tiny

SMALL = LoraConfig(r=2, target_modules=("q_proj", "v_proj"))


def three(kind: str = "llama", **options: Any) -> tuple[Any, AdapterSet]:
    """A model with the adapters a, b and c, all of which change the output; a is active."""
    model = tiny(kind, **options)
    adapters = graft(model, LoraConfig(r=4), "a")
    for seed, name in enumerate(("a", "b", "c")):
        if name != "a":
            adapters.add(name, LoraConfig(r=2, target_modules="attention"))
        stir(adapters, name, seed=seed)
    return model, adapters


def test_the_first_adapter_is_active_and_trainable_and_later_ones_are_not() -> None:
    model = tiny("llama")
    assert adapters_of(model) is None
    adapters = graft(model, SMALL, "a")
    assert adapters_of(model) is adapters
    assert (adapters.names, adapters.active, adapters.trainable, adapters.merged) == (
        ("a",),
        ("a",),
        ("a",),
        (),
    )
    assert graft(model, SMALL, "b") is adapters
    adapters.add("c", SMALL)
    assert (adapters.names, adapters.active, adapters.trainable) == (("a", "b", "c"), ("a",), ("a",))
    assert "b" in adapters and "d" not in adapters
    assert not any(p.requires_grad for name in "bc" for p in adapters.parameters(name))


def test_after_the_last_adapter_is_deleted_the_next_is_the_first() -> None:
    model = tiny("llama")
    unchanged = snapshot(model)
    adapters = graft(model, SMALL, "a")
    adapters.delete("a")
    assert adapters.names == ()
    assert graft(model, SMALL, "b").active == ("b",)
    assert adapters.trainable == ("b",)
    adapters.detach()
    unchanged()


@pytest.mark.parametrize(
    ("refused", "word"),
    [
        (lambda m, a: graft(m, SMALL, "a"), "'a' exists"),
        (lambda m, a: a.add("b", SMALL), "'b' exists"),
        (lambda m, a: a.add("d", LoraConfig(target_modules=("q_prj",))), "q_prj.*q_proj"),
        (lambda m, a: a.add("d", LoraConfig(modules_to_save=("score",))), "score"),
        (lambda m, a: a.add("../d", SMALL), "'../d'"),
        (lambda m, a: a.activate("d"), "'d'"),
        (lambda m, a: a.activate(["b", "d"]), "'d'"),
        (lambda m, a: a.train_only(["d"]), "'d'"),
        (lambda m, a: a.delete("d"), "'d'"),
        (lambda m, a: a.merge(["b", "d"]), "'d'"),
        (lambda m, a: a.unmerge("d"), "'d'"),
        (lambda m, a: a.activated(["d"]).__enter__(), "'d'"),
        (lambda m, a: a.routed(["a", "d"]).__enter__(), "'d'"),
        (lambda m, a: a.routed([]).__enter__(), "No rows"),
        (lambda m, a: a.save("never-written", "d"), "'d'"),
    ],
)
def test_a_refusal_names_the_culprit_and_changes_nothing(
    refused: Callable[[Any, AdapterSet], object], word: str
) -> None:
    model, adapters = three()
    unchanged, state = snapshot(model), adapters._state
    with pytest.raises(GraftError, match=f"(?s){word}"):
        refused(model, adapters)
    unchanged()
    assert adapters._state == state and adapters.names == ("a", "b", "c")


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=("nothing",)),
        LoraConfig(target_modules=("q_proj",), modules_to_save=("nothing",)),
        LoraConfig(target_modules=("q_proj",), modules_to_save=("act_fn",)),
        LoraConfig(target_modules=("norm",)),
    ],
)
def test_a_model_is_untouched_when_the_first_adapter_is_refused(config: LoraConfig) -> None:
    model = tiny("llama")
    unchanged = snapshot(model)
    with pytest.raises(TargetError):
        graft(model, config)
    with pytest.raises(AdapterError):
        graft(model, SMALL, "no/name")
    unchanged()
    assert adapters_of(model) is None


def test_a_model_is_untouched_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    unchanged = snapshot(model)
    make, calls = LoraLinear.__init__, iter(range(10**6))

    def out_of_memory(part: LoraLinear, *args: Any, **kwargs: Any) -> None:
        if next(calls) > 20:
            raise RuntimeError("out of memory")
        make(part, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(LoraLinear, "__init__", out_of_memory)
        graft(model, LoraConfig(r=4))
    unchanged()
    assert adapters_of(model) is None


@pytest.mark.parametrize("name", ["", "a/b", "..", "a..b", ".a", "x" * 65, "a b", "é", "a\n"])
def test_names_that_are_no_names(name: str) -> None:
    with pytest.raises(AdapterError, match="name of an adapter"):
        graft(tiny("llama"), SMALL, name)


@pytest.mark.parametrize("name", ["a.b", "v1.2-x_y", "keys", "add", "adapters", "forward", "0", "x" * 64])
def test_names_that_could_clash_with_attributes(name: str) -> None:
    model, inputs = tiny("llama"), batch("llama")
    adapters = graft(model, LoraConfig(r=2), name)
    stir(adapters, name)
    changed = logits(model, inputs)
    with adapters.disabled():
        assert not torch.equal(logits(model, inputs), changed)
    adapters.merge()
    torch.testing.assert_close(logits(model, inputs), changed, rtol=1e-4, atol=1e-5)
    adapters.unmerge()
    adapters.delete(name)


def test_changes_are_summed_and_order_does_not_matter() -> None:
    model, adapters = three()
    model, inputs = model.double(), batch("llama")
    config = LoraConfig(r=1, target_modules=("lm_head",))
    for name in ("x", "y"):
        adapters.add(name, config, dtype="base")
        stir(adapters, name, seed=ord(name))
    outputs = {}
    for names in ([], ["x"], ["y"], ["x", "y"], ["y", "x"]):
        adapters.activate(names)
        assert adapters.active == tuple(names)
        outputs[tuple(names)] = logits(model, inputs)
    base = outputs[()]
    total = outputs["x",] - base + outputs["y",]
    torch.testing.assert_close(outputs["x", "y"], total)
    torch.testing.assert_close(outputs["y", "x"], outputs["x", "y"])


def test_disabled_is_the_base_to_the_bit_and_state_comes_back_after_an_error() -> None:
    inputs = batch("llama")
    base = logits(tiny("llama"), inputs)
    model, adapters = three()
    adapters.activate(["a", "b"])
    adapters.train_only("c")
    changed, state = logits(model, inputs), adapters._state
    with pytest.raises(KeyError), adapters.disabled():
        assert torch.equal(logits(model, inputs), base)
        raise KeyError
    assert adapters._state == state
    with pytest.raises(KeyError), adapters.activated("c"):
        assert adapters.active == ("c",)
        with adapters.activated([]):
            assert torch.equal(logits(model, inputs), base)
        assert adapters.active == ("c",)
        raise KeyError
    assert adapters._state == state
    assert torch.equal(logits(model, inputs), changed)


def test_what_changes_inside_a_block_and_is_not_its_business_stays() -> None:
    _, adapters = three()
    with adapters.activated("b"):
        adapters.train_only("c")
        adapters.delete("a")
    assert (adapters.active, adapters.trainable, adapters.names) == ((), ("c",), ("b", "c"))


def test_a_block_sees_the_state_at_its_start_not_at_its_making() -> None:
    model, adapters = three()
    inputs = batch("llama")
    block = adapters.disabled()
    adapters.merge("a")
    adapters.activate("b")
    expected = logits(model, inputs)
    with block:
        assert adapters.merged == ("a",) and adapters.active == ("b",)
    assert adapters.merged == ("a",) and adapters.active == ("b",)
    assert torch.equal(logits(model, inputs), expected)


def test_only_what_is_trainable_gets_gradients() -> None:
    model, adapters = three()
    adapters.activate(["a", "b", "c"])
    adapters.train_only(["b"])
    model(**batch("llama")).loss.backward()
    for name in adapters.names:
        assert all((p.grad is not None) == (name == "b") for p in adapters.parameters(name))
    trainable, total = adapters.count_parameters()
    assert trainable == sum(p.numel() for p in adapters.parameters("b"))
    assert total == sum(p.numel() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")
def test_trainable_parameters_are_printed_as_in_peft(capsys: pytest.CaptureFixture[str]) -> None:
    from peft import LoraConfig as Theirs
    from peft import get_peft_model

    fields: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    get_peft_model(tiny("llama-tied"), Theirs(**fields)).print_trainable_parameters()
    theirs = capsys.readouterr().out
    graft(tiny("llama-tied"), LoraConfig(**fields)).print_trainable_parameters()
    assert capsys.readouterr().out == theirs


@pytest.mark.parametrize("kind", KINDS)
def test_detach_gives_back_the_same_objects_and_flags(kind: str) -> None:
    model = tiny(kind)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
    unchanged = snapshot(model)
    adapters = graft(model, LoraConfig(r=2, bias="all"), "a")
    adapters.add("b", LoraConfig(r=2, target_modules="mlp"))
    stir(adapters, "a")
    adapters.activate(["a", "b"])
    adapters.merge()
    assert adapters.detach() is model
    unchanged()
    assert adapters_of(model) is None


def test_one_module_under_two_names_is_adapted_once_and_restored_twice() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    unchanged = snapshot(model)
    adapters = graft(model, LoraConfig(r=2, init_lora_weights=False))
    assert model[0] is model[2] and model[0] is not shared
    adapters.detach()
    unchanged()


@pytest.mark.parametrize("use", ["add", "activate", "detach", "merge"])
def test_a_set_that_was_detached_is_of_no_use_any_more(use: str) -> None:
    model, adapters = three()
    adapters.detach()
    unchanged = snapshot(model)
    with pytest.raises(AdapterError):
        adapters.add("d", SMALL) if use == "add" else getattr(adapters, use)(*["a"][: use != "detach"])
    unchanged()


def test_a_deep_copy_lives_its_own_life() -> None:
    model, adapters = three("llama-tied")
    inputs = batch("llama")
    adapters.merge("b")
    before = logits(model, inputs)
    twin = copy.deepcopy(model)
    theirs = adapters_of(twin)
    assert (
        theirs is not None
        and theirs is not adapters
        and theirs.model is twin
        and theirs._state == adapters._state
    )
    assert torch.equal(logits(twin, inputs), before)
    theirs.unmerge()
    stir(theirs, "a", seed=9)
    theirs.activate(["a", "c"])
    assert torch.equal(logits(model, inputs), before)
    assert adapters.merged == ("b",) and adapters.active == ("a",)
    plain: Any = theirs.detach()
    assert plain is theirs.model
    assert torch.equal(logits(plain, inputs), logits(tiny("llama-tied"), inputs))
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


@pytest.mark.parametrize("is_merged", [False, True])
def test_to_another_dtype_moves_everything(is_merged: bool) -> None:
    inputs = batch("llama")
    model, adapters = three()
    if is_merged:
        adapters.merge()
    model.to(torch.bfloat16)
    assert {p.dtype for p in adapters.parameters("a")} == {torch.bfloat16}
    assert logits(model, inputs).dtype == torch.bfloat16
    adapters.detach()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model, inputs), logits(tiny("llama").to(torch.bfloat16), inputs))


def test_training_mode_reaches_the_adapters() -> None:
    model = tiny("llama").train()
    adapters = graft(model, LoraConfig(r=2, lora_dropout=0.1), "a")
    parts = adapters.parts("a").values()
    assert all(part.training for part in parts)
    model.eval()
    assert not any(part.training for part in parts)
    adapters.add("b", SMALL)
    assert not any(part.training for part in adapters.parts("b").values())


@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_gradient_checkpointing_gives_the_same_gradients(kind: str, use_reentrant: bool) -> None:
    found = []
    for is_checkpointed in (False, True):
        model, inputs = tiny(kind).train(), batch(kind)
        adapters = graft(model, LoraConfig(r=4, lora_dropout=0.2, init_lora_weights=True))
        stir(adapters)
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        model(**inputs, use_cache=False).loss.backward()
        found.append({n: p.grad for n, p in adapters.named_parameters("default").items()})
    assert all(gradient is not None for gradient in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5)


def test_a_full_copy_beside_a_merged_adapter_starts_from_the_base() -> None:
    model, inputs = tiny("bert"), batch("bert")
    config = LoraConfig(r=2, target_modules=("query",), bias="lora_only", modules_to_save=("classifier",))
    base = {name: tensor.clone() for name, tensor in model.classifier.state_dict().items()}
    adapters = graft(model, config, "a")
    stir(adapters, "a")
    adapters.merge()
    adapters.add("b", config)
    adapters.unmerge()
    own = adapters.named_parameters("b")
    assert torch.equal(own["classifier.module.weight"], base["weight"])
    adapters.activate("b")
    stir(adapters, "b", seed=3)
    unmerged = logits(model, inputs)
    adapters.merge("b")
    torch.testing.assert_close(logits(model, inputs), unmerged, rtol=1e-4, atol=1e-5)
