from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import graftlm as gl
from graftlm.formats.content_digest import content_digest


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _ = gl.load_model("sprout")
    folder = tmp_path_factory.mktemp("adapter")
    gl.attach(model, gl.LoraConfig(r=2, target_modules=["q_proj"])).save(folder)
    return folder


def changed(saved: Path, to: Path) -> Path:
    return shutil.copytree(saved, to)


def test_the_same_content_elsewhere(saved: Path, tmp_path: Path) -> None:
    copy = changed(saved, tmp_path / "other-name")
    config = json.loads((copy / "adapter_config.json").read_text())
    config |= {"revision": "v2", "base_model_name_or_path": "/moved/base", "inference_mode": False}
    (copy / "adapter_config.json").write_text(json.dumps(config))
    (copy / "graft.json").unlink()
    assert content_digest(copy) == content_digest(saved)


@pytest.mark.parametrize("field", ["lora_alpha", "r", "use_rslora"])
def test_a_field_that_decides(saved: Path, tmp_path: Path, field: str) -> None:
    copy = changed(saved, tmp_path / "copy")
    config = json.loads((copy / "adapter_config.json").read_text())
    config[field] = 5
    (copy / "adapter_config.json").write_text(json.dumps(config))
    assert content_digest(copy) != content_digest(saved)


@pytest.mark.parametrize("kind", ["value", "dtype", "name"])
def test_a_tensor_that_changed(saved: Path, tmp_path: Path, kind: str) -> None:
    copy = changed(saved, tmp_path / "copy")
    file = copy / "adapter_model.safetensors"
    tensors = load_file(file)
    key = min(tensors)
    if kind == "value":
        tensors[key].view(-1)[0] += 1e-3
    elif kind == "dtype":
        tensors[key] = tensors[key].to(torch.bfloat16)
    else:
        tensors[key.replace("layers.0", "layers.9")] = tensors.pop(key)
    save_file(tensors, file, metadata={"format": "pt"})
    assert content_digest(copy) != content_digest(saved)
