"""(IA)^3 against its definition in float64; what it saves for the backward pass; merging."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftlm.core.errors import ConfigError, TargetError
from graftlm.methods.ia3 import IA3Config, IA3Input, IA3Output, scaled
from graftlm.methods.lora import LoraConfig
from graftlm.methods.resolve import resolve

from .tiny import KINDS, batch, graft, logits, stir, tiny

NAMED = {"target_modules": ("k_proj", "down_proj"), "feedforward_modules": ("down_proj",)}


def folded(kind: str, adapters: Any) -> Any:
    """A plain model whose weights hold the factors, in float64."""
    plain = tiny(kind).double()
    for path, part in adapters.parts("default").items():
        layer = plain.get_submodule(path)
        factors = part.ia3_l.detach().double().flatten()
        weight = layer.weight.data.t() if kind == "gpt2" else layer.weight.data
        if isinstance(part, IA3Input):
            weight.mul_(factors)
        else:
            weight.mul_(factors[:, None])
            if layer.bias is not None:
                layer.bias.data.mul_(factors)
    return plain


@pytest.mark.parametrize("kind", KINDS)
def test_the_definition(kind: str) -> None:
    model, inputs = tiny(kind).double(), batch(kind)
    before = logits(model, inputs)
    adapters = graft(model, IA3Config(), dtype="base")
    assert torch.equal(logits(model, inputs), before), "identity at the start"
    stir(adapters)
    expected = logits(folded(kind, adapters), inputs)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=1e-12)
    adapters.merge()
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=1e-12)
    adapters.unmerge()
    assert torch.equal(logits(adapters.detach(), inputs), before)


def test_roles_and_shapes() -> None:
    parts = graft(tiny("llama"), IA3Config()).parts("default")
    shapes = {path.rpartition(".")[2]: tuple(part.ia3_l.shape) for path, part in parts.items()}
    assert shapes == {"k_proj": (16, 1), "v_proj": (16, 1), "down_proj": (1, 48)}
    assert {path for path, part in parts.items() if isinstance(part, IA3Input)} == {
        f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)
    }


@pytest.mark.parametrize(
    ("fields", "inner"),
    [
        ({}, {"down_proj"}),
        ({"target_modules": "all-linear"}, {"down_proj"}),
        ({"target_modules": ["k_proj"]}, set()),
        ({"feedforward_modules": []}, set()),
        ({"target_modules": ["k_proj", "up_proj"], "feedforward_modules": {"up_proj"}}, {"up_proj"}),
        ({"target_modules": "mlp", "feedforward_modules": ["mlp"]}, {"gate_proj", "up_proj", "down_proj"}),
        ({"target_modules": "mlp", "feedforward_modules": r".*\.1\.mlp\.up_proj"}, {"up_proj"}),
        ({"target_modules": ["down_proj"], "layers_to_transform": 0}, {"down_proj"}),
        ({"feedforward_modules": None}, {"down_proj"}),
    ],
)
def test_which_layers_scale_their_input(fields: dict[str, Any], inner: set[str]) -> None:
    parts = graft(tiny("llama"), IA3Config(**fields)).parts("default")
    found = {path.rpartition(".")[2] for path, part in parts.items() if isinstance(part, IA3Input)}
    assert found == inner


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_modules": ["k_proj"], "feedforward_modules": ["down_proj"]}, "none of the target modules"),
        ({"feedforward_modules": ["dwn_proj"]}, "down_proj"),
        ({"target_modules": ["embed_tokens"]}, "cannot adapt"),
    ],
)
def test_what_does_not_fit_is_said(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(TargetError, match=words):
        resolve(tiny("llama"), IA3Config(**fields))


def test_unknown_fields_are_errors() -> None:
    with pytest.raises(ConfigError, match="feedforward_modules"):
        IA3Config(feed_forward_modules=["wo"])


def test_gradients_are_those_of_a_plain_product() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    factors = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(scaled, (x, factors))
    narrow, wide = x.detach().bfloat16().requires_grad_(), factors.detach().float().requires_grad_()
    upstream = torch.randn(2, 3, 5).bfloat16()
    expected = torch.autograd.grad(narrow.double() * wide.double(), (narrow, wide), upstream.double())
    for ours in (
        torch.autograd.grad(scaled(narrow, wide), (narrow, wide), upstream),
        (
            *torch.autograd.grad(scaled(narrow, wide.detach()), (narrow,), upstream),
            *torch.autograd.grad(scaled(narrow.detach(), wide), (wide,), upstream),
        ),
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = model(x)
    assert alive.requires_grad
    return sum(kept.values())


def test_in_bfloat16_the_product_is_exact_and_only_the_tensor_itself_is_kept() -> None:
    """Plain torch would either round the factors to steps of 1/128 or keep a float32 copy."""
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).bfloat16()
    config = IA3Config(target_modules=("2",), feedforward_modules=("2",))
    part = graft(model, config).parts("default")["2"]
    assert isinstance(part, IA3Input) and part.ia3_l.dtype == torch.float32
    with torch.no_grad():
        part.ia3_l.fill_(1.003)  # between two numbers of bfloat16
    x = torch.randn(8, 96).bfloat16()
    assert torch.equal(part.pre(x), (x.double() * part.ia3_l.double()).bfloat16())
    assert not torch.equal(part.pre(x), x)
    assert kept_bytes(model, torch.randn(8, 64).bfloat16()) == 8 * 96 * 2
    part.requires_grad_(False)
    x = torch.randn(8, 64).bfloat16().requires_grad_()
    with_adapter = kept_bytes(model, x)
    assert with_adapter == kept_bytes(model[:1], x) + kept_bytes(
        model[1:2], model[0](x).detach().requires_grad_()
    )


def test_compiles_without_graph_breaks() -> None:
    model, inputs = tiny("llama", num_hidden_layers=1), batch("llama")
    adapters = graft(model, IA3Config())
    stir(adapters)
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).loss
    gradients = torch.autograd.grad(loss, [*adapters.parameters("default")])
    expected = torch.autograd.grad(model(**inputs).loss, [*adapters.parameters("default")])
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_changes_are_summed_with_those_of_other_methods() -> None:
    """In one layer, by hand: factors on the output, factors on the input, and LoRA."""
    model = nn.Sequential(nn.Linear(6, 5)).double()
    base = model[0]
    adapters = graft(model, IA3Config(target_modules=("0",), feedforward_modules=()), "out", dtype="base")
    adapters.add("in", IA3Config(target_modules=("0",), feedforward_modules=("0",)), dtype="base")
    adapters.add("lora", LoraConfig(r=2, target_modules=("0",)), dtype="base")
    for seed, name in enumerate(adapters.names):
        stir(adapters, name, seed=seed, size=1.0)
    after, before, lora = (adapters.parts(name)["0"] for name in adapters.names)
    assert isinstance(after, IA3Output) and isinstance(before, IA3Input)
    x = torch.randn(4, 6, dtype=torch.float64)
    y = base(x)
    change = y * (after.ia3_l.flatten() - 1)
    change = change + (x * (before.ia3_l - 1)) @ base.weight.T
    assert isinstance(adapters.config("lora"), LoraConfig) and adapters.config("lora").scaling == 16
    change = change + 16 * (x @ lora.lora_A.T @ lora.lora_B.T)
    for names in (adapters.names, adapters.names[::-1]):
        adapters.activate(names)
        torch.testing.assert_close(model(x), y + change, rtol=0, atol=1e-12)
        adapters.merge()
        torch.testing.assert_close(model(x), y + change, rtol=0, atol=1e-6)
        adapters.unmerge()
    with adapters.routed(["in", None, "out", "lora"]):
        rows = model(x)
    for row, name in enumerate(("in", None, "out", "lora")):
        with adapters.activated([name] if name else []):
            torch.testing.assert_close(rows[row], model(x)[row], rtol=0, atol=1e-12)


def test_packed_weights_say_nothing_about_widths() -> None:
    """A layer in 4 bits stores [numbers / 2, 1]; its widths are what the layer says."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(torch.randn(32, 64), requires_grad=False, quant_type="nf4")
    model = nn.Sequential(layer.to("cpu"))
    x = torch.randn(4, 64)
    expected = model(x)
    adapters = graft(model, IA3Config(target_modules=("0",), feedforward_modules=()), "out")
    adapters.add("in", IA3Config(target_modules=("0",), feedforward_modules=("0",)))
    assert [tuple(p.shape) for name in adapters.names for p in adapters.parameters(name)] == [
        (32, 1),
        (1, 64),
    ]
    for name in adapters.names:
        with adapters.activated(name):
            assert torch.equal(model(x), expected)
