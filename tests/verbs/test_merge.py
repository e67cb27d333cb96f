"""`graft merge`: what lands on disk is base and adapter in one, or nothing lands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import Outcome, files_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftlm.core.errors import FormatError, MergeError, UsageError
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import adapters_of, attach, attach_folder
from graftlm.methods.lora import LoraConfig
from graftlm.models import agreement as models_agreement
from graftlm.models.load import load_model
from graftlm.verbs.merge import MergeResult, merge
from graftlm.verbs.tune_result import TuneResult

IDS = torch.arange(3, 43).unsqueeze(0)


@pytest.fixture(scope="session")
def merged(tuned: TuneResult, tmp_path_factory: pytest.TempPathFactory) -> MergeResult:
    return merge(tuned.run, tmp_path_factory.mktemp("merges") / "merged")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_the_merged_model_in_plain_transformers(merged: MergeResult, tuned: TuneResult) -> None:
    adapted, tokenizer = load_model("sprout", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(merged.out, dtype=torch.float32)
    base = logits(adapted)
    attach_folder(adapted, tuned.adapter, storage=FOLDER)
    torch.testing.assert_close(logits(plain), logits(adapted), rtol=1e-5, atol=1e-4)
    assert float((logits(plain) - base).abs().max()) > 1e-2
    assert AutoTokenizer.from_pretrained(merged.out).get_vocab() == tokenizer.get_vocab()


def test_what_it_says(merged: MergeResult) -> None:
    assert merged.passed and merged.dtype == "float32", "the run's dtype"
    assert merged.reloaded.is_same_model and merged.in_memory.is_same_model
    figures = merged.as_dict()
    proof = json.loads((merged.out / "graft-merge.json").read_text())
    assert proof["reloaded"] == figures["reloaded"]
    files = files_of(merged.out)
    assert {"config.json", "model.safetensors", "tokenizer.json", "MANIFEST.json"} <= files.keys()
    assert "probes.safetensors" not in files


def test_it_is_a_base_like_any_other(merged: MergeResult) -> None:
    model, _ = load_model(str(merged.out))
    adapters = attach(model, LoraConfig(r=2), storage=FOLDER)
    assert adapters_of(model) is adapters


def test_in_another_dtype(tuned: TuneResult, tmp_path: Path) -> None:
    result = merge(tuned.adapter, tmp_path / "half", dtype="bfloat16")
    assert result.dtype == "bfloat16"
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_an_adapter_on_a_tied_embedding(tmp_path: Path) -> None:
    """The head gets a weight of its own, and the flag in the config says so."""
    model, _ = load_model("sprout", dtype="float32")
    assert model.config.tie_word_embeddings
    adapters = attach(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"]), storage=FOLDER)
    with torch.no_grad():
        for name, parameter in adapters.named_parameters("default").items():
            if name.endswith("_B"):
                parameter.normal_(std=0.05)
    expected = logits(model)
    adapters.save(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="unties the embeddings"):
        result = merge(tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    assert result.reloaded.is_same_model
    plain = AutoModelForCausalLM.from_pretrained(result.out, dtype=torch.float32)
    assert not plain.config.tie_word_embeddings
    torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_warnings_reach_people_as_notes(command: Callable[..., Outcome], tmp_path: Path) -> None:
    model, _ = load_model("sprout", dtype="float32")
    adapters = attach(model, LoraConfig(r=2, target_modules=["lm_head"]), storage=FOLDER)
    adapters.save(tmp_path / "adapter")
    done = command("merge", tmp_path / "adapter", "--out", tmp_path / "merged", "--json")
    assert done.code == 0, done.err
    assert "note: Merging unties the embeddings" in done.err
    assert "Warning" not in done.err
    assert done.json["passed"]


def test_an_existing_folder_is_left_alone(tuned: TuneResult, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UsageError, match="exists already"):
        merge(tuned.run, tmp_path / "mine")
    with pytest.raises(UsageError, match="is a file"):
        merge(tuned.run, tmp_path / "mine" / "notes.txt" / "below")
    assert files_of(tmp_path) == {"mine/notes.txt": b"keep"}


def test_another_base_is_refused(tuned: TuneResult, shared: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="another base"):
        merge(tuned.run, tmp_path / "merged", base=str(shared / "models" / "stories260K"))
    assert not list(tmp_path.iterdir())


def test_a_merge_that_overflows_gets_no_name(tuned: TuneResult, tmp_path: Path) -> None:
    """float16 overflows with a weight change this large: nothing can be proved, and nothing stays."""
    shutil.copytree(tuned.adapter, tmp_path / "huge")
    file = tmp_path / "huge" / "adapter_model.safetensors"
    tensors = {
        key: tensor * (1e4 if "lora_B" in key else 1e3 if "lora_A" in key else 1)
        for key, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(MergeError, match="not finite in float16"):
        merge(tmp_path / "huge", tmp_path / "merged", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["huge"]


def test_a_merge_that_says_something_else_gets_no_name(
    tuned: TuneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models_agreement, "MAX_MEAN_KL", -1.0)
    with pytest.raises(MergeError, match="The merged model differs from base") as refused:
        merge(tuned.run, tmp_path / "merged")
    assert "KL" in refused.value.seen and "--dtype" in refused.value.fix
    assert not list(tmp_path.iterdir())
