"""The loss through a packed head: value and gradient are those of the dense head it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm.data.batches import Batch
from graftlm.formats.layout import FOLDER
from graftlm.kernels import cross_entropy
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.objectives import packed_head
from graftlm.objectives.packed_head import packed_cross_entropy
from graftlm.objectives.sft import SftObjective
from graftlm.quant.embedding import quantise_embeddings
from graftlm.quant.packed import PackedWeight, encode
from graftlm.quant.scheme import Scheme
from graftlm.testing.models import tiny


def a_head(kind: str = "int8", vocabulary: int = 101, width: int = 24, scale: float = 0.3) -> PackedWeight:
    random = torch.Generator().manual_seed(0)
    return encode(torch.randn(vocabulary, width, generator=random) * scale, Scheme(kind))


def states(rows: int, dtype: torch.dtype = torch.float64, width: int = 24) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, width, generator=random).to(dtype).requires_grad_()
    return hidden, torch.randint(0, 101, (rows,), generator=random)


def dense_loss(hidden: Tensor, packed: PackedWeight, labels: Tensor, bias: Tensor | None) -> Tensor:
    logits = hidden @ packed.decode(hidden.dtype).t()
    logits = logits if bias is None else logits + bias
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum"
    )


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("rows", [0, 1, 9])
@pytest.mark.parametrize("pieces", [(4, 24), (2048, 240), (2048, 2**23)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_the_loss_of_the_dense_head(
    kind: str, rows: int, pieces: tuple[int, int], with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "ROWS", pieces[0])
    monkeypatch.setattr(packed_head, "VALUES", pieces[1])
    packed, (hidden, labels) = a_head(kind), states(rows)
    bias = torch.randn(101, dtype=torch.float64) if with_bias else None
    expected = dense_loss(hidden, packed, labels, bias)
    (gradient,) = torch.autograd.grad(expected * 0.7, hidden)
    loss = packed_cross_entropy(hidden, packed, labels, bias)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss * 0.7, hidden)[0], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 3.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_any_size_in_low_precision(scale: float, dtype: torch.dtype) -> None:
    """Compared with float64, it is no further off than the dense way in the same dtype, but for rounding."""
    packed, (hidden, labels) = a_head(scale=scale), states(64)
    exact = dense_loss(hidden, packed, labels, None)
    (wanted,) = torch.autograd.grad(exact, hidden)
    low = hidden.detach().to(dtype).requires_grad_()
    dense = torch.autograd.grad(dense_loss(low, packed, labels, None), low)[0]
    loss = packed_cross_entropy(low, packed, labels)
    ours = torch.autograd.grad(loss, low)[0]
    assert loss.dtype == torch.float32 and ours.dtype == dtype
    off, theirs = ((found.double() - wanted).norm() / wanted.norm() for found in (ours, dense))
    assert off <= 1.5 * theirs + torch.finfo(dtype).eps


def test_a_certain_token_has_a_small_gradient_and_not_noise() -> None:
    """The label's row nearly cancels there; kept apart, what is left of it is right to the last digits."""
    packed = a_head(scale=1.0)
    hidden = (packed.decode()[:8] * 4.0).requires_grad_()
    labels = torch.arange(8)
    exact = hidden.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(dense_loss(exact, packed, labels, None), exact)
    (ours,) = torch.autograd.grad(packed_cross_entropy(hidden, packed, labels), hidden)
    assert 0 < wanted.norm() < 0.02
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_without_a_gradient_it_still_gives_the_loss() -> None:
    packed, (hidden, labels) = a_head(), states(5)
    with torch.no_grad():
        loss = packed_cross_entropy(hidden, packed, labels)
    torch.testing.assert_close(loss, dense_loss(hidden, packed, labels, None).detach())


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "llama-nf4"])
def test_an_objective_takes_it_on_a_model_with_a_packed_head(kind: str) -> None:
    model: Any = tiny(kind)
    quantise_embeddings(model)
    target = "c_attn" if kind == "gpt2" else "q_proj"
    attach(model, LoraConfig(r=2, target_modules=[target], init_lora_weights=False), storage=FOLDER)
    objective = SftObjective(model)
    assert (objective.path, objective.why) == (
        "packed head",
        "the output head is frozen and stored in 8 bits",
    )
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(2))
    batch = Batch(inputs={"input_ids": ids}, labels=ids, target_tokens=16, real_tokens=18, rows=(0, 1))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = objective(model, batch).loss_sum
    found = torch.autograd.grad(loss, list(trained.values()))
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits.float(), ids[:, 1:].flatten(), reduction="sum")
    wanted = torch.autograd.grad(expected, list(trained.values()))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
