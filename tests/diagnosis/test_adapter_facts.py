from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from graftlm.diagnosis.facts.adapter import LayerChange
from graftlm.models.load import load_model
from graftlm.models.sprout import sprout_folder
from graftlm.verbs.diagnosing.adapter import adapter_facts, spectrum
from graftlm.verbs.diagnosing.subject import subject_of

# Of transformers, when PEFT asks whether layers are checkpointed.
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(6, 20), st.integers(6, 20), st.integers(0, 99))
def test_a_spectrum_is_that_of_the_dense_product(rank: int, rows: int, columns: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, columns, generator=draw), torch.randn(rows, rank, generator=draw)
    dense = torch.linalg.svdvals(0.5 * b.double() @ a.double())[:rank]
    torch.testing.assert_close(torch.tensor(spectrum(a, b, -0.5), dtype=torch.float64), dense)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=12))
def test_ranks_lie_within_the_rank(values: list[float]) -> None:
    change = LayerChange("q", len(values), tuple(sorted(values, reverse=True)))
    assert 0 <= change.effective_rank <= change.rank
    assert 0 <= change.stable_rank <= change.rank + 1e-9
    assert change.tail(0) in (0.0, pytest.approx(1.0)) and change.tail(change.rank) == 0
    if not change.is_zero:
        assert change.tail(change.effective_rank) <= 0.01 + 1e-9 < 1


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Of PEFT, with one layer that was trained."""
    model, _ = load_model(str(sprout_folder()))
    wrapped = get_peft_model(model, PeftConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    with torch.no_grad():
        wrapped.get_submodule(
            "base_model.model.model.layers.1.self_attn.q_proj"
        ).lora_B.default.weight.normal_()
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_of_peft(adapter: Path) -> None:
    facts = adapter_facts(subject_of(adapter))
    assert facts is not None and facts.layers is not None and facts.still is not None
    assert (facts.kind, facts.trained, len(facts.still)) == ("LORA", 4, 3)
    changed = next(layer for layer in facts.layers if not layer.is_zero)
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    dense = 2.0 * tensors[key.format("B")].double() @ tensors[key.format("A")].double()
    assert changed.square == pytest.approx(float(dense.square().sum()))
    assert (key.format("A"), (4, 256), "float32") in facts.tensors


def test_tensors_that_are_no_numbers_are_named(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(iter(tensors))
    tensors[key][0, 0] = float("nan")
    save_file(tensors, path)
    facts = adapter_facts(subject_of(adapter))
    assert facts is not None and facts.not_finite == (key,)
