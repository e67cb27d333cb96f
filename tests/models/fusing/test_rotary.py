"""Rotary embeddings in one operator: the same values and layout, and the plain function back afterwards."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from graftlm.models.fusing.rotary import rotary_embeddings
from graftlm.testing.models import tiny

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma", "Gemma2", "Gemma3Text")


def made(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **settings)
    name = "Gemma3ForCausalLM" if family == "Gemma3Text" else f"{family}ForCausalLM"
    return getattr(transformers, name)(config).eval()


def step(model: Any) -> tuple[Tensor, list[Tensor]]:
    ids = torch.arange(14).view(2, 7) % 32
    output = model(input_ids=ids, labels=ids)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return output.logits, list(torch.autograd.grad(output.loss, trained))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_outputs_and_gradients(family: str, dtype: torch.dtype) -> None:
    model = made(family).to(dtype)
    logits, gradients = step(model)
    found = rotary_embeddings(model)
    assert found.summary == "2 of 2 rotary embeddings"
    with found.in_use():
        same, others = step(model)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    assert (same - logits).norm() <= tolerance * logits.norm()
    for mine, its in zip(others, gradients, strict=True):
        assert (mine - its).norm() <= tolerance * its.norm() + 1e-6


def test_a_part_of_each_head() -> None:
    rope_parameters = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    model = made("Phi3", rope_parameters=rope_parameters)
    logits, _ = step(model)
    with rotary_embeddings(model).in_use():
        same, _ = step(model)
    torch.testing.assert_close(same, logits)


def test_the_function_of_the_model_is_back_even_after_an_error() -> None:
    model = tiny("llama")
    place = vars(sys.modules[type(model).__module__])
    plain, found = place["apply_rotary_pos_emb"], rotary_embeddings(model)
    with pytest.raises(KeyError), found.in_use():
        assert place["apply_rotary_pos_emb"] is not plain
        raise KeyError
    assert place["apply_rotary_pos_emb"] is plain


def test_results_lie_token_by_token() -> None:
    """As linear layers give queries: the attention then sees them without a copy."""
    model = tiny("llama")
    place = vars(sys.modules[type(model).__module__])
    q, k = torch.randn(2, 5, 4, 8).transpose(1, 2), torch.randn(2, 5, 2, 8).transpose(1, 2)
    angle = torch.rand(1, 5, 8)
    with rotary_embeddings(model).in_use():
        for turned, x in zip(
            place["apply_rotary_pos_emb"](q, k, angle.cos(), angle.sin()), (q, k), strict=True
        ):
            assert turned.stride() == x.stride()


def test_calls_of_another_form_take_the_plain_function() -> None:
    model = tiny("llama")
    place = vars(sys.modules[type(model).__module__])
    plain = place["apply_rotary_pos_emb"]
    x, angle = torch.randn(2, 5, 4, 8), torch.rand(1, 5, 8)
    with rotary_embeddings(model).in_use():
        found = place["apply_rotary_pos_emb"](x, x, angle.cos(), angle.sin(), unsqueeze_dim=2)
    expected = plain(x, x, angle.cos(), angle.sin(), unsqueeze_dim=2)
    assert all(torch.equal(mine, its) for mine, its in zip(found, expected, strict=True))


def test_other_rotations_are_left_alone() -> None:
    """Cohere turns pairs of neighbours."""
    assert rotary_embeddings(made("Cohere")).summary == "0 of 2 rotary embeddings"
    assert rotary_embeddings(torch.nn.Linear(2, 2)).summary == "0 of 0 rotary embeddings"
