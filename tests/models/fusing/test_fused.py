"""Models with fused norms and feed-forward parts compute what they computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.models.fusing.fused import fusable, fused
from graftlm.quant.convert import quantise
from graftlm.quant.scheme import Scheme
from graftlm.testing.models import batch, tiny


def step(model: Any) -> tuple[Tensor, list[Tensor]]:
    output = model(**batch("llama"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return output.logits, list(torch.autograd.grad(output.loss, trained))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_the_same_outputs_and_gradients(kind: str, dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype)
    if kind != "dense":
        quantise(model, Scheme.parse(kind))
    attach(model, LoraConfig(r=4, init_lora_weights=False), storage=FOLDER)
    logits, gradients = step(model)
    found, layers = fusable(model), len(model.model.layers)
    norms = 2 * layers + 1
    assert f"{norms} of {norms} norms, {layers} of {layers} gated feed-forward parts" in found.summary
    with fused(found):
        same, others = step(model)
    if dtype == torch.float32:
        for mine, its in zip((same, *others), (logits, *gradients), strict=True):
            assert (mine - its).norm() <= 1e-5 * its.norm()
    precise, exact = step(model.float())
    truth = torch.cat([tensor.flatten() for tensor in (precise, *exact)])
    ours, theirs = (
        (torch.cat([tensor.flatten().float() for tensor in each]) - truth).norm()
        for each in ((same, *others), (logits, *gradients))
    )
    assert ours <= 1.2 * theirs + 1e-5 * truth.norm(), "further from the truth than the plain model"
    assert not any("forward" in vars(module) for module in model.modules())


def test_less_is_kept_for_backward() -> None:
    model = tiny("llama")
    attach(model, LoraConfig(r=4), storage=FOLDER)

    def kept() -> int:
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (sizes.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}), t)[1],
            lambda t: t,
        ):
            output = model(**batch("llama")).logits
        del output
        return sum(sizes.values())

    before = kept()
    with fused(fusable(model)):
        assert kept() < before


def test_trained_norms_keep_their_gradient() -> None:
    model = tiny("llama").requires_grad_(False)
    model.model.norm.weight.requires_grad_()
    _, expected = step(model)
    with fused(fusable(model)):
        _, found = step(model)
    torch.testing.assert_close(found[0], expected[0])


SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}


def of(config: str, model: str, **settings: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, config)(
        vocab_size=32, num_hidden_layers=1, pad_token_id=0, **SIZES, **settings
    )
    return getattr(transformers, model)(made).requires_grad_(False).eval()


def test_norms_that_multiply_by_one_plus_their_weight() -> None:
    """As Gemma's do. Its gate is GELU."""
    model = of("Gemma2Config", "Gemma2ForCausalLM", head_dim=8)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(-0.5, 0.5)
    found, ids = fusable(model), torch.arange(6)[None]
    assert "5 of 5 norms, 1 of 1 gated feed-forward parts" in found.summary
    expected = model(input_ids=ids).logits
    with fused(found):
        torch.testing.assert_close(model(input_ids=ids).logits, expected)


def test_gate_and_up_in_one_layer() -> None:
    model = of("Phi3Config", "Phi3ForCausalLM")
    found, ids = fusable(model), torch.arange(6)[None]
    assert "3 of 3 norms, 1 of 1 gated feed-forward parts" in found.summary
    expected = model(input_ids=ids).logits
    with fused(found):
        torch.testing.assert_close(model(input_ids=ids).logits, expected)


def test_other_arithmetic_is_left_alone() -> None:
    """Olmo's norm has no weight at all, and T5's is none by its name."""
    model = of("OlmoConfig", "OlmoForCausalLM")
    assert "0 of 0 norms, 1 of 1 gated feed-forward parts" in fusable(model).summary


def test_an_error_inside_leaves_nothing_behind() -> None:
    model = tiny("llama")
    with pytest.raises(KeyError), fused(fusable(model)):
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())
