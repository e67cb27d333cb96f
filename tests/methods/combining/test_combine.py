"""Combination of adapters: the change of every weight is the weighted sum, or the reason is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graftlm.core.errors import AdapterError, ConfigError, GraftError
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.base import MethodConfig
from graftlm.methods.bottleneck import BottleneckConfig
from graftlm.methods.combining.combine import COMBINERS, combine
from graftlm.methods.combining.mixing import Mixing
from graftlm.methods.full import FullConfig
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lora import LoraConfig
from graftlm.methods.table import METHODS
from graftlm.methods.tokens import TrainableTokensConfig
from graftlm.quant.weights import WeightHandle

from ..tiny import batch, graft, logits, snapshot, stir, tiny

LLAMA = ("q_proj", "v_proj", "down_proj")


def several(
    kind: str, *configs: MethodConfig, dtype: torch.dtype = torch.float64, size: float = 0.3
) -> AdapterSet:
    """A tiny model with adapters a, b, ... that all change it."""
    adapters = graft(tiny(kind).to(dtype), configs[0], "a", dtype="base")
    for name, config in zip("bcdefg", configs[1:], strict=False):
        adapters.add(name, config, dtype="base")
    for seed, name in enumerate(adapters.names):
        stir(adapters, name, seed=seed, size=size)
    return adapters


@torch.no_grad()
def changes(adapters: AdapterSet, name: str) -> dict[str, Tensor]:
    """What merging an adapter would add to each parameter of the base."""
    found = {}
    for path, part in adapters.parts(name).items():
        dense = WeightHandle(adapters.model.get_submodule(path).get_submodule("base_layer")).read()
        for key, value in part.merged(dense).items():
            found[f"{path}.{key}"] = value - dense[key]
    return found


def weighted(adapters: AdapterSet, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The definition: the sum of weight * change, where nothing is a change of zero."""
    total: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for key, change in changes(adapters, name).items():
            total[key] = total.get(key, torch.zeros_like(change)) + weight * change
    return total


def assert_same(ours: Mapping[str, Tensor], exact: Mapping[str, Tensor], tolerance: float = 1e-10) -> None:
    assert ours.keys() == exact.keys()
    for key in exact:
        torch.testing.assert_close(ours[key], exact[key], rtol=tolerance, atol=tolerance)


# LoRA: exact sums.

numbers = st.floats(-2, 2).filter(lambda weight: abs(weight) > 1e-3)
targets = st.sampled_from(
    [("q_proj",), ("q_proj", "v_proj"), ("mlp",), "all-linear", ("embed_tokens", "o_proj"), ("lm_head",)]
)


@st.composite
def lora_configs(draw: st.DrawFn) -> LoraConfig:
    chosen = draw(targets)
    has_inner = "embed_tokens" not in chosen and "lm_head" not in chosen
    rank = st.integers(1, 6)
    return LoraConfig(
        r=draw(rank),
        lora_alpha=draw(st.integers(1, 20)),
        use_rslora=draw(st.booleans()),
        target_modules=chosen,
        rank_pattern=draw(st.sampled_from([{}, {r".*layers\.1\..*": draw(rank)}])) if has_inner else {},
        alpha_pattern=draw(st.sampled_from([{}, {r"0\..*proj": draw(st.floats(0.5, 9))}]))
        if has_inner
        else {},
        init_lora_weights=draw(st.sampled_from([True, "gaussian", "olora", "pissa"])) if has_inner else True,
    )


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(lora_configs(), numbers), min_size=1, max_size=3), st.sampled_from(["linear", "cat"])
)
def test_a_sum_of_loras_is_exact(terms: list[tuple[LoraConfig, float]], how: str) -> None:
    adapters = several("llama", *(config for config, _ in terms))
    weights = {name: weight for name, (_, weight) in zip(adapters.names, terms, strict=True)}
    exact = weighted(adapters, weights)
    found = combine(adapters, weights, "sum", how=how)
    assert_same(changes(adapters, "sum"), exact)
    assert (found.kept, found.lowest_at) == (1.0, "")
    assert adapters.active == ("a",) and "sum" not in adapters.trainable


BERT: list[dict[str, Any]] = [
    {"target_modules": ("query",), "bias": "all", "modules_to_save": ("classifier",)},
    {"target_modules": ("query", "value"), "bias": "all"},
    {"target_modules": ("value",), "bias": "lora_only"},
    {"target_modules": ("output.dense",), "bias": "lora_only", "modules_to_save": ("classifier",)},
    {"target_modules": ("query",), "bias": "all", "r": 2},
]


