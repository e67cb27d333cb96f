"""Adapters on a base that bitsandbytes quantised while transformers loaded it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from graftlm.core.errors import TargetError
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import adapters_of, attach, attach_folder
from graftlm.methods.base import MethodConfig
from graftlm.methods.bottleneck import BottleneckConfig
from graftlm.methods.full import FullConfig
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lora import LoraConfig
from graftlm.methods.prefix import PrefixTuningConfig
from graftlm.methods.prompt import PromptTuningConfig
from graftlm.quant.convert import dequantise
from graftlm.testing.case import stir
from graftlm.testing.models import batch, logits, tiny
from graftlm.testing.snapshot import snapshot

bnb = pytest.importorskip("bitsandbytes")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
LOADS: dict[str, dict[str, Any]] = {
    "nf4": {**NF4, "bnb_4bit_compute_dtype": torch.float32},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}
METHODS: dict[str, MethodConfig] = {
    "lora": LoraConfig(r=4, lora_alpha=8),
    "dora": LoraConfig(r=4, lora_alpha=8, use_dora=True),
    "ia3": IA3Config(),
    "bottleneck": BottleneckConfig(reduction_factor=4),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
    "prompt": PromptTuningConfig(num_virtual_tokens=3),
    "norms": FullConfig(parts="norms"),
}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "initializer_range": 0.2}
"""The fast product of bitsandbytes on a CPU wants whole blocks of 64 in a row, and 32 rows."""
MERGED = ("lora", "dora", "ia3", "norms")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny("llama", **WIDE).save_pretrained(folder)
    return folder


def load(stored: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    options = BitsAndBytesConfig(**LOADS[kind])
    return AutoModelForCausalLM.from_pretrained(stored, quantization_config=options, dtype=dtype).eval()


def train(model: Any, name: str = "default", steps: int = 2) -> list[float]:
    adapters = adapters_of(model)
    assert adapters is not None
    optimizer = torch.optim.AdamW(list(adapters.parameters(name)), lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.train()(**batch("llama")).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_an_adapter_lives_its_life(kind: str, method: str, stored: Path, tmp_path: Path) -> None:
    model = load(stored, kind)
    unchanged = snapshot(model)
    adapters = attach(model, METHODS[method], storage=FOLDER)
    stir(adapters)
    with adapters.disabled():
        base = logits(model, batch("llama"))
    losses = train(model)
    assert losses[1] < losses[0]
    trained = logits(model, batch("llama"))
    assert not torch.allclose(trained, base, atol=1e-3)
    adapters.save(tmp_path)
    again = load(stored, kind)
    attach_folder(again, tmp_path, storage=FOLDER)
    torch.testing.assert_close(logits(again, batch("llama")), trained, rtol=0, atol=1e-6)
    if method in MERGED:
        adapters.merge()
        room = 0.4 if kind == "int8" else 1e-4  # where it is not merged, int8 rounds its input to 8 bits too
        torch.testing.assert_close(logits(model, batch("llama")), trained, rtol=1e-4, atol=room)
    assert adapters.detach() is model
    model.zero_grad()
    unchanged()
    assert torch.equal(logits(model, batch("llama")), logits(load(stored, kind), batch("llama")))


def test_a_base_that_was_evaluated_still_gives_gradients(stored: Path) -> None:
    """The CPU product of bitsandbytes for evaluation has none, and stays in place for training."""
    gradients = []
    for is_evaluated in (False, True):
        model = load(stored, "nf4")
        if is_evaluated:
            logits(model, batch("llama"))
        torch.manual_seed(0)
        adapters = attach(model, METHODS["lora"], storage=FOLDER)
        stir(adapters)
        if is_evaluated:
            logits(model, batch("llama"))
        model.train()(**batch("llama")).loss.backward()
        gradients.append([parameter.grad for parameter in adapters.parameters("default")])
    for fresh, evaluated in zip(*gradients, strict=True):
        assert fresh.norm() > 0
        # Evaluating before has rounded the scales of this base to bfloat16.
        assert (fresh - evaluated).norm() < 0.1 * fresh.norm()


@pytest.mark.parametrize("kind", [*LOADS])
def test_a_merge_gives_a_dense_model(kind: str, stored: Path) -> None:
    """The oracle is the same adapter, merged into the weights that bitsandbytes itself reads out."""
    model, plain = load(stored, kind), load(stored, kind)
    for path, module in plain.named_modules():
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            dense = nn.Linear(module.in_features, module.out_features, bias=False)
            dense.weight = nn.Parameter(read_out(module))
            plain.set_submodule(path, dense)
    results = []
    for one in (model, plain):
        torch.manual_seed(0)
        adapters = attach(one, METHODS["dora"], storage=FOLDER)
        stir(adapters)
        results.append(logits(adapters.merge_and_unload(), batch("llama")))
    room = 0.02 if kind == "int8" else 1e-4  # an 8-bit layer stands for float16, and becomes that
    torch.testing.assert_close(*results, rtol=1e-4, atol=room)
    assert not any(type(module).__module__.startswith("bitsandbytes") for module in model.modules())


def read_out(module: Any) -> Tensor:
    weight = module.weight
    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.data.float() * weight.SCB.float()[:, None] / 127


def test_parameters_count_as_many_as_they_stand_for(stored: Path) -> None:
    counts = [
        attach(model, METHODS["lora"], storage=FOLDER).count_parameters()
        for model in (tiny("llama", **WIDE), load(stored, "nf4"), load(stored, "int8"))
    ]
    assert counts[0] == counts[1] == counts[2]


def test_half_precision_stays_what_it_is(stored: Path) -> None:
    model = load(stored, "nf4", torch.bfloat16)
    adapters = attach(model, METHODS["lora"], storage=FOLDER, dtype="base")
    assert {p.dtype for p in adapters.parameters("default")} == {torch.bfloat16}
    assert logits(model, batch("llama")).dtype == torch.bfloat16


def test_a_file_goes_from_a_base_of_bitsandbytes_to_one_of_ours(stored: Path, tmp_path: Path) -> None:
    """The same codes, the same base: nothing is said about another one."""
    theirs = attach(load(stored, "nf4"), METHODS["lora"], storage=FOLDER)
    stir(theirs)
    theirs.save(tmp_path)
    ours = tiny("llama-nf4", **WIDE)
    attach_folder(ours, tmp_path, storage=FOLDER)
    found, wanted = logits(ours, batch("llama")), logits(theirs.model, batch("llama"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    dequantise(theirs.detach(), torch.float32)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (FullConfig(), "quantised"),
        (LoraConfig(modules_to_save=("q_proj",)), "q_proj"),
        (LoraConfig(target_modules=(), target_parameters=("q_proj.weight",)), "q_proj.weight is quantised"),
    ],
)
@pytest.mark.parametrize("kind", ["nf4", "int8", "ours"])
def test_quantised_weights_are_not_trained_themselves(
    config: MethodConfig, words: str, kind: str, stored: Path
) -> None:
    model = tiny("llama-nf4") if kind == "ours" else load(stored, kind)
    unchanged = snapshot(model)
    with pytest.raises(TargetError, match=words):
        attach(model, config, storage=FOLDER)
    unchanged()
