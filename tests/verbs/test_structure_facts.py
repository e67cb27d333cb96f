"""What is gathered of the files of adapters and models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from graftlm.core.errors import FormatError
from graftlm.verbs.diagnosing.structure import file_facts, structure_facts
from graftlm.verbs.diagnosing.subject import Subject, subject_of
from graftlm.verbs.tune_result import TuneResult

BLOCK = "base_model.model.model.layers.0"
PLAIN = {
    f"{BLOCK}.self_attn.q_proj.lora_A.weight": torch.ones(2, 8),
    f"{BLOCK}.self_attn.q_proj.lora_B.weight": torch.ones(8, 2),
    f"{BLOCK}.mlp.up_proj.lora_A.weight": torch.ones(2, 8),
    f"{BLOCK}.mlp.up_proj.lora_B.weight": torch.zeros(16, 2),
}
CONFIG = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "up_proj"]}


def adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_of_tensors() -> None:
    found = file_facts(PLAIN)
    assert (found.attention, found.feed_forward, found.outputs, found.still) == (1, 1, 2, 1)
    assert found.adapter_bytes == sum(tensor.nbytes for tensor in PLAIN.values())
    assert not found.copied and not found.adapted_ends and found.ends_are_equal


@pytest.mark.parametrize("suffix", ["embed_tokens.weight", "embed_tokens.base_layer.weight"])
def test_of_copies(suffix: str) -> None:
    table = {f"base_model.model.model.{suffix}": torch.ones(32, 8)}
    found = file_facts(PLAIN | table)
    assert found.copied == {"model.embed_tokens": 1024} and found.rows == 32
    assert found.copied_ends == ("model.embed_tokens",)
    both = file_facts(PLAIN | table | {"base_model.model.lm_head.weight": torch.zeros(32, 8)})
    assert both.copied_ends == ("lm_head", "model.embed_tokens") and not both.ends_are_equal


def test_of_an_adapted_head() -> None:
    keys = {f"base_model.model.lm_head.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    assert file_facts(PLAIN | keys).adapted_ends == ("lm_head",)


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        (
            {"auto_mapping": {"base_model_class": "LlamaForTokenClassification"}},
            "LlamaForTokenClassification",
        ),
        ({"task_type": "CAUSAL_LM"}, ""),
        ({}, ""),
    ],
)
def test_of_a_labelling_model(config: dict[str, Any], labels: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", PLAIN, **config)
    found = structure_facts(Subject(folder, adapters=(folder,)))
    assert found is not None and (found.labels, found.head_saved) == (labels, False)
    with_head = adapter(
        tmp_path / "b", {**PLAIN, "base_model.model.score.weight": torch.ones(2, 8)}, **config
    )
    assert (again := structure_facts(Subject(with_head, adapters=(with_head,)))) and again.head_saved


def test_of_siblings_and_logs(tmp_path: Path) -> None:
    still = {key: torch.zeros_like(tensor) for key, tensor in PLAIN.items()}
    root = adapter(tmp_path / "out", PLAIN)
    second = adapter(root / "second", still)
    (root / "trainer_state.json").write_text('{"global_step": 12}')
    found = structure_facts(subject_of(second, base="sprout"))
    assert found is not None and found.siblings == {"default": 0.5} and found.logged_steps == 12
    assert found.base is not None and found.base.ties and not found.base.has_head
    (root / "trainer_state.json").write_text("{}")
    with pytest.raises(FormatError, match="log of a trainer"):
        structure_facts(subject_of(second))


def test_a_base_that_is_not_here_is_no_error(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", PLAIN)
    for base in ("nobody/nothing", str(tmp_path)):
        found = structure_facts(Subject(folder, adapters=(folder,), base=base))
        assert found is not None and found.base is None


def test_of_a_run(tuned: TuneResult) -> None:
    found = structure_facts(subject_of(tuned.run))
    assert found is not None and found.files is not None and found.files.still == 0
    assert found.base is not None and found.base.ties and not found.siblings and found.loop is None


@pytest.mark.parametrize(
    ("ties", "differs", "split"), [(True, True, True), (True, False, False), (False, True, None)]
)
def test_of_a_whole_model(ties: bool, differs: bool, split: bool | None, tmp_path: Path) -> None:
    config = {"model_type": "llama", "vocab_size": 32, "tie_word_embeddings": ties}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    head = torch.zeros(32, 8) if differs else torch.ones(32, 8)
    save_file(
        {"model.embed_tokens.weight": torch.ones(32, 8), "lm_head.weight": head},
        tmp_path / "model.safetensors",
    )
    found = structure_facts(Subject(tmp_path, merged=tmp_path))
    assert found is not None and found.split_tie is split
