"""Sums of sparsified changes against their definitions, and against PEFT's where the two agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils
from torch import Tensor

from graftlm.core.errors import ConfigError
from graftlm.methods.combining.mixing import Mixing, dropped, largest

densities = st.floats(0.05, 0.95)
positive = st.lists(st.floats(0.1, 3), min_size=1, max_size=4)
signed = st.lists(st.floats(-3, 3).filter(lambda weight: abs(weight) > 1e-3), min_size=1, max_size=4)
signs = st.sampled_from(["total", "frequency"])


def changes(count: int, shape: tuple[int, ...] = (7, 5)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def trimmed(change: Tensor, density: float) -> Tensor:
    """Entries by size, one by one."""
    order = sorted(range(change.numel()), key=lambda i: -abs(float(change.reshape(-1)[i])))
    kept = set(order[: max(1, int(density * change.numel()))])
    return torch.tensor([float(v) if i in kept else 0.0 for i, v in enumerate(change.reshape(-1))],
                        dtype=change.dtype).view_as(change)  # fmt: skip


def ties(weights: list[float], terms: list[Tensor], majority_sign: str) -> Tensor:
    """The definition, one entry at a time."""
    out = torch.zeros_like(terms[0]).reshape(-1)
    for i in range(out.numel()):
        values = [float(term.reshape(-1)[i]) for term in terms]
        turned = [v if w > 0 else -v for w, v in zip(weights, values, strict=True)]
        ballot = turned if majority_sign == "total" else [(v > 0) - (v < 0) for v in turned]
        elected = 1 if sum(ballot) >= 0 else -1
        agree = [w * v for w, v, t in zip(weights, values, turned, strict=True) if t * elected > 0]
        out[i] = sum(agree) / max(1, len(agree))
    return out.view_as(terms[0])


@settings(max_examples=40, deadline=None)
@given(signed, densities, signs)
def test_ties_is_its_definition(weights: list[float], density: float, majority_sign: Any) -> None:
    terms = changes(len(weights))
    found = Mixing(how="ties", density=density, majority_sign=majority_sign).mix(weights, terms)
    exact = ties(weights, [trimmed(term, density) for term in terms], majority_sign)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(positive, densities, signs)
def test_positive_weights_give_what_peft_gives_for_dense_changes(
    weights: list[float], density: float, majority_sign: Any
) -> None:
    terms, tensor = changes(len(weights)), torch.tensor(weights, dtype=torch.float64)
    ours = Mixing(how="ties", density=density, majority_sign=majority_sign).mix(weights, terms)
    theirs = merge_utils.ties(terms, tensor, density, majority_sign)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    ours = Mixing(how="magnitude", density=density).mix(weights, terms)
    torch.testing.assert_close(
        ours, merge_utils.magnitude_prune(terms, tensor, density), rtol=1e-12, atol=1e-12
    )


@settings(max_examples=30, deadline=None)
@given(signed, densities)
def test_magnitude_is_the_sum_of_what_is_large(weights: list[float], density: float) -> None:
    terms = changes(len(weights))
    found = Mixing(how="magnitude", density=density).mix(weights, terms)
    exact = sum((w * trimmed(t, density) for w, t in zip(weights, terms, strict=True)), torch.zeros(()))
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["linear", "ties", "dare", "magnitude"])
def test_one_change_at_full_density_is_itself(how: Any) -> None:
    (change,) = changes(1)
    density = {} if how == "linear" else {"density": 1.0}
    assert torch.equal(Mixing(how=how, **density).mix([1.0], [change]), change)


def test_dare_drops_rescales_and_repeats() -> None:
    change = torch.ones(200, 100)
    kept = dropped(change, 0.25, torch.Generator().manual_seed(1))
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    assert kept.mean() == pytest.approx(1.0, abs=0.04)  # 5 standard deviations
    dare = Mixing(how="dare", density=0.25, seed=3)
    first = dare.mix([1.0, 2.0], [change, change])
    assert torch.equal(first, dare.mix([1.0, 2.0], [change, change]))
    assert not torch.equal(first, dare.mix([1.0, 2.0], [change, change], place=1))
    assert not torch.equal(first, dare.replace(seed=4).mix([1.0, 2.0], [change, change]))
    assert set(first.unique().tolist()) == {0.0, 4.0, 8.0, 12.0}, "each has drops of its own"


def test_at_least_one_entry_stays() -> None:
    assert largest(torch.tensor([1.0, -2.0]), 0.01).tolist() == [0.0, -2.0]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"how": "lineer"}, "did you mean 'linear'"),
    ({"how": "slerp"}, "must be one of linear, cat, svd"),
    ({"how": "ties", "density": 0.0}, "density"),
    ({"how": "ties", "density": 1.5}, "density"),
    ({"how": "dare", "density": -0.2}, "density"),
    ({"how": "linear", "density": 0.5}, "density: not used by how='linear'"),
    ({"how": "ties", "seed": 1}, "seed: not used by how='ties'"),
    ({"how": "dare", "majority_sign": "total"}, "majority_sign: not used"),
    ({"rank": 0}, "rank"),
    ({"how": None}, "must be one of"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_wrong_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Mixing(**options)
    assert words in str(refused.value)