@pytest.mark.parametrize("pair", [(0, 1), (0, 4), (2, 3), (0, 3), (1, 2)])
@pytest.mark.parametrize("weights", [(0.7, -0.4), (0.25, 0.75), (2.0, 1.0)])
def test_biases_and_copies_are_summed_as_changes(pair: tuple[int, int], weights: tuple[float, float]) -> None:
    adapters = several("bert", *(LoraConfig(**{"r": 3, **BERT[index]}) for index in pair))
    named = dict(zip("ab", weights, strict=True))
    exact = weighted(adapters, named)
    combine(adapters, named, "sum")
    assert_same(changes(adapters, "sum"), exact)


@pytest.mark.parametrize("kind", ["gpt2", "t5", "gemma3"])
def test_on_other_models(kind: str) -> None:
    adapters = several(kind, LoraConfig(r=3), LoraConfig(r=2, use_rslora=True, target_modules="attention"))
    weights = {"a": 0.6, "b": -1.5}
    exact = weighted(adapters, weights)
    combine(adapters, weights, "sum")
    assert_same(changes(adapters, "sum"), exact)


def test_the_outputs_are_those_of_the_merged_sum() -> None:
    adapters = several("llama", LoraConfig(r=4), LoraConfig(r=2, use_rslora=True), dtype=torch.float32)
    combine(adapters, {"a": 1.0, "b": 1.0}, "sum")
    adapters.activate(["a", "b"])
    expected = logits(adapters.model, batch("llama"))
    adapters.activate("sum")
    torch.testing.assert_close(logits(adapters.model, batch("llama")), expected, rtol=1e-4, atol=2e-5)


def test_merged_adapters_and_routes_do_not_matter() -> None:
    adapters = several("bert", *(LoraConfig(r=2, **BERT[index]) for index in (0, 1)))
    exact = weighted(adapters, {"a": 1.0, "b": 1.0})
    adapters.merge("a")
    combine(adapters, {"a": 1.0, "b": 1.0}, "sum")
    adapters.unmerge()
    assert_same(changes(adapters, "sum"), exact)


def test_ranks_are_uniform_where_they_can_be() -> None:
    adapters = several("llama", LoraConfig(r=4, target_modules=LLAMA), LoraConfig(r=2, target_modules=LLAMA))
    combine(adapters, {"a": 1.0, "b": 1.0}, "sum")
    config = adapters.config("sum")
    assert isinstance(config, LoraConfig)
    assert (config.r, config.scaling, config.target_modules) == (6, 1.0, LLAMA)
    adapters.add("some", LoraConfig(r=3, target_modules=("q_proj",)), dtype="base")
    stir(adapters, "some")
    combine(adapters, {"a": 1.0, "some": 1.0}, "mixed")
    config = adapters.config("mixed")
    assert isinstance(config, LoraConfig) and config.r == 4
    assert set(config.rank_pattern.values()) == {7} and all("q_proj" in path for path in config.rank_pattern)


@pytest.mark.parametrize("weights", [(0.7, -0.4), (0.25, 0.75)])
@pytest.mark.parametrize(
    ("kind", "configs"),
    [
        ("gpt2", (LoraConfig(r=2, lora_bias=True), LoraConfig(r=3, target_modules="attention"))),
        (
            "gpt2",
            (LoraConfig(r=2, lora_bias=True, use_rslora=True), LoraConfig(r=3, lora_bias=True, bias="all")),
        ),
        ("llama", (LoraConfig(r=2, trainable_token_indices=(3, 7)), LoraConfig(r=2))),
        (
            "llama",
            (
                LoraConfig(r=2, trainable_token_indices=(3, 7)),
                LoraConfig(r=2, trainable_token_indices=(1, 7)),
            ),
        ),
        (
            "llama",
            (
                LoraConfig(r=2, trainable_token_indices={"embed_tokens": (3, 7), "lm_head": (4,)}),
                LoraConfig(r=2, trainable_token_indices=(7, 3)),
            ),
        ),
        (
            "llama-tied",
            (TrainableTokensConfig(token_indices=(3, 7)), TrainableTokensConfig(token_indices=(7, 3))),
        ),
        (
            "llama-tied",
            (TrainableTokensConfig(token_indices=(3, 7)), TrainableTokensConfig(token_indices=(9,))),
        ),
    ],
)
def test_variants_of_lora_and_token_rows_are_summed_as_changes(
    kind: str, configs: Sequence[MethodConfig], weights: tuple[float, float]
) -> None:
    adapters = several(kind, *configs)
    named = dict(zip("ab", weights, strict=True))
    exact = weighted(adapters, named)
    combine(adapters, named, "sum")
    assert_same(changes(adapters, "sum"), exact)


