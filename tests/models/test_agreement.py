"""Figures that say whether two models are one."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftlm.models.agreement import MAX_MEAN_KL, agreement, logits_on
from graftlm.models.load import load_model


def drawn(seed: int, *, rows: int = 6, vocabulary: int = 11, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shift=st.floats(-50, 50))
def test_a_constant_added_to_logits_changes_nothing(seed: int, shift: float) -> None:
    logits = drawn(seed).double()
    found = agreement([logits], [logits + shift])
    assert found.mean_kl <= 1e-12
    assert found.top1 == 1.0
    assert found.is_same_model


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_kl_is_that_of_torch(seed: int) -> None:
    ours, theirs = drawn(seed), drawn(seed + 1)
    p, q = (torch.distributions.Categorical(logits=x.double()) for x in (ours, theirs))
    expected = float(torch.distributions.kl_divergence(p, q).mean())
    found = agreement([ours[:2], ours[2:]], [theirs[:2], theirs[2:]])
    assert found.mean_kl == pytest.approx(expected, rel=1e-9)
    assert (found.probes, found.tokens) == (2, 6)
    assert found.largest_logit_difference == pytest.approx(float((ours - theirs).abs().max()))


def test_rounding_may_swap_what_is_undecided_but_nothing_else() -> None:
    near = torch.tensor([[5.0, 4.99, 0.0], [9.0, 0.0, 0.0]])
    assert agreement([near], [near[:, [1, 0, 2]]]).top1 == 0.0, "the second row was decided"
    assert agreement([near[:1]], [near[:1, [1, 0, 2]]]).top1 == 1.0, "the first was not"


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_never_the_same_model(broken: float) -> None:
    """A merge that overflows must not be called verified."""
    good, bad = drawn(1), drawn(1)
    bad[3, 4] = broken
    assert not agreement([good], [bad]).is_same_model
    assert not agreement([bad], [good]).is_same_model
    assert not agreement([bad], [bad]).is_same_model


def test_another_model_is_seen() -> None:
    found = agreement([drawn(1)], [drawn(2)])
    assert found.mean_kl > MAX_MEAN_KL
    assert not found.is_same_model
    assert json.loads(json.dumps(found.as_dict()))["is_same_model"] is False
    assert "KL" in str(found)


def test_logits_of_probes_one_at_a_time() -> None:
    model, _ = load_model("sprout", dtype="float32")
    model.train()
    probes = [[3, 4, 5], [6, 7, 8, 9, 10]]
    found = logits_on(model, probes)
    assert model.training, "the mode comes back"
    assert [tuple(part.shape) for part in found] == [
        (3, model.config.vocab_size),
        (5, model.config.vocab_size),
    ]
    assert not any(part.requires_grad for part in found)
    model.eval()
    assert torch.equal(found[0], model(input_ids=torch.tensor([probes[0]])).logits[0].detach())
