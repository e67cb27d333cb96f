"""DoRA: its definition on every kind of model, its start, its gradients, what it remembers."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from graftlm.core.errors import ConfigError
from graftlm.methods import dora
from graftlm.methods.base import Layer
from graftlm.methods.dora import DoraEmbedding, DoraLinear
from graftlm.methods.lora import LoraConfig

from .tiny import KINDS, batch, graft, logits, snapshot, stir, tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* is deprecated and will be removed in v6:FutureWarning",
    "ignore:Merging unties the embeddings:UserWarning",
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
)

CONFIG = LoraConfig(r=4, lora_alpha=6, use_dora=True)
TABLES = {"llama": "embed_tokens", "gemma3": "embed_tokens", "gpt2": "wte", "roberta": "word_embeddings"}


def on_tables(kind: str) -> LoraConfig:
    return CONFIG.replace(target_modules=(TABLES[kind], "c_attn" if kind == "gpt2" else "all-linear"))


def rescaled(weight: Tensor, delta: Tensor, magnitude: Tensor, dim: int) -> Tensor:
    """The definition: every row of W + s B A brought to its length."""
    changed = weight + delta
    shape = [-1, 1] if dim == 1 else [1, -1]
    return changed / changed.norm(dim=dim, keepdim=True) * magnitude.view(shape)


def change_weights(model: Any, parts: Any) -> None:
    """Put the definition's weights, formed in float64, into a model without adapters."""
    for path, part in parts.items():
        layer = model.get_submodule(path)
        scale = part.lora.scaling
        if isinstance(part, DoraEmbedding):
            delta = scale * (part.lora.lora_embedding_B @ part.lora.lora_embedding_A).T
            new = rescaled(layer.weight, delta, part.magnitude, 0)
        else:
            delta = scale * part.lora.lora_B @ part.lora.lora_A
            is_linear = isinstance(layer, nn.Linear)
            new = rescaled(layer.weight if is_linear else layer.weight.T, delta, part.magnitude, 1)
            new = new if is_linear else new.T
        layer.weight = nn.Parameter(new.detach())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", [True, False])
