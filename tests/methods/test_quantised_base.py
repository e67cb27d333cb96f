"""Adapters on a base that Graft quantised, where the conformance matrix does not look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graftlm.core.errors import FormatError, TargetError
from graftlm.core.notices import forget_notices, notices_to
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach, attach_folder
from graftlm.methods.lora import LoraConfig
from graftlm.methods.resolve import resolve
from graftlm.quant.convert import quantise, quantised_layers
from graftlm.quant.embedding import quantise_embeddings
from graftlm.quant.packed import PackedWeight
from graftlm.quant.scheme import Scheme
from graftlm.testing.case import stir
from graftlm.testing.models import batch, logits, tiny, unquantised
from graftlm.testing.rows import ROWS
from graftlm.testing.snapshot import snapshot

LORA = LoraConfig(r=4, lora_alpha=8)
KINDS = ("llama-nf4", "llama-int8", "llama-fp8", "gpt2-nf4", "bart-nf4")
WANTS_EMBEDDINGS = (
    "lora, embeddings",
    "dora, embeddings",
    "lora, own head",
    "lora, token rows",
    "token rows",
)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_count_as_many_as_they_stand_for(kind: str) -> None:
    """Before and while merged."""
    adapters = attach(tiny(kind), LORA, storage=FOLDER)
    wanted = attach(tiny(unquantised(kind)), LORA, storage=FOLDER).count_parameters()
    assert adapters.count_parameters() == wanted
    adapters.merge()
    assert adapters.count_parameters() == wanted


def test_an_update_of_odd_sizes_is_that_of_the_decoded_layer() -> None:
    """Sizes that no block of 64 divides, and an odd number of weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 7), nn.Tanh(), nn.Linear(7, 5, bias=False))
    quantise(model, Scheme.parse("nf4"))
    dense = [layer.packed.decode() for layer in quantised_layers(model).values()]
    first: Any = model[0]
    x = torch.randn(3, 13)
    adapters = attach(model, LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"]), storage=FOLDER)
    stir(adapters)
    parts: list[Any] = list(adapters.parts("default").values())
    changed = [w + 2.0 * part.lora_B @ part.lora_A for w, part in zip(dense, parts, strict=True)]
    wanted = F.linear(torch.tanh(F.linear(x, changed[0], first.bias)), changed[1])
    torch.testing.assert_close(model(x), wanted)
    adapters.merge()
    torch.testing.assert_close(model(x), wanted)


def test_dora_reads_a_weight_once_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = attach(tiny("llama-nf4"), LORA.replace(use_dora=True), storage=FOLDER)
    counts = [0]
    decode = PackedWeight.decode

    def counted(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        counts[0] += 1
        return decode(packed, dtype)

    monkeypatch.setattr(PackedWeight, "decode", counted)
    for _ in range(3):
        logits(adapters.model, batch("llama"))
    assert counts[0] == len(adapters.parts("default"))


def test_a_plan_takes_no_memory_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for a start that reads the weights, and a part that stands at a whole stack of layers."""
    model = tiny("llama-nf4")
    unchanged = snapshot(model)

    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("a packed weight was read out")

    monkeypatch.setattr(PackedWeight, "decode", refuse)
    for name in ("dora", "pissa", "prefix", "bottleneck, parallel"):
        config = ROWS[name].case("llama").config
        assert resolve(model, config).parameters == resolve(tiny("llama"), config).parameters
    monkeypatch.undo()
    unchanged()


@pytest.mark.parametrize("kind", ["llama-nf4", "gpt2-nf4"])
@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "prompt", "prefix", *WANTS_EMBEDDINGS])
def test_embeddings_in_8_bits_are_read_and_not_trained(name: str, kind: str) -> None:
    model = tiny(kind)
    quantise_embeddings(model)
    config, unchanged = ROWS[name].case(unquantised(kind)).config, snapshot(model)
    if name in WANTS_EMBEDDINGS:
        with pytest.raises(TargetError):
            attach(model, config, storage=FOLDER)
    else:
        adapters = attach(model, config, storage=FOLDER)
        model.train()(**batch(kind)).loss.backward()
        assert all(p.grad is not None for p in adapters.parameters("default"))
        adapters.detach().eval()
    unchanged()


@pytest.mark.parametrize(
    ("trained_on", "kind"),
    [("llama-nf4", "llama"), ("llama", "llama-nf4"), ("llama-nf4", "llama-int8"), ("llama-fp8", "llama")],
)
def test_an_adapter_goes_on_the_base_in_another_storage_and_says_so(
    trained_on: str, kind: str, tmp_path: Path
) -> None:
    adapters = attach(tiny(trained_on), LORA, storage=FOLDER)
    stir(adapters)
    adapters.save(tmp_path)
    heard: list[str] = []
    forget_notices()
    with notices_to(heard.append):
        again = attach_folder(tiny(kind), tmp_path, storage=FOLDER)
        attach_folder(tiny(trained_on), tmp_path, storage=FOLDER)
    assert len(heard) == 1 and "It works" in heard[0]
    for key, parameter in adapters.named_parameters("default").items():
        assert torch.equal(again.named_parameters("default")[key], parameter)
    other = tiny(kind, seed=1)
    with pytest.raises(FormatError, match="another base"):
        attach_folder(other, tmp_path, storage=FOLDER)