# Cuts of the rank.


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.sampled_from(["linear", "svd"]), numbers)
def test_a_cut_is_the_best_and_says_what_it_keeps(
    rank: int, one: int, two: int, how: str, weight: float
) -> None:
    rank = min(rank, one + two)
    adapters = several(
        "llama", LoraConfig(r=one, target_modules=LLAMA), LoraConfig(r=two, target_modules=LLAMA)
    )
    exact = weighted(adapters, {"a": 1.0, "b": weight})
    found = combine(adapters, {"a": 1.0, "b": weight}, "cut", how=how, rank=rank)
    best, kept, total, shares = {}, 0.0, 0.0, []
    for key, change in exact.items():
        u, values, v = torch.linalg.svd(change, full_matrices=False)
        best[key] = (u[:, :rank] * values[:rank]) @ v[:rank]
        kept, total = kept + float(best[key].square().sum()), total + float(change.square().sum())
        shares.append(float(best[key].square().sum() / change.square().sum()))
    assert_same(changes(adapters, "cut"), best, 1e-9)
    assert found.kept == pytest.approx(kept / total, rel=1e-9)
    assert found.lowest_kept == pytest.approx(min(shares), rel=1e-9)
    config = adapters.config("cut")
    assert isinstance(config, LoraConfig) and (config.r, config.scaling) == (rank, 1.0)


def test_svd_cuts_to_the_largest_rank_of_the_terms() -> None:
    adapters = several("llama", LoraConfig(r=5, target_modules=LLAMA), LoraConfig(r=2, target_modules=LLAMA))
    found = combine(adapters, {"a": 1.0, "b": 1.0}, "cut", how="svd")
    config = adapters.config("cut")
    assert isinstance(config, LoraConfig) and config.r == 5 and 0 < found.kept < 1 and found.lowest_at


def test_what_is_kept_counts_layers_that_are_not_cut() -> None:
    adapters = several(
        "llama", LoraConfig(r=3, target_modules=LLAMA), LoraConfig(r=3, target_modules=("q_proj",))
    )
    weights = {"a": 1.0, "b": 1.0}
    exact = weighted(adapters, weights)
    found = combine(adapters, weights, "cut", rank=4)
    kept = sum(float(change.square().sum()) for change in changes(adapters, "cut").values())
    total = sum(float(change.square().sum()) for change in exact.values())
    assert found.kept == pytest.approx(kept / total, rel=1e-9)
    assert found.lowest_kept < found.kept < 1 and found.lowest_at.endswith("q_proj")


# Sparse ways.


@pytest.mark.parametrize("how", ["ties", "dare", "magnitude"])
def test_sparse_ways_work_on_the_dense_change(how: Any) -> None:
    adapters = several("llama", LoraConfig(r=4, target_modules=LLAMA), LoraConfig(r=3, target_modules=LLAMA))
    weights = {"a": 1.0, "b": -0.5}
    mixing = Mixing(how=how, density=0.6)
    parts = [changes(adapters, name) for name in weights]
    exact = {
        key: mixing.mix(list(weights.values()), [part[key] for part in parts], number)
        for number, key in enumerate(sorted(parts[0]))
    }
    combine(adapters, weights, "all", how=how, density=0.6, rank=32)
    assert_same(changes(adapters, "all"), exact, 1e-9)
    found = combine(adapters, weights, "cut", how=how, density=0.6)
    config = adapters.config("cut")
    assert isinstance(config, LoraConfig) and config.r == 7
    kept = sum(float(change.square().sum()) for change in changes(adapters, "cut").values())
    total = sum(float(change.square().sum()) for change in exact.values())
    assert found.kept == pytest.approx(kept / total, rel=1e-9) and found.kept < 1


def test_dare_repeats_with_its_seed() -> None:
    adapters = several("llama", LoraConfig(r=4, target_modules=LLAMA), LoraConfig(r=3, target_modules=LLAMA))
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        combine(adapters, {"a": 1.0, "b": 1.0}, name, how="dare", density=0.5, seed=seed)
    one, again, other = (changes(adapters, name) for name in ("one", "again", "other"))
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