def test_a_fresh_adapter_has_the_lengths_of_the_rows_it_starts_with(kind: str, init: bool) -> None:
    model, inputs = tiny(kind), batch(kind)
    before = logits(model, inputs)
    adapters = graft(model, CONFIG.replace(init_lora_weights=init))
    part = next(iter(adapters.parts("default").values()))
    assert isinstance(part, DoraLinear) and part.magnitude.dtype == torch.float32
    if init:
        assert torch.equal(logits(model, inputs), before)
    else:
        adapters.add("lora", LoraConfig(r=4, lora_alpha=6))
        with torch.no_grad():
            for mine, theirs in zip(
                adapters.parts("default").values(), adapters.parts("lora").values(), strict=True
            ):
                theirs.get_parameter("lora_A").copy_(mine.get_parameter("lora.lora_A"))
                theirs.get_parameter("lora_B").copy_(mine.get_parameter("lora.lora_B"))
        as_dora = logits(model, inputs)
        adapters.activate("lora")
        torch.testing.assert_close(as_dora, logits(model, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_that_of_a_base_with_changed_weights(kind: str) -> None:
    model, inputs = tiny(kind).double(), batch(kind)
    changed = copy.deepcopy(model)
    adapters = graft(model, on_tables(kind) if kind in TABLES else CONFIG, dtype="base")
    stir(adapters)
    change_weights(changed, adapters.parts("default"))
    tolerance = 1e-6 if kind == "gemma3" else 1e-9  # Gemma keeps its factor in float32.
    expected = logits(changed, inputs)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-9, atol=tolerance)
    adapters.merge()
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-9, atol=tolerance)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_gradients_are_those_of_the_definition_with_a_constant_length(kind: str) -> None:
    """From autograd through the formula itself, in float64, with detached norms."""
    model, inputs = tiny(kind).double(), batch(kind)
    formula = copy.deepcopy(model)
    adapters = graft(model, CONFIG, dtype="base")
    stir(adapters)
    leaves: dict[str, Tensor] = {}
    for path, part in adapters.parts("default").items():
        layer = formula.get_submodule(path)
        for name, parameter in part.named_parameters():
            leaves[f"{path}.{name}"] = parameter.detach().clone().requires_grad_()
        a, b, m = (leaves[f"{path}.{name}"] for name in ("lora.lora_A", "lora.lora_B", "magnitude"))
        weight = layer.weight.detach() if isinstance(layer, nn.Linear) else layer.weight.detach().T
        total = weight + 1.5 * b @ a
        new = m[:, None] * total / total.detach().norm(dim=1, keepdim=True)
        del layer.weight
        layer.weight = new if isinstance(layer, nn.Linear) else new.T
    model(**inputs).loss.backward()
    formula(**inputs).loss.backward()
    for name, parameter in adapters.named_parameters("default").items():
        torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama", ["q_proj", "down_proj"]),
        ("gpt2", ["c_attn"]),
        ("bert", ["query", "dense"]),
        ("llama", ["embed_tokens", "q_proj"]),
        ("t5", ["q", "wo"]),
    ],
)
def test_ten_steps_of_adamw_give_the_weights_that_peft_gives(kind: str, targets: list[str]) -> None:
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": targets}
    model = tiny(kind)
    wrapped = peft.get_peft_model(tiny(kind), peft.LoraConfig(**fields, fan_in_fan_out=kind == "gpt2"))
    adapters = graft(model, LoraConfig(**fields))
    theirs = {key: p for key, p in wrapped.named_parameters() if p.requires_grad}
    pairs = []
    for key, parameter in adapters.named_parameters("default").items():
        name = key.replace("lora.lora_", "lora_").replace("magnitude", "lora_magnitude_vector")
        stem = f"base_model.model.{name}.default"
        pairs.append((parameter, theirs.get(f"{stem}.weight", theirs.get(stem))))
    assert len(pairs) == len(theirs)
    with torch.no_grad():
        for mine, other in pairs:
            mine.copy_(other)
    sides = [(m, torch.optim.AdamW([pair[i] for pair in pairs], 1e-3)) for i, m in ((0, model), (1, wrapped))]
    for step in range(10):
        for side, optimizer in sides:
            optimizer.zero_grad()
            side(**batch(kind, seed=step)).loss.backward()
            optimizer.step()
    assert max((mine - other).abs().max().item() for mine, other in pairs) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_base_has_lengths_in_float32(dtype: torch.dtype) -> None:
    model, inputs = tiny("llama").to(dtype), batch("llama")
    before = logits(model, inputs)
    adapters = graft(model, CONFIG)
    assert {p.dtype for p in adapters.parameters("default")} == {torch.float32}
    assert torch.equal(logits(model, inputs), before)
    stir(adapters)
    changed = tiny("llama").to(dtype).double()
    wide = copy.deepcopy(adapters.parts("default"))
    change_weights(changed, {path: part.double() for path, part in wide.items()})
    out = logits(model, inputs)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), logits(changed, inputs), rtol=0, atol=0.03)


def test_dropout_acts_on_the_input_of_the_update_only() -> None:
    layer = nn.Linear(64, 8)
    part = CONFIG.replace(lora_dropout=0.5).build(Layer("x", layer))
    assert isinstance(part, DoraLinear)
    x = torch.randn(4000, 64)
    assert torch.equal(part.train()(layer, x), layer(x))  # B is zero: nothing to drop.
    nn.init.normal_(part.lora.lora_B, std=0.1)
    nn.init.normal_(part.magnitude, mean=1.0)
    with torch.no_grad():
        steady, noisy = part.eval()(layer, x), part.train()(layer, x)
        torch.testing.assert_close(noisy.mean(0), steady.mean(0), rtol=0, atol=0.05)
        assert not torch.equal(noisy, steady)


def test_a_row_of_zeros_stays_one_and_gives_no_nan() -> None:
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight[1])
    part, x = CONFIG.build(Layer("x", layer)), torch.randn(5, 4)
    assert torch.equal(part(layer, x), layer(x))
    part(layer, x).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in part.parameters())
    assert torch.isfinite(part.merged({"weight": layer.weight.detach()})["weight"]).all()


