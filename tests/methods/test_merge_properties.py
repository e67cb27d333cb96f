"""Properties of merging that hold for every mergeable method, whatever the ranks, dtypes and order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graftlm.core.errors import MergeError
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.base import MethodConfig
from graftlm.methods.full import FullConfig
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lora import LoraConfig
from graftlm.methods.site import Site
from graftlm.methods.tokens import TrainableTokensConfig
from graftlm.quant.weights import WeightHandle

from .tiny import batch, graft, logits, snapshot, stir, tiny

pytestmark = pytest.mark.filterwarnings("ignore:Merging unties the embeddings:UserWarning")

# A new method that can be merged is one line here: the kind of model and the config.
MERGEABLE: dict[str, tuple[str, MethodConfig]] = {
    "lora": ("llama", LoraConfig(r=3, lora_alpha=5)),
    "rslora": ("gpt2", LoraConfig(r=2, use_rslora=True)),
    "pissa": ("llama", LoraConfig(r=2, init_lora_weights="pissa")),
    "dora": ("llama", LoraConfig(r=2, use_dora=True)),
    "dora, conv1d": ("gpt2", LoraConfig(r=2, use_dora=True)),
    "lora_bias": ("gpt2", LoraConfig(r=2, lora_bias=True)),
    "biases": ("bert", LoraConfig(r=2, bias="all")),
    "embeddings": ("llama-tied", LoraConfig(r=2, target_modules=("embed_tokens", "lm_head"))),
    "dora embedding": ("llama", LoraConfig(r=2, use_dora=True, target_modules=("embed_tokens",))),
    "copies": ("bert", LoraConfig(r=2, modules_to_save=("classifier",))),
    "token rows": ("llama-tied", TrainableTokensConfig(token_indices=(3, 7))),
    "nested rows": ("llama", LoraConfig(r=2, trainable_token_indices=(3, 7))),
    "parameters": ("llama", LoraConfig(r=2, target_modules=(), target_parameters=("q_proj.weight",))),
    "ia3": ("gpt2", IA3Config()),
    "ia3, llama": ("llama", IA3Config()),
    "full": ("bert", FullConfig()),
    "full, tied": ("llama-tied", FullConfig()),
    "biases only": ("gpt2", FullConfig(parts="biases")),
    "norms only": ("llama", FullConfig(parts="norms")),
}
every_method = pytest.mark.parametrize("method", MERGEABLE)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def several(
    kind: str, *configs: MethodConfig, dtype: torch.dtype = torch.float64, seed: int = 0
) -> AdapterSet:
    """A tiny model with adapters a, b, ... that all change it; none is active."""
    kept: Any = "base" if dtype == torch.float64 else "float32"
    adapters = graft(tiny(kind).to(dtype), configs[0], "a", dtype=kept)
    for name, config in zip("bcd", configs[1:], strict=False):
        adapters.add(name, config, dtype=kept)
    for number, name in enumerate(adapters.names):
        stir(adapters, name, seed=seed + number, size=0.2)
    adapters.activate([])
    return adapters


def sites(model: nn.Module) -> dict[str, Site]:
    return {path: module for path, module in model.named_modules() if isinstance(module, Site)}


@torch.no_grad()
def merged_by_hand(adapters: AdapterSet, names: Sequence[str]) -> dict[str, Tensor]:
    """Base plus the change of each adapter, in float32 or better, rounded once."""
    found = {}
    for path, site in sites(adapters.model).items():
        dense = WeightHandle(site.base_layer).read()
        own = [site.adapter(name).merged(dense) for name in names if site.has(name)]
        for key in dict.fromkeys(key for changed in own for key in changed):
            first, *others = [changed[key] for changed in own if key in changed]
            total = first + sum(value - dense[key] for value in others)
            found[f"{path}.{key}"] = total.to(site.base_layer.get_parameter(key).dtype)
    return found


def now(adapters: AdapterSet, keys: Sequence[str]) -> dict[str, Tensor]:
    """The base's parameters as they are, `weight` as [out, in]."""
    found = {}
    for path, site in sites(adapters.model).items():
        handle = WeightHandle(site.base_layer)
        for key, parameter in site.base_layer.named_parameters():
            if f"{path}.{key}" in keys:
                oriented = parameter.t() if handle.is_transposed and key == "weight" else parameter
                found[f"{path}.{key}"] = oriented.detach()
    return found


# One adapter.


