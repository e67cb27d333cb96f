"""Starts of LoRA: what they promise by definition, and that training from them is what PEFT's training is."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core.errors import ConfigError
from graftlm.core.notices import forget_notices, notices_to
from graftlm.methods.lora import LoraConfig
from graftlm.methods.low_rank import LoraEmbedding, LoraLinear
from graftlm.methods.starts.initialise import Origin, olora, orthogonal, pissa, pissa_fast, start

from ..tiny import batch, graft, logits, stir, tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* is deprecated and will be removed in v6:FutureWarning",
    "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning",
)

SUBTRACTED = ("pissa", "pissa_niter_8", "olora")
KINDS_AND_TARGETS = (
    ("llama", ("q_proj", "down_proj", "lm_head")),
    ("gpt2", ("c_attn", "c_proj")),
    ("bert", ("query", "dense")),
    ("llama", ("embed_tokens",)),
)


def weight(rows: int = 12, columns: int = 8, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


# What each start is.


def test_pissa_takes_the_principal_part_of_the_weight() -> None:
    w, scaling = weight(), 2.0
    begin = pissa(w, 3, scaling)
    values = torch.linalg.svdvals(w)
    rest = torch.linalg.svdvals(w - scaling * begin.b @ begin.a)
    torch.testing.assert_close(rest[:5], values[3:])
    torch.testing.assert_close(begin.a.norm(dim=1), begin.b.norm(dim=0))
    exact, fast = begin.b @ begin.a, pissa_fast(w, 3, scaling, 200)
    torch.testing.assert_close(fast.b @ fast.a, exact, rtol=1e-4, atol=1e-4)


def test_olora_takes_rows_and_columns_of_the_qr_decomposition() -> None:
    w = weight()
    begin = olora(w, 8)
    torch.testing.assert_close(begin.b @ begin.a, w)
    torch.testing.assert_close(begin.b.t() @ begin.b, torch.eye(8, dtype=torch.float64))
    assert torch.equal(olora(w, 3).a, begin.a[:3]) and torch.equal(olora(w, 3).b, begin.b[:, :3])


def test_orthogonal_factors_are_not_zero_and_their_product_is() -> None:
    begin = orthogonal((12, 8), 4)
    assert begin.a.norm() > 0.1 < begin.b.norm()
    torch.testing.assert_close(begin.b @ begin.a, torch.zeros(12, 8))


def test_orthogonal_is_pefts_number_for_number() -> None:
    layer: Any = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 12)), peft.LoraConfig(r=4, target_modules=["0"])
    ).base_model.model[0]
    torch.manual_seed(7)
    layer.orthogonal_init("default")
    torch.manual_seed(7)
    begin = orthogonal((12, 8), 4)
    assert torch.equal(begin.a, layer.lora_A["default"].weight)
    assert torch.equal(begin.b, layer.lora_B["default"].weight)


@pytest.mark.parametrize("init", [True, "gaussian", "eva"])
def test_other_starts_have_a_zero_factor(init: bool | str) -> None:
    begin = start(init, (12, 8), 4, 1.0)
    assert not begin.b.any() and begin.a.std() > 0.1 and not begin.is_subtracted


# The adapted layer.


@pytest.mark.parametrize("init", [True, "gaussian", "eva", *SUBTRACTED])
@pytest.mark.parametrize(("kind", "targets"), KINDS_AND_TARGETS)
def test_it_starts_as_the_base_bit_for_bit(kind: str, targets: tuple[str, ...], init: bool | str) -> None:
    model, inputs = tiny(kind), batch(kind)
    base = logits(model, inputs)
    weights = copy.deepcopy(model.state_dict())
    adapters = graft(model, LoraConfig(r=4, lora_alpha=12, target_modules=targets, init_lora_weights=init))
    assert torch.equal(logits(model, inputs), base)
    stir(adapters)
    assert not torch.allclose(logits(model, inputs), base, atol=1e-3)
    with adapters.disabled():
        assert torch.equal(logits(model, inputs), base)
    adapters.detach()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", SUBTRACTED)
def test_it_starts_as_a_16_bit_base_bit_for_bit(init: str, dtype: torch.dtype) -> None:
    model, inputs = tiny("llama").to(dtype), batch("llama")
    base = logits(model, inputs)
    graft(model, LoraConfig(r=4, init_lora_weights=init))
    assert torch.equal(logits(model, inputs), base)


def test_orthogonal_starts_as_the_base_up_to_rounding() -> None:
    model, inputs = tiny("llama"), batch("llama")
    base = logits(model, inputs)
    graft(model, LoraConfig(r=4, init_lora_weights="orthogonal"))
    torch.testing.assert_close(logits(model, inputs), base, rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", SUBTRACTED)
@pytest.mark.parametrize(("kind", "targets"), KINDS_AND_TARGETS)
def test_merging_is_the_difference_of_the_two_products(
    kind: str, targets: tuple[str, ...], init: str
) -> None:
    model, inputs = tiny(kind), batch(kind)
    adapters = graft(model, LoraConfig(r=4, lora_alpha=12, target_modules=targets, init_lora_weights=init))
    begun = {
        path: [p.detach().double() for p in part.parameters()]
        for path, part in adapters.parts("default").items()
    }
    base = {path: adapters.model.get_submodule(path).base_layer.weight.double() for path in begun}
    stir(adapters)
    expected = logits(model, inputs)
    adapters.merge()
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=1e-5)
    for path, part in adapters.parts("default").items():
        a, b = (p.detach().double() for p in part.parameters())
        change = 3 * (b @ a - begun[path][1] @ begun[path][0])
        merged = model.get_submodule(path).base_layer.weight.double() - base[path]
        is_transposed = kind == "gpt2" or isinstance(part, LoraEmbedding)
        torch.testing.assert_close(merged.t() if is_transposed else merged, change, rtol=0, atol=1e-6)


def test_the_gradient_is_that_of_the_trained_product_alone() -> None:
    w = weight().float()
    part = LoraLinear(8, 12, r=4, scaling=1.5, init="pissa", weight=w)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, target = torch.randn(5, 8), torch.randn(5, 12)
    (part.post(x, x @ w.t()) * target).sum().backward()
    a, b = part.lora_A.detach().requires_grad_(), part.lora_B.detach().requires_grad_()
    (1.5 * (x @ a.t() @ b.t()) * target).sum().backward()
    torch.testing.assert_close(part.lora_A.grad, a.grad)
    torch.testing.assert_close(part.lora_B.grad, b.grad)


# Training, against PEFT.


def _steps(
    model: Any, parameters: list[nn.Parameter], inputs: dict[str, Tensor], count: int = 10
) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(count):
        loss = model(**inputs).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


PEFTS_CASES = [("pissa", "llama"), ("olora", "llama"), ("pissa", "gpt2")]
"""PEFT's OLoRA takes the QR of a Conv1D's transposed weight, whose factors do not fit the layer."""


@pytest.mark.parametrize("variant", ["plain", "use_rslora", "use_dora"])
@pytest.mark.parametrize(("init", "kind"), PEFTS_CASES)
def test_ten_steps_of_training_are_pefts(init: str, kind: str, variant: str) -> None:
    targets = ["q_proj", "down_proj"] if kind == "llama" else ["c_attn", "c_fc"]
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": targets, "init_lora_weights": init}
    fields |= {} if variant == "plain" else {variant: True}
    inputs = batch(kind)
    theirs = peft.get_peft_model(tiny(kind), peft.LoraConfig(**fields)).eval()
    their_losses = _steps(theirs, [p for p in theirs.parameters() if p.requires_grad], inputs)
    ours = tiny(kind)
    adapters = graft(ours, LoraConfig(**fields))
    our_losses = _steps(ours, list(adapters.parameters("default")), inputs)
    assert our_losses == pytest.approx(their_losses, abs=2e-5)
    assert our_losses[-1] < our_losses[0] - 0.02
    torch.testing.assert_close(logits(ours, inputs), logits(theirs, inputs), rtol=0, atol=1e-4)


# Configs.


def test_the_portable_config_has_twice_the_rank_and_the_same_scaling() -> None:
    config = LoraConfig(
        r=4, lora_alpha=12, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 5}, init_lora_weights="pissa"
    )
    plain = config.portable()
    assert isinstance(plain, LoraConfig) and plain.init_lora_weights is True
    for path in ("a.q_proj", "a.v_proj", "a.k_proj"):
        assert plain.rank_at(path) == 2 * config.rank_at(path)
        assert plain.scaling_at(path) == config.scaling_at(path)
        rs, plain_rs = config.replace(use_rslora=True), config.replace(use_rslora=True).portable()
        assert isinstance(plain_rs, LoraConfig)
        assert plain_rs.scaling_at(path) == pytest.approx(rs.scaling_at(path))
    assert LoraConfig(init_lora_weights="gaussian").portable() == LoraConfig(init_lora_weights="gaussian")


@pytest.mark.parametrize("fields", [{"init_lora_weights": "pisa"}, {"init_lora_weights": "pissa_niter_0"}])
def test_an_unknown_start_is_refused_with_the_nearest(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'pissa'|pissa_niter_N"):
        LoraConfig(**fields)


def test_ranks_that_a_start_cannot_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="even rank, not 3"):
        LoraConfig(r=4, rank_pattern={"q_proj": 3}, init_lora_weights="orthogonal")
    model = tiny("llama")
    with pytest.raises(ConfigError, match="r is 40"):
        graft(model, LoraConfig(r=40, init_lora_weights="olora"))
    assert not hasattr(model, "graft_adapters")
    with pytest.raises(ConfigError, match=r"stored as torch\.uint8"):
        start("pissa", (12, 8), 4, 1.0, torch.zeros(12, 8, dtype=torch.uint8))


def test_eva_without_data_says_so() -> None:
    forget_notices()
    heard: list[str] = []
    with notices_to(heard.append):
        graft(tiny("llama"), LoraConfig(r=4, init_lora_weights="eva"))
    assert len(heard) == 1 and "initialise_from_data" in heard[0]


# Saving.


def test_what_is_saved_comes_back() -> None:
    part = LoraLinear(8, 12, r=4, scaling=1.0, init="pissa", weight=weight().float())
    with torch.no_grad():
        part.lora_A.add_(0.1 * torch.randn_like(part.lora_A))
        part.lora_B.add_(0.1 * torch.randn_like(part.lora_B))
    saved = {name: tensor.clone() for name, tensor in part.saved().items()}
    other = LoraLinear(8, 12, r=4, scaling=1.0, init="pissa", weight=weight(seed=1).float())
    other.load_saved(saved)
    for one, two in zip(part.factors(), other.factors(), strict=True):
        torch.testing.assert_close(one, two)
    torch.testing.assert_close(other.lora_A, part.lora_A)


def test_rounding_a_saved_start_to_16_bits_costs_a_fraction_of_pefts_form() -> None:
    """PEFT's file holds [A; A0] and [B, -B0]: two large products that nearly cancel."""
    w = F.normalize(weight(64, 64).float()) * 8
    begin = pissa(w, 8, 1.0)
    a, b = begin.a + 1e-3 * torch.randn_like(begin.a), begin.b + 1e-3 * torch.randn_like(begin.b)
    exact = b.double() @ a.double() - begin.b.double() @ begin.a.double()

    def error(rows: Tensor, columns: Tensor) -> float:
        return float((columns.bfloat16().double() @ rows.bfloat16().double() - exact).norm() / exact.norm())

    ours = error(*Origin(begin).change(a, b))
    theirs = error(torch.cat([a, begin.a]), torch.cat([b, -begin.b], dim=1))
    assert ours < 0.02 and theirs > 20 * ours