def test_two_changes_are_summed_and_one_alone_calls_the_base_once() -> None:
    model, inputs = tiny("llama"), batch("llama")
    layer = model.model.layers[0].self_attn.q_proj
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    one = CONFIG.replace(target_modules=r".*layers\.0\.self_attn\.q_proj")
    adapters = graft(model, one, "a")
    adapters.add("b", one.replace(r=2))
    for seed, name in enumerate(("a", "b")):
        stir(adapters, name, seed=seed)
    calls.clear()
    logits(model, inputs)
    assert len(calls) == 1
    site, x = model.model.layers[0].self_attn.q_proj, torch.randn(3, 32)
    with torch.no_grad():
        changes = [
            adapters.parts(name)[next(iter(adapters.parts(name)))](layer, x) - layer(x) for name in "ab"
        ]
        for order in (["a", "b"], ["b", "a"]):
            adapters.activate(order)
            torch.testing.assert_close(site(x), layer(x) + changes[0] + changes[1])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_another_adapter_that_is_merged_does_not_change_what_this_one_adds(kind: str) -> None:
    """The lengths are those of the base as it came, not those of what stands in its place."""
    model, inputs = tiny(kind), batch(kind)
    adapters = graft(model, CONFIG, "dora")
    adapters.add("lora", LoraConfig(r=3))
    for seed, name in enumerate(("dora", "lora")):
        stir(adapters, name, seed=seed)
    adapters.activate(["dora", "lora"])
    both = logits(model, inputs)
    for merged in ("lora", "dora"):
        adapters.merge(merged)
        torch.testing.assert_close(logits(model, inputs), both, rtol=1e-4, atol=1e-5)
        adapters.unmerge()
    assert torch.equal(logits(model, inputs), both)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_merge_unmerge_and_detach(kind: str) -> None:
    model, inputs = tiny(kind), batch(kind)
    unchanged = snapshot(model)
    config = on_tables(kind) if kind in TABLES else CONFIG.replace(bias="lora_only")
    adapters = graft(model, config)
    stir(adapters)
    active = logits(model, inputs)
    adapters.merge()
    torch.testing.assert_close(logits(model, inputs), active, rtol=1e-4, atol=1e-5)
    adapters.unmerge()
    assert torch.equal(logits(model, inputs), active)
    adapters.detach()
    unchanged()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_checkpointing_gives_the_same_gradients(kind: str, use_reentrant: bool) -> None:
    gradients = []
    for is_checkpointed in (False, True):
        model = tiny(kind).train()
        adapters = graft(model, CONFIG.replace(lora_dropout=0.2))
        stir(adapters)
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        model(**batch(kind)).loss.backward()
        gradients.append([p.grad for p in adapters.parameters("default")])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_model_compiles_without_a_graph_break(dropout: float) -> None:
    model, inputs = tiny("llama", num_hidden_layers=1), batch("llama")
    adapters = graft(
        model, CONFIG.replace(lora_dropout=dropout, target_modules=("all-linear", "embed_tokens"))
    )
    stir(adapters)
    model.train()
    gradients = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        torch.manual_seed(0)
        call(**inputs, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in adapters.parameters("default") if p.grad is not None])
    assert len(gradients[0]) == len(list(adapters.parameters("default")))
    for plain, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)


def test_autocast_keeps_lengths_in_float32() -> None:
    layer = nn.Linear(64, 32)
    part, x = CONFIG.build(Layer("x", layer)), torch.randn(5, 64)
    nn.init.normal_(part.get_parameter("lora.lora_B"))
    seen: list[Tensor] = []
    real = dora.gain
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(dora, "gain", lambda m, norms: (seen.append(norms), real(m, norms))[1])
        part(layer, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            part(layer, x + 1)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-6, atol=0)


