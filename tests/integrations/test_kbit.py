"""PEFT's names on quantised bases: of bitsandbytes, where PEFT is the oracle, and of Graft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from graftlm.core.errors import ConfigError
from graftlm.integrations import peft_api
from graftlm.quant.convert import quantised_layers
from graftlm.testing.models import batch, logits, tiny

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")  # in PEFT

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""In evaluation bitsandbytes wants whole blocks of 64 in a row on a CPU, and 32 rows."""
PLAIN = {"use_reentrant": False}
FIELDS: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny("llama", **WIDE).save_pretrained(folder)
    return folder


def load(stored: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    quantisation = BitsAndBytesConfig(**(options or NF4))
    return AutoModelForCausalLM.from_pretrained(stored, quantization_config=quantisation, dtype=dtype).train()


def facts(model: Any) -> list[tuple[str, torch.dtype, bool]]:
    return [(name, p.dtype, p.requires_grad) for name, p in model.named_parameters()]


@pytest.mark.parametrize(
    "options",
    [
        NF4,
        {**NF4, "bnb_4bit_quant_storage": torch.bfloat16},
        pytest.param({"load_in_8bit": True}, marks=pytest.mark.slow),
    ],
    ids=["nf4", "nf4 in bfloat16 storage", "int8"],
)
def test_a_prepared_base_trains_as_in_peft(options: dict[str, Any], stored: Path) -> None:
    losses, prepared = [], []
    for library in (peft_api, peft):
        model = library.prepare_model_for_kbit_training(
            load(stored, **options), gradient_checkpointing_kwargs=PLAIN
        )
        prepared.append(facts(model))
        assert model.is_gradient_checkpointing
        torch.manual_seed(0)
        model = library.get_peft_model(model, library.LoraConfig(**FIELDS))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(**batch("llama")).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert prepared[0] == prepared[1]
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)
    assert losses[2] < losses[0]


@pytest.mark.parametrize(
    ("dtype", "kept"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]
)
def test_a_base_that_graft_quantised_is_prepared_without_copies(
    dtype: torch.dtype, kept: torch.dtype
) -> None:
    """bfloat16 stays; the range of float16 is too short for gradients. Packed weights stay in either case."""
    model = tiny("llama-nf4").to(dtype).train()
    codes = {path: layer.codes for path, layer in quantised_layers(model).items()}
    assert peft_api.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=PLAIN) is model
    assert {found for _, found, _ in facts(model)} == {kept}
    assert not any(flag for _, _, flag in facts(model))
    assert all(layer.codes is codes[path] for path, layer in quantised_layers(model).items())
    assert model.is_gradient_checkpointing
    adapted = peft_api.get_peft_model(model, peft_api.LoraConfig(**FIELDS))
    losses = []
    optimizer = torch.optim.AdamW(list(adapted.adapters.parameters("default")), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss = adapted(**batch("llama")).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
    assert all(p.grad is not None for p in adapted.adapters.parameters("default"))


def test_activations_are_recomputed_only_if_asked() -> None:
    model = peft_api.prepare_model_for_kbit_training(tiny("llama-nf4"), use_gradient_checkpointing=False)
    assert not model.is_gradient_checkpointing


def test_parameters_are_counted_as_in_peft(stored: Path) -> None:
    counts = [
        library.get_peft_model(load(stored), library.LoraConfig(**FIELDS)).get_nb_trainable_parameters()
        for library in (peft_api, peft)
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("base", ["bitsandbytes", "graft"])
def test_loftq_starts_from_where_the_base_came(base: str, stored: Path) -> None:
    def quantised() -> Any:
        if base == "bitsandbytes":
            return load(stored, torch.float32).eval()
        model = tiny("llama-nf4", **WIDE)
        model.config._name_or_path = str(stored)
        return model

    whole, inputs = logits(tiny("llama", **WIDE), batch("llama")), batch("llama")
    gap = float((logits(quantised(), inputs) - whole).norm())
    settings = peft_api.LoftQConfig(loftq_bits=4, loftq_iter=1)
    config = peft_api.LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights="loftq", loftq_config=settings
    )
    model = peft_api.get_peft_model(quantised(), config).eval()
    assert float((logits(model, inputs) - whole).norm()) < 0.7 * gap
    plain = peft_api.get_peft_model(quantised(), config.replaced(init_lora_weights=True)).eval()
    peft_api.replace_lora_weights_loftq(plain)
    torch.testing.assert_close(logits(plain, inputs), logits(model, inputs))


def test_a_callback_takes_back_what_does_not_help(stored: Path) -> None:
    model = peft_api.get_peft_model(load(stored, torch.float32), peft_api.LoraConfig(**FIELDS)).eval()
    before = logits(model, batch("llama"))
    asked: list[str] = []

    def callback(found: Any, path: str) -> bool:
        assert found is model
        asked.append(path)
        return False

    peft_api.replace_lora_weights_loftq(model, stored / "model.safetensors", callback=callback)
    assert len(asked) == len(model.adapters.parts("default"))
    assert torch.equal(logits(model, batch("llama")), before)


def test_loftq_on_a_base_that_is_not_quantised_is_refused(stored: Path) -> None:
    """PEFT puts rounded weights into such a base; here a base is never edited."""
    model = AutoModelForCausalLM.from_pretrained(stored)
    with pytest.raises(ConfigError, match="no adapted layer is quantised"):
        peft_api.get_peft_model(model, peft_api.LoraConfig(init_lora_weights="loftq", **FIELDS))
    assert not hasattr(model, "graft_adapters")
