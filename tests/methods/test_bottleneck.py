"""Bottleneck adapters against their definition in float64, wherever they stand; alone, together, compiled."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftlm.core.errors import AdapterError, ConfigError, MergeError, TargetError
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.bottleneck import BottleneckConfig
from graftlm.methods.bottleneck_parts import Bottleneck, InputTap, ModuleBottleneck
from graftlm.methods.lora import LoraConfig
from graftlm.methods.resolve import resolve

from .test_targets import model_of
from .tiny import KINDS, batch, graft, logits, stir, tiny

# kind: blocks, and in each the end of attention, the beginning and the end of the feed-forward part
PLACES: dict[str, tuple[list[str], str, str, str]] = {
    "llama": (["model.layers.0", "model.layers.1"], "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"),
    "gpt2": (["transformer.h.0", "transformer.h.1"], "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "gemma3": (["model.layers.0", "model.layers.1"], "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"),
    "bert": (
        ["bert.encoder.layer.0", "bert.encoder.layer.1"],
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
    "bart": (["model.encoder.layers.0", "model.decoder.layers.0"], "self_attn.out_proj", "fc1", "fc2"),
}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda h: h.clamp(min=0),
    "gelu": lambda h: h * 0.5 * (1 + torch.erf(h / 2**0.5)),
    "silu": lambda h: h / (1 + torch.exp(-h)),
}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}


@contextmanager
def defined(model: nn.Module, kind: str, adapters: AdapterSet, config: BottleneckConfig) -> Iterator[None]:
    """The definition on a plain model, by hooks that compute in its own dtype."""
    blocks, attention, begins, ends = PLACES[kind]
    parts, seen, handles = adapters.parts("default"), {}, []

    def change(path: str, h: Tensor) -> Tensor:
        p = {name: value.to(h.dtype) for name, value in parts[path].named_parameters()}
        hidden = FUNCTIONS[config.non_linearity](h @ p["down.weight"].T + p["down.bias"])
        scale = p["scale"] if config.scaling == "learned" else config.scaling
        return (hidden @ p["up.weight"].T + p["up.bias"]) * scale

    def remember(block: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[block] = args[0]

    def after(path: str, module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return y + change(path, y)

    def beside(block: str, path: str, module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return y + change(path, seen[block])

    for block in blocks:
        at = partial(lambda where, leaf: f"{where}.{leaf}", block)
        if config.placement == "parallel":
            first = model.get_submodule(at(begins))
            handles.append(first.register_forward_pre_hook(partial(remember, block)))
            last = model.get_submodule(at(ends))
            handles.append(last.register_forward_hook(partial(beside, block, at(ends))))
        for leaf in {"pfeiffer": (ends,), "houlsby": (attention, ends), "parallel": ()}[config.placement]:
            handles.append(model.get_submodule(at(leaf)).register_forward_hook(partial(after, at(leaf))))
    yield
    for handle in handles:
        handle.remove()


def double(kind: str) -> Any:
    return tiny(kind).double()


@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby", "parallel"])
@pytest.mark.parametrize("kind", PLACES)
def test_the_definition(kind: str, placement: Any) -> None:
    config = BottleneckConfig(placement=placement, reduction_factor=4)
    model, plain, inputs = double(kind), double(kind), batch(kind)
    adapters = graft(model, config, dtype="base")
    assert torch.equal(logits(model, inputs), logits(plain, inputs)), "identity at the start"
    stir(adapters, size=1.0)
    with defined(plain, kind, adapters, config):
        expected = logits(plain, inputs)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=1e-12)
    assert (logits(plain, inputs) - expected).abs().max() > 1e-3
    with adapters.disabled():
        assert torch.equal(logits(model, inputs), logits(plain, inputs))


@pytest.mark.parametrize("non_linearity", FUNCTIONS)
@pytest.mark.parametrize("scaling", [0.5, "learned"])
@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
def test_gradients_are_those_of_the_definition(non_linearity: Any, scaling: Any, placement: Any) -> None:
    config = BottleneckConfig(
        placement=placement, reduction_factor=8, non_linearity=non_linearity, scaling=scaling
    )
    model, plain, inputs = double("llama"), double("llama"), batch("llama")
    adapters = graft(model, config, dtype="base")
    stir(adapters, size=1.0)
    parameters = [*adapters.parameters("default")]
    ours = torch.autograd.grad(model(**inputs).loss, parameters)
    with defined(plain, "llama", adapters, config):
        expected = torch.autograd.grad(plain(**inputs).loss, parameters)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert len(parameters) == (5 if scaling == "learned" else 4) * (4 if placement == "houlsby" else 2)


@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby", "parallel"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_saves_trains_and_goes(kind: str, placement: Any, tmp_path: Path) -> None:
    model, inputs = tiny(kind), batch(kind)
    before = logits(model, inputs)
    config = BottleneckConfig(placement=placement, reduction_factor=4, scaling="learned", cross_adapter=True)
    adapters = graft(model, config)
    optimizer = torch.optim.AdamW(adapters.parameters("default"), lr=3e-2)
    losses = []
    for _ in range(5):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = logits(model, inputs)
    adapters.save(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["peft_type"] == "BOTTLENECK" and content["placement"] == placement
    other = tiny(kind)
    graft(other, LoraConfig(r=2), "lora").load(tmp_path, "again")
    with other.graft_adapters.activated("again"):
        assert torch.equal(logits(other, inputs), expected)
    with pytest.raises(MergeError, match="non-linearity"):
        adapters.merge()
    assert torch.equal(logits(adapters.detach(), inputs), before)


def test_defaults_and_widths() -> None:
    assert BottleneckConfig(placement="parallel").scaling == 4.0
    assert BottleneckConfig(placement="parallel", scaling=1.0).scaling == 1.0
    parts = graft(tiny("llama"), BottleneckConfig(reduction_factor={1: 8, "default": 4})).parts("default")
    assert [part.down.out_features for part in parts.values()] == [8, 4]
    parts = graft(tiny("llama"), BottleneckConfig(reduction_factor=1000)).parts("default")
    assert [part.down.out_features for part in parts.values()] == [1, 1]
    assert BottleneckConfig(reduction_factor=0.5).width_of(0, 32) == 64


def test_blocks_are_counted_through_encoder_and_decoder() -> None:
    def paths(**fields: Any) -> list[str]:
        return [
            path.split(".layer.")[0]
            for path in resolve(model_of("T5Model"), BottleneckConfig(**fields)).paths
        ]

    assert paths(leave_out=(0, 3)) == ["encoder.block.1", "decoder.block.0"]
    assert paths(placement="houlsby", leave_out=(0, 1, 2)) == ["decoder.block.1"] * 2
    assert paths(placement="houlsby", leave_out=(0, 1, 2), cross_adapter=True) == ["decoder.block.1"] * 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"leave_out": (2, 7)}, ["leave_out", "[2, 7]", "2 blocks"]),
        ({"reduction_factor": {5: 2, "default": 4}}, ["reduction_factor", "[5]"]),
        ({"reduction_factor": {0: 2}}, ["[1]", "default"]),
        ({"target_modules": ("down_prj",)}, ["down_prj", "down_proj"]),
        ({"target_modules": ("down_proj",), "placement": "parallel"}, ["feed-forward module"]),
        ({"target_modules": ("layers",)}, ["ModuleList"]),
    ],
)
def test_what_does_not_fit_is_said(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(TargetError) as caught:
        resolve(model_of("LlamaForCausalLM"), BottleneckConfig(**fields))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "fields",
    [
        {"reduction_factor": 0},
        {"reduction_factor": {"all": 2}},
        {"non_linearity": "tanh"},
        {"scaling": "big"},
    ],
)
def test_what_makes_no_sense_is_an_error(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        BottleneckConfig(**fields)


def test_a_structure_that_says_nothing_asks_for_names() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(TargetError, match="target_modules=") as caught:
        resolve(model, BottleneckConfig())
    assert "no block" in str(caught.value)
    adapters = graft(model, BottleneckConfig(target_modules=("2",), reduction_factor=2))
    assert next(iter(adapters.named_parameters("default"))) == "2.down.weight"


@pytest.mark.parametrize("placement", ["pfeiffer", "parallel"])
def test_whole_modules_by_name_equal_their_last_layer(placement: Any) -> None:
    """In Llama the feed-forward module ends with its last linear layer, and its input is the first's."""
    found = []
    for names in (None, ("mlp",)):
        model = tiny("llama")
        stir(graft(model, BottleneckConfig(placement=placement, target_modules=names)), size=1.0)
        found.append(logits(model, batch("llama")))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("placement", ["pfeiffer", "parallel"])
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_a_mixture_of_experts_is_adapted_as_a_whole(name: str, placement: Any) -> None:
    import transformers

    settings = KINDS["llama"][2] | MOE
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    inputs = batch("llama")
    before = logits(model, inputs)
    adapters = graft(model, BottleneckConfig(placement=placement, reduction_factor=2))
    assert [*adapters.parts("default")] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert all(isinstance(part, ModuleBottleneck) for part in adapters.parts("default").values())
    assert torch.equal(logits(model, inputs), before)
    stir(adapters, size=1.0)
    adapted = logits(model, inputs)
    assert not torch.allclose(adapted, before, atol=1e-3)
    with adapters.routed(["default", None, "default"]):
        rows = logits(model, inputs)
    torch.testing.assert_close(rows[[0, 2]], adapted[[0, 2]], rtol=0, atol=1e-5)
    torch.testing.assert_close(rows[1], before[1], rtol=0, atol=1e-5)
    adapters.detach()
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
def test_checkpointing_gives_the_same_gradients_and_keeps_nothing(placement: Any) -> None:
    inputs, gradients = batch("llama"), []
    for checkpointing in (False, True):
        model = tiny("llama").train()
        adapters = graft(model, BottleneckConfig(placement=placement, reduction_factor=4))
        stir(adapters)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(**inputs).loss.backward()
        gradients.append([p.grad for p in adapters.parameters("default")])
        taps = [part for part in adapters.parts("default").values() if isinstance(part, InputTap)]
        assert len(taps) == (2 if placement == "parallel" else 0)
        assert all(tap.memory.value is None for tap in taps)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_what_a_tap_remembers_compiles_without_graph_breaks() -> None:
    model, inputs = tiny("llama", num_hidden_layers=1), batch("llama")
    config = BottleneckConfig(placement="parallel", reduction_factor=4, scaling="learned")
    adapters = graft(model, config)
    stir(adapters)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(**inputs).loss
    loss.backward()
    found = [p.grad.clone() for p in adapters.parameters("default") if p.grad is not None]
    model.zero_grad()
    expected = model(**inputs).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    for gradient, p in zip(found, adapters.parameters("default"), strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
def test_copies_do_not_share_what_a_tap_remembers(placement: Any) -> None:
    model, inputs = tiny("gpt2"), batch("gpt2")
    adapters = graft(model, BottleneckConfig(placement=placement))
    stir(adapters, size=1.0)
    expected = logits(model, inputs)
    twin = copy.deepcopy(model)
    adapters.detach()
    assert torch.equal(logits(twin, inputs), expected)
    names = [name for name, _ in twin.named_parameters()]
    assert len(names) == len(set(names))


def test_parts_know_each_other_without_being_children_of_each_other() -> None:
    adapters = graft(tiny("llama"), BottleneckConfig(placement="parallel"))
    names = [name for part in adapters.parts("default").values() for name, _ in part.named_modules() if name]
    assert set(names) == {"down", "up"}
    assert len(adapters.named_parameters("default")) == 8


@pytest.mark.parametrize("half", ["gate_proj", "down_proj"])
def test_half_of_a_feed_forward_part_in_modules_to_save_is_refused(half: str) -> None:
    config = BottleneckConfig(placement="parallel", modules_to_save=(f"layers.0.mlp.{half}",))
    with pytest.raises(AdapterError, match="missing"):
        graft(tiny("llama"), config)


def test_a_feed_forward_part_in_modules_to_save_has_no_adapter() -> None:
    config = BottleneckConfig(placement="parallel", modules_to_save=("layers.0.mlp",))
    parts = graft(tiny("llama"), config).parts("default")
    assert [path for path, part in parts.items() if isinstance(part, Bottleneck)] == [
        "model.layers.1.mlp.down_proj"
    ]


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_changes_are_summed_in_any_order_and_stacked_in_turn(kind: str) -> None:
    """At the last feed-forward part: the change of each is that upon the base's output."""
    model, inputs = double(kind), batch(kind)
    last = PLACES[kind][0][-1]
    adapters = graft(model, BottleneckConfig(leave_out=(0,)), "a", dtype="base")
    adapters.add("b", BottleneckConfig(leave_out=(0,), placement="parallel"), dtype="base")
    adapters.add("c", LoraConfig(r=2, target_modules=(f"{last}.{PLACES[kind][3]}",)), dtype="base")
    names = ("a", "b", "c")
    for seed, name in enumerate(names):
        stir(adapters, name, seed=seed, size=1.0)
    outputs: dict[tuple[str, ...], Tensor] = {}
    kept: list[Tensor] = []
    site = model.get_submodule(f"{last}.{PLACES[kind][3]}")
    site.register_forward_hook(lambda module, args, y: kept.append(y.detach()))
    for active in ((), *((name,) for name in names), names, names[::-1]):
        adapters.activate(active)
        logits(model, inputs)
        outputs[active] = kept[-1]
    base = outputs[()]
    total = base + sum(outputs[(name,)] - base for name in names)
    torch.testing.assert_close(outputs[names], total, rtol=0, atol=1e-12)
    torch.testing.assert_close(outputs[names[::-1]], total, rtol=0, atol=1e-12)
    adapters.activate(("a", "b"), how="stack")
    logits(model, inputs)
    by_parallel = outputs[("b",)] - base
    torch.testing.assert_close(kept[-1], outputs[("a",)] + by_parallel, rtol=0, atol=1e-12)
    adapters.activate(("b", "a"), how="stack")
    logits(model, inputs)
    assert (kept[-1] - outputs[("a",)] - by_parallel).abs().max() > 1e-6


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_routed_rows_are_each_alone(kind: str) -> None:
    model, inputs = tiny(kind), batch(kind)
    adapters = graft(model, BottleneckConfig(placement="parallel"), "a")
    adapters.add("b", BottleneckConfig(placement="houlsby"))
    for seed, name in enumerate(("a", "b")):
        stir(adapters, name, seed=seed, size=1.0)
    alone = {}
    for name in ("a", "b"):
        with adapters.activated(name):
            alone[name] = logits(model, inputs)
    with adapters.disabled():
        alone[""] = logits(model, inputs)
    with adapters.routed(["b", None, "a"]):
        rows = logits(model, inputs)
    for row, name in enumerate(("b", "", "a")):
        torch.testing.assert_close(rows[row], alone[name][row], rtol=0, atol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    model, inputs = tiny("llama"), batch("llama")
    adapters = graft(model, BottleneckConfig(dropout=0.5))
    stir(adapters, size=1.0)
    assert torch.equal(logits(model, inputs), logits(model, inputs))
    model.train()
    assert not torch.equal(logits(model, inputs), logits(model, inputs))


def test_parameters_are_float32_and_the_output_has_the_bases_dtype() -> None:
    model, inputs = tiny("llama").bfloat16(), batch("llama")
    adapters = graft(model, BottleneckConfig(placement="houlsby", scaling="learned"))
    stir(adapters)
    assert {p.dtype for p in adapters.parameters("default")} == {torch.float32}
    output = model(**inputs)
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapters.parameters("default"))