class TestWhatIsRemembered:
    """`KnownRows`: a weight or an A that changed is seen, in place or as another object."""

    def made(self) -> tuple[nn.Linear, DoraLinear, Tensor]:
        torch.manual_seed(0)
        layer = nn.Linear(6, 5)
        part = CONFIG.build(Layer("x", layer))
        assert isinstance(part, DoraLinear)
        nn.init.normal_(part.lora.lora_B)
        return layer, part, torch.randn(2, 6)

    def expect(self, layer: nn.Linear, part: DoraLinear, x: Tensor) -> None:
        with torch.no_grad():
            delta = part.lora.scaling * part.lora.lora_B @ part.lora.lora_A
            weight = rescaled(layer.weight, delta, part.magnitude, 1)
            for _ in range(2):
                torch.testing.assert_close(part(layer, x), x @ weight.T + layer.bias)
        torch.testing.assert_close(part(layer, x), x @ weight.T + layer.bias)

    @torch.no_grad()
    def test_changes_are_seen(self) -> None:
        layer, part, x = self.made()
        self.expect(layer, part, x)
        layer.weight.mul_(2.0)
        self.expect(layer, part, x)
        layer.weight = nn.Parameter(torch.randn(5, 6))
        self.expect(layer, part, x)
        part.lora.lora_A.data.mul_(3.0)
        self.expect(layer, part, x)
        part.lora.lora_B.data.mul_(-1.0)
        self.expect(layer, part, x)
        self.expect(layer.double(), part.double(), x.double())

    def test_nothing_is_worked_out_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer, part, x = self.made()
        asked: list[bool] = []
        real = dora.row_products

        def counted(weight: Tensor, a: Tensor, *, need_squares: bool = True) -> tuple[Tensor, Tensor]:
            asked.append(need_squares)
            return real(weight, a, need_squares=need_squares)

        monkeypatch.setattr(dora, "row_products", counted)
        for _ in range(3):
            part(layer, x)
        assert asked == [True, False, False]
        with torch.no_grad():
            for _ in range(3):
                part(layer, x)
        assert asked == [True, False, False, False]

    def test_a_copy_remembers_nothing(self) -> None:
        layer, part, x = self.made()
        with torch.no_grad():
            part(layer, x)
        both = nn.ModuleDict({"layer": layer, "part": part})
        twin = copy.deepcopy(both)
        with torch.no_grad():
            twin["layer"].weight.mul_(2.0)  # type: ignore[union-attr, operator]
        self.expect(twin["layer"], twin["part"], x)  # type: ignore[arg-type]
        self.expect(layer, part, x)

    def test_what_inference_mode_left_can_be_trained_on(self) -> None:
        layer, part, x = self.made()
        with torch.inference_mode():
            part(layer, x)
        part(layer, x).sum().backward()
        self.expect(layer, part, x)


def test_lora_plus_speeds_up_b_and_the_magnitudes() -> None:
    for base, names in (
        (nn.Linear(4, 6), {"lora.lora_B", "magnitude"}),
        (nn.Embedding(5, 4), {"lora.lora_embedding_B", "magnitude"}),
    ):
        part = CONFIG.build(Layer("x", base))
        assert set(part.output_side) & set(dict(part.named_parameters())) == names


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_rows_are_routed_as_if_each_were_alone(kind: str) -> None:
    model, inputs = tiny(kind), batch(kind, rows=3)
    inputs.pop("labels")
    adapters = graft(model, CONFIG, "a")
    stir(adapters, "a")
    adapters.add("b", LoraConfig(r=2, init_lora_weights=False))
    with adapters.routed(["a", None, "b"]):
        mixed = logits(model, inputs)
    for row, name in enumerate(("a", None, "b")):
        with adapters.activated([name] if name else []):
            own = {key: tensor[row : row + 1] for key, tensor in inputs.items()}
            torch.testing.assert_close(mixed[row : row + 1], logits(model, own), rtol=1e-4, atol=1e-5)


def test_a_start_from_the_bases_weight_starts_as_the_base_and_is_saved_plain(tmp_path: Any) -> None:
    model, inputs = tiny("llama"), batch("llama")
    before = logits(model, inputs)
    adapters = graft(model, CONFIG.replace(init_lora_weights="pissa"))
    torch.testing.assert_close(logits(model, inputs), before, rtol=1e-4, atol=1e-5)
    stir(adapters)
    expected = logits(model, inputs)
    adapters.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    torch.testing.assert_close(logits(theirs, inputs), expected, rtol=0, atol=1e-5)


def test_a_bias_of_the_update_is_refused() -> None:
    with pytest.raises(ConfigError, match="lora_bias cannot be used with use_dora"):
        CONFIG.replace(lora_bias=True)