# One adapter is itself.

ALONE: list[tuple[str, MethodConfig]] = [
    ("llama", LoraConfig(r=3, lora_alpha=7)),
    ("llama", LoraConfig(r=3, lora_alpha=7, use_rslora=True, lora_dropout=0.1)),
    ("llama", LoraConfig(r=2, target_modules=("embed_tokens", "lm_head"))),
    ("bert", LoraConfig(r=2, bias="all", modules_to_save=("classifier",))),
    ("gpt2", LoraConfig(r=2, bias="lora_only")),
    ("gpt2", LoraConfig(r=2, lora_bias=True)),
    ("llama", LoraConfig(r=2, rank_pattern={"q_proj": 4}, alpha_pattern={"0.mlp.up_proj": 3})),
    ("llama", LoraConfig(r=2, trainable_token_indices=[3, 7])),
    ("llama", LoraConfig(r=3, use_dora=True)),
    ("llama", LoraConfig(r=3, use_dora=True, target_modules=("embed_tokens",))),
    ("llama-tied", TrainableTokensConfig(token_indices=[5, 2])),
    ("llama", BottleneckConfig()),
    ("llama", IA3Config()),
    ("bert", IA3Config(modules_to_save=("classifier",))),
    ("bert", FullConfig()),
    ("bert", FullConfig(parts="biases")),
    ("llama", FullConfig(parts="norms")),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("kind", "config"), ALONE)
