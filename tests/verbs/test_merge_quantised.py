"""`graft merge` for adapters of a quantised base: into what it was trained on, the original, or packed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Outcome, files_of
from transformers import AutoModelForCausalLM

from graftlm.core.errors import ConfigError, MergeError, UsageError
from graftlm.formats.fingerprint import scheme_of
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach, attach_folder
from graftlm.methods.lora import LoraConfig
from graftlm.models.load import load_model
from graftlm.quant.convert import is_quantised, quantised_layers
from graftlm.verbs.combine import combine
from graftlm.verbs.merge import merge

IDS = torch.arange(3, 43).unsqueeze(0)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def trained_base(name: str, quantization: str = "nf4") -> Any:
    """The weights as trained on in bfloat16, in float32 arithmetic."""
    model, _ = load_model(name, dtype="bfloat16", quantization=quantization)
    return model.float()


def an_adapter(folder: Path, size: float, quantization: str = "nf4", base: str = "sprout") -> Path:
    """A random adapter on a quantised base, saved; `size` is the deviation of B."""
    model = trained_base(base, quantization)
    torch.manual_seed(0)
    adapters = attach(model, LoraConfig(r=4, lora_alpha=8), storage=FOLDER)
    with torch.no_grad():
        for name, parameter in adapters.named_parameters("default").items():
            if name.endswith("_B"):
                parameter.normal_(std=size)
    adapters.save(folder)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return an_adapter(tmp_path_factory.mktemp("adapters") / "nf4", 0.03)


def test_it_is_merged_into_what_it_was_trained_on(trained: Path, tmp_path: Path) -> None:
    facts = json.loads((trained / "graft.json").read_text())
    assert facts["base_quantization"] == {"kind": "nf4", "double_quant": True, "block_size": 64}
    result = merge(trained, tmp_path / "merged", dtype="float32")
    assert result.base_quantization == "nf4" and result.dtype == "float32"
    assert result.in_memory.is_same_model and result.reloaded.is_same_model
    assert any("nf4" in line for line in result.lines)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not is_quantised(plain) and "quantization_config" not in plain.config.to_dict()
    adapted = trained_base("sprout")
    attach_folder(adapted, trained, storage=FOLDER)
    torch.testing.assert_close(logits(plain), logits(adapted), rtol=1e-4, atol=1e-4)
    proof = json.loads((tmp_path / "merged" / "graft-merge.json").read_text())
    assert proof["base_quantization"] == "nf4" and proof["base"] == "sprout"


@pytest.mark.slow
def test_into_the_original_weights_with_the_figures_of_both(trained: Path, tmp_path: Path) -> None:
    result = merge(trained, tmp_path / "merged", dtype="float32", into="original")
    assert result.from_trained is not None
    near, far = result.from_trained["the dequantised base"], result.from_trained["the original base"]
    assert near.is_same_model and far.mean_kl > 10 * near.mean_kl
    assert result.as_dict()["from_trained"]["the original base"]["top1"] == far.top1
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    dense, _ = load_model("sprout", dtype="float32")
    attach_folder(dense, trained, storage=FOLDER)
    torch.testing.assert_close(logits(plain), logits(dense), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_in_8_bits_the_adapter_is_kept_and_the_base_loads_packed(trained: Path, tmp_path: Path) -> None:
    result = merge(trained, tmp_path / "merged", dtype="float32", requantize="int8")
    found = result.requantized
    assert found is not None and not found.is_forced and found.kept.kept > 0.95
    assert found.envelope.is_inside and result.reloaded.mean_kl < 1e-6, "the very bytes that were in memory"
    figures = result.as_dict()["requantized"]
    assert figures["kind"] == "int8" and len(figures["kept_by_layer"]) == 28
    model, _ = load_model(tmp_path / "merged", dtype="float32")
    stored = scheme_of(model)
    assert stored is not None and stored.kind == "int8"
    assert len(quantised_layers(model)) == 28
    assert {"graft-merge.json", "MANIFEST.json", "config.json"} <= files_of(tmp_path / "merged").keys()


def test_in_4_bits_a_small_adapter_is_lost_and_that_is_refused(tmp_path: Path) -> None:
    small = an_adapter(tmp_path / "small", 0.001)
    with pytest.raises(MergeError, match=r"nf4 keeps -?\d+\.\d % of the adapter's change") as refused:
        merge(small, tmp_path / "merged", dtype="float32", requantize="nf4")
    assert "force" in refused.value.fix and "% of the weights" in refused.value.meaning
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


@pytest.mark.slow
def test_by_force_it_is_written_and_says_so(tmp_path: Path) -> None:
    small = an_adapter(tmp_path / "small", 0.001)
    forced = merge(small, tmp_path / "merged", dtype="float32", requantize="nf4", force=True)
    assert forced.requantized is not None and forced.requantized.is_forced
    assert "by force" in forced.verdict and forced.requantized.kept.kept < 0.5


def test_options_that_make_no_sense(trained: Path, tmp_path: Path) -> None:
    for options, error, says in (
        ({"requantize": "nf5"}, ConfigError, "nf4"),
        ({"requantize": "none"}, ConfigError, "none"),
        ({"force": True}, UsageError, "--requantize"),
        ({"into": "orignal"}, ConfigError, "original"),
    ):
        with pytest.raises(error) as refused:
            merge(trained, tmp_path / "merged", **options)  # type: ignore[arg-type]
        assert says in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_a_dense_base_has_one_base(tmp_path: Path) -> None:
    dense = an_adapter(tmp_path / "dense", 0.03, quantization="none")
    assert "base_quantization" not in json.loads((dense / "graft.json").read_text())
    with pytest.raises(UsageError, match="not quantised"):
        merge(dense, tmp_path / "merged", into="original")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


@pytest.mark.slow
def test_a_dense_merge_may_be_packed_too(tmp_path: Path) -> None:
    dense = an_adapter(tmp_path / "dense", 0.03, quantization="none")
    result = merge(dense, tmp_path / "merged", dtype="float32", requantize="fp8")
    assert result.base_quantization == "none" and result.requantized is not None
    assert result.requantized.kind == "fp8" and result.requantized.kept.kept > 0.9


@pytest.mark.slow
def test_gpt2_gets_its_own_layout_back(shared: Path, tmp_path: Path) -> None:
    """Its linear layers store [in, out]; packed weights are [out, in]."""
    base = str(shared / "models" / "gpt2-tiny-en")
    adapter = an_adapter(tmp_path / "a", 0.03, base=base)
    result = merge(adapter, tmp_path / "merged", dtype="float32")
    assert result.reloaded.is_same_model
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    adapted = trained_base(base)
    attach_folder(adapted, adapter, storage=FOLDER)
    torch.testing.assert_close(logits(plain), logits(adapted), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_from_the_command_line(command: Callable[..., Outcome], trained: Path, tmp_path: Path) -> None:
    done = command("merge", trained, "--out", tmp_path / "m", "--requantize", "nf4", "--json")
    assert done.code == 1 and "keeps" in done.err and done.json["error"] == "MergeError"
    done = command("merge", trained, "--out", tmp_path / "m", "--requantize", "nf5")
    assert done.code == 2 and "nf4" in done.err
    done = command("merge", trained, "--out", tmp_path / "m", "--requantize", "nf4", "--force", "--json")
    assert done.code == 0, done.err
    assert done.json["requantized"]["forced"] and done.json["passed"]


def test_adapters_of_a_quantised_base_are_combined_without_it(tmp_path: Path) -> None:
    first, second = an_adapter(tmp_path / "a", 0.03), an_adapter(tmp_path / "b", 0.02)
    combine({str(first): 0.7, str(second): -0.3}, tmp_path / "both", base="no/such-model")
    facts = json.loads((tmp_path / "both" / "graft.json").read_text())
    assert facts["base_quantization"]["kind"] == "nf4"
    model = trained_base("sprout")
    base = logits(model)
    attach_folder(model, tmp_path / "both", storage=FOLDER)
    assert not torch.equal(logits(model), base)