@every_method
@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_is_the_change_rounded_once_and_unmerging_is_exact(method: str, dtype: torch.dtype) -> None:
    kind, config = MERGEABLE[method]
    adapters = several(kind, config, dtype=dtype)
    model, inputs, unchanged = adapters.model, batch(kind), snapshot(adapters.model)
    adapters.activate("a")
    expected, by_hand = logits(model, inputs), merged_by_hand(adapters, ["a"])
    adapters.merge()
    merged = now(adapters, list(by_hand))
    for key, value in by_hand.items():
        torch.testing.assert_close(
            merged[key], value, rtol=1e-6 if dtype != torch.float64 else 1e-12, atol=1e-30
        )
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 0.1)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=tolerance, atol=tolerance)
    adapters.unmerge()
    assert torch.equal(logits(model, inputs), expected)
    adapters.activate([])
    unchanged()


@every_method
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_whole_and_by_name(method: str, poison: float) -> None:
    kind, config = MERGEABLE[method]
    adapters = several(kind, config, config, dtype=torch.bfloat16)
    adapters.merge("a")
    with torch.no_grad():
        list(adapters.parameters("b"))[-1].view(-1)[-1] = poison
    unchanged, state = snapshot_of_bases(adapters), adapters._state
    with pytest.raises(MergeError, match="'b'"):
        adapters.merge("b")
    unchanged()
    assert adapters._state == state


def snapshot_of_bases(adapters: AdapterSet) -> Any:
    """A function that asserts that the sites hold the same parameter objects, and the same originals."""
    before = [
        (s, dict(s.base_layer.named_parameters()), dict(s.originals)) for s in sites(adapters.model).values()
    ]

    def check() -> None:
        for site, parameters, originals in before:
            found = dict(site.base_layer.named_parameters())
            assert found.keys() == parameters.keys() and site.originals.keys() == originals.keys()
            assert all(found[key] is parameters[key] for key in parameters)
            assert all(site.originals[key] is originals[key] for key in originals)

    return check


@every_method
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_packed_layer_at_the_end_leaves_all_the_others_alone(method: str, dtype: torch.dtype) -> None:
    kind, config = MERGEABLE[method]
    adapters = several(kind, config, dtype=torch.float32)
    last = list(sites(adapters.model).values())[-1].base_layer
    key = [key for key, _ in last.named_parameters()][-1]
    owner, _, leaf = key.rpartition(".")
    packed = nn.Parameter(last.get_parameter(key).detach().to(dtype), requires_grad=False)
    setattr(last.get_submodule(owner), leaf, packed)
    unchanged = snapshot_of_bases(adapters)
    with pytest.raises(MergeError, match="bfloat16"):
        adapters.merge("a")
    unchanged()
    assert adapters.merged == ()


# Several adapters, any order.

names = st.lists(st.sampled_from("abc"), unique=True)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("merge"), names),
        st.tuples(st.just("unmerge"), names),
        st.tuples(st.just("activate"), names),
    ),
    min_size=1,
    max_size=6,
)
TRIPLES: dict[str, tuple[str, tuple[MethodConfig, ...]]] = {
    "loras": (
        "llama",
        (
            LoraConfig(r=3, lora_alpha=5),
            LoraConfig(r=1, use_rslora=True, target_modules="attention"),
            LoraConfig(r=2, target_modules=("lm_head", "q_proj", "embed_tokens")),
        ),
    ),
    "biases and a copy": (
        "bert",
        (
            LoraConfig(r=2, bias="all"),
            LoraConfig(r=2, target_modules=("value",), bias="lora_only"),
            LoraConfig(r=2, modules_to_save=("classifier",)),
        ),
    ),
    "not additive": (
        "llama",
        (LoraConfig(r=2, use_dora=True), IA3Config(), LoraConfig(r=2, use_dora=True, target_modules="mlp")),
    ),
    "mixed": (
        "gpt2",
        (LoraConfig(r=2, lora_bias=True), IA3Config(), LoraConfig(r=2, use_dora=True, bias="lora_only")),
    ),
    "parameters": (
        "llama",
        (
            LoraConfig(r=2, target_modules=(), target_parameters=("q_proj.weight", "down_proj.weight")),
            LoraConfig(r=2, use_dora=True),
            LoraConfig(r=1, target_modules=(), target_parameters=("q_proj.weight",)),
        ),
    ),
    "tuned": ("llama", (FullConfig(parts="norms"), LoraConfig(r=2), FullConfig(parts="norms"))),
}