def test_one_with_weight_1_is_itself(kind: str, config: MethodConfig, dtype: torch.dtype) -> None:
    adapters = several(kind, config, config, dtype=dtype)
    for name, weights in (("c", {"a": 1.0}), ("d", {"a": 1.0, "b": 0.0})):
        combine(adapters, weights, name)
        assert adapters.config(name) == adapters.config("a")
        before, after = adapters.named_parameters("a"), adapters.named_parameters(name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert all(before[key] is not after[key] for key in before)


@pytest.mark.parametrize("how", ["linear", "cat", "svd", "ties", "dare", "magnitude"])
def test_one_with_weight_1_is_itself_by_every_way(how: str) -> None:
    adapters = several("llama", LoraConfig(r=3, use_rslora=True))
    density: dict[str, Any] = {"density": 1.0} if how in ("ties", "dare", "magnitude") else {}
    combine(adapters, {"a": 1.0}, "b", how=how, **density)
    before, after = adapters.named_parameters("a"), adapters.named_parameters("b")
    assert all(torch.equal(before[key], after[key]) for key in before)


# (IA)^3 and tuned parameters.


@pytest.mark.parametrize("weights", [(0.7, -0.4), (0.25, 0.75), (2.0, 1.0)])
@pytest.mark.parametrize(
    ("kind", "configs"),
    [
        (
            "llama",
            (
                IA3Config(),
                IA3Config(target_modules=("q_proj", "down_proj"), feedforward_modules=("down_proj",)),
            ),
        ),
        ("bert", (IA3Config(modules_to_save=("classifier",)), IA3Config())),
        ("bert", (FullConfig(), FullConfig())),
        ("gpt2", (FullConfig(parts="biases"), FullConfig(parts="biases"))),
        ("llama", (FullConfig(parts="norms"), FullConfig(parts="norms"))),
    ],
)
def test_other_methods_are_summed_as_changes(
    kind: str, configs: Sequence[MethodConfig], weights: tuple[float, float]
) -> None:
    adapters = several(kind, *configs)
    named = dict(zip("ab", weights, strict=True))
    exact = weighted(adapters, named)
    combine(adapters, named, "sum")
    assert_same(changes(adapters, "sum"), exact, 1e-6 if isinstance(configs[0], FullConfig) else 1e-10)


def test_factors_with_weights_that_add_up_to_1_are_interpolated() -> None:
    adapters = several("llama", IA3Config(), IA3Config())
    combine(adapters, {"a": 0.3, "b": 0.7}, "c")
    a, b, c = (adapters.named_parameters(name) for name in "abc")
    for key in c:
        torch.testing.assert_close(c[key], 0.3 * a[key] + 0.7 * b[key], rtol=1e-12, atol=1e-12)


# Refusals, with nothing changed.


def refused(adapters: AdapterSet, weights: Mapping[str, float], words: str, **options: Any) -> GraftError:
    unchanged, names = snapshot(adapters.model), adapters.names
    with pytest.raises(GraftError, match=words) as error:
        combine(adapters, weights, options.pop("name", "new"), **options)
    unchanged()
    assert adapters.names == names
    return error.value


def test_wrong_requests_are_refused() -> None:
    adapters = several("llama", LoraConfig(r=3, target_modules=LLAMA), LoraConfig(r=2, target_modules=LLAMA))
    both = {"a": 1.0, "b": 1.0}
    refused(adapters, both, "'b' exists already", name="b")
    refused(adapters, both, "cannot be the name", name="../b")
    refused(adapters, {"a": 1.0, "z": 1.0}, "no adapter named 'z'")
    refused(adapters, {}, "No adapters")
    refused(adapters, {"a": float("nan")}, "(?s)no numbers.*a: nan")
    refused(adapters, both, "did you mean 'ties'", how="tie")
    refused(adapters, both, "density", how="ties", density=0)
    refused(adapters, both, r"rank=6 is more than the sum of the ranks \(5\)", rank=6)
    refused(
        adapters,
        both,
        r"rank=49 is more than the smaller side of the largest layer \(32\)",
        how="ties",
        rank=49,
    )
    assert isinstance(refused(adapters, both, "rank=6", rank=6), ConfigError)


def test_methods_do_not_mix() -> None:
    adapters = several("llama", LoraConfig(r=3), IA3Config())
    error = refused(adapters, {"a": 1.0, "b": 1.0}, "different methods")
    assert isinstance(error, AdapterError) and error.problems == ("a: LORA", "b: IA3")


def test_what_has_no_rank_is_not_cut() -> None:
    adapters = several("llama", IA3Config(), IA3Config())
    refused(adapters, {"a": 1.0, "b": 1.0}, "rank has no meaning", rank=2)
    refused(adapters, {"a": 1.0, "b": 1.0}, "svd has no meaning", how="svd")


def test_a_change_inside_a_copy_is_refused() -> None:
    adapters = graft(tiny("llama"), LoraConfig(r=2, target_modules=("lm_head",)), "a")
    adapters.add("b", LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("lm_head",)))
    refused(adapters, {"a": 1.0, "b": 1.0}, "(?s)copies a module.*a adapts lm_head, b has a copy of lm_head")


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 0.5}, {"a": 1.0, "c": 1.0}])
def test_dora_is_combined_only_alone(weights: dict[str, float]) -> None:
    dora = LoraConfig(r=2, target_modules=LLAMA, use_dora=True)
    adapters = several("llama", dora, dora, LoraConfig(r=2, target_modules=LLAMA))
    refused(adapters, weights, "(?s)a.*: a DoRA can be combined only alone, with weight 1.*rescales")


def test_updates_of_stacked_experts_are_combined_only_alone() -> None:
    stacked = LoraConfig(r=2, target_modules=(), target_parameters=("q_proj.weight",))
    adapters = several("llama", stacked, stacked)
    refused(adapters, {"a": 1.0, "b": 1.0}, "target_parameters can be combined only alone")
    combine(adapters, {"a": 1.0}, "c")
    a, c = adapters.named_parameters("a"), adapters.named_parameters("c")
    assert all(torch.equal(a[key], c[key]) for key in a)


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 0.5}])
def test_what_is_not_linear_in_its_parameters_is_combined_only_alone(weights: dict[str, float]) -> None:
    adapters = several("llama", BottleneckConfig(), BottleneckConfig())
    refused(adapters, weights, "BOTTLENECK can be combined only alone, with weight 1")


def test_biases_of_some_layers_only_are_refused() -> None:
    adapters = several(
        "bert",
        LoraConfig(r=2, target_modules=("query",), bias="lora_only"),
        LoraConfig(r=2, target_modules=("value",)),
    )
    refused(adapters, {"a": 1.0, "b": 1.0}, "(?s)train the biases.*no trained bias: bert.*value")


def test_full_tuning_of_different_parts_is_refused() -> None:
    adapters = several("bert", FullConfig(parts="biases"), FullConfig(parts="norms"))
    refused(adapters, {"a": 1.0, "b": 1.0}, "tune different parameters")


def test_every_method_has_a_sum_or_says_why_not() -> None:
    assert set(COMBINERS) <= set(METHODS.values())