@pytest.mark.parametrize("triple", TRIPLES)
@settings(max_examples=8, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(steps)
def test_what_acts_is_what_is_merged_or_active(triple: str, steps: list[tuple[str, list[str]]]) -> None:
    """Whatever was done before, the outputs are those of the sum of the adapters that act."""
    kind, configs = TRIPLES[triple]
    adapters, twin = several(kind, *configs), several(kind, *configs)
    inputs, unchanged = batch(kind, rows=2, length=5), snapshot(adapters.model)
    merged: list[str] = []
    for step, chosen in steps:
        if step == "activate":
            adapters.activate(chosen)
        elif step == "merge":
            chosen = [name for name in chosen if name not in merged]
            merged += chosen
            adapters.merge(chosen)
        else:
            merged = [name for name in merged if name not in chosen]
            adapters.unmerge(chosen)
        assert set(adapters.merged) == set(merged)
        acting = set(merged) | set(adapters.active)
        twin.activate(sorted(acting))
        close(logits(adapters.model, inputs), logits(twin.model, inputs))
        with adapters.disabled():
            twin.activate(sorted(merged))
            close(logits(adapters.model, inputs), logits(twin.model, inputs))
        assert set(adapters.merged) == set(merged), "disabling leaves the merge alone"
    adapters.unmerge()
    adapters.activate([])
    unchanged()


def close(ours: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


@st.composite
def loras(draw: st.DrawFn) -> LoraConfig:
    use_dora = draw(st.booleans())
    return LoraConfig(
        r=draw(st.integers(1, 8)),
        lora_alpha=draw(st.floats(0.25, 16)),
        use_rslora=draw(st.booleans()),
        use_dora=use_dora,
        lora_bias=draw(st.booleans()) and not use_dora,
        bias=draw(st.sampled_from(["none", "lora_only", "all"])),
        target_modules=draw(st.sampled_from(["attention", "mlp", "all-linear"])),
    )


@settings(max_examples=15, deadline=None)
@given(st.lists(loras(), min_size=1, max_size=3), st.sampled_from(DTYPES), st.integers(0, 99), st.randoms())
def test_random_adapters_in_any_order(
    configs: list[LoraConfig], dtype: torch.dtype, seed: int, random: Any
) -> None:
    """Merged one after the other in any order: the sum, rounded once; then byte-exact again."""
    adapters = several("gpt2", *configs, dtype=dtype, seed=seed)
    unchanged = snapshot(adapters.model)
    by_hand = merged_by_hand(adapters, adapters.names)
    order = list(adapters.names)
    random.shuffle(order)
    for name in order:
        adapters.merge(name)
    found = now(adapters, list(by_hand))
    step = max(torch.finfo(dtype).eps, 1e-6 if dtype != torch.float64 else 0)
    for key, value in by_hand.items():
        torch.testing.assert_close(found[key], value, rtol=2 * step, atol=step)
    for name in random.sample(order, len(order)):
        adapters.unmerge(name)
    unchanged()


# Cycles.


@every_method
def test_cycles_with_a_changing_adapter_leave_the_base_its_bytes(method: str) -> None:
    kind, config = MERGEABLE[method]
    adapters = several(kind, config, dtype=torch.bfloat16)
    unchanged = snapshot_of_base_bytes(adapters)
    for cycle in range(5):
        stir(adapters, "a", seed=cycle, size=0.05)
        adapters.merge("a")
        adapters.unmerge()
    unchanged()


def test_a_thousand_cycles_leave_the_base_its_bytes() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(torch.bfloat16)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    adapters = graft(model, LoraConfig(r=2, target_modules=("0", "2"), bias="all"), "a")
    for cycle in range(1000):
        stir(adapters, "a", seed=cycle, size=0.02)
        adapters.merge("a")
        adapters.unmerge()
    adapters.detach()
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())


def snapshot_of_base_bytes(adapters: AdapterSet) -> Any:
    """A function that asserts that the base's parameters have the same bytes; the adapters may change."""
    before = [
        (p, p.detach().clone()) for s in sites(adapters.model).values() for p in s.base_layer.parameters()
    ]

    def check() -> None:
        now_held = {id(p) for s in sites(adapters.model).values() for p in s.base_layer.parameters()}
        for parameter, value in before:
            assert id(parameter) in now_held and torch.equal(parameter, value)

    return check
