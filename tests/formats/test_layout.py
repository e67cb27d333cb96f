"""The folder on disk: the same bytes every time, and nothing is loaded that does not fit whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftlm.core.errors import FormatError, GraftError
from graftlm.formats.layout import CONFIG, EXTRA, FOLDER, TENSORS
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.attach import adapters_of, attach, attach_folder
from graftlm.methods.lora import LoraConfig

from ..methods.tiny import batch, logits, snapshot, stir, tiny

CONFIGS = {
    "roles": LoraConfig(r=2, target_modules="attention"),
    "gaussian": LoraConfig(r=2, target_modules=("q_proj", "lm_head"), init_lora_weights="gaussian"),
    "set": LoraConfig(r=2, target_modules={"v_proj", "q_proj", "up_proj"}),
    "copies": LoraConfig(r=2, target_modules=("embed_tokens", "down_proj"), modules_to_save=("norm",)),
}


def saved(folder: Path, config: LoraConfig, kind: str = "llama") -> AdapterSet:
    torch.manual_seed(4)
    adapters = attach(tiny(kind), config, storage=FOLDER)
    stir(adapters)
    adapters.save(folder)
    return adapters


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", CONFIGS)
def test_saving_twice_and_saving_what_was_loaded_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    adapters = saved(tmp_path / "first", CONFIGS[name])
    adapters.save(tmp_path / "second")
    model = tiny("llama")
    attach_folder(model, tmp_path / "first", storage=FOLDER).save(tmp_path / "third")
    assert set(bytes_of(tmp_path / "first")) == {CONFIG, TENSORS, EXTRA}
    assert bytes_of(tmp_path / "first") == bytes_of(tmp_path / "second") == bytes_of(tmp_path / "third")
    assert torch.equal(logits(model, batch("llama")), logits(adapters.model, batch("llama")))


SAVE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.formats.test_layout import CONFIGS, saved
for name, config in CONFIGS.items():
    saved(Path(sys.argv[1]) / name, config)
"""


def test_another_process_writes_the_same_bytes(tmp_path: Path, repository: Path) -> None:
    hash_seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    path = os.pathsep.join([str(repository / "src"), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
    command = [sys.executable, "-c", SAVE, str(tmp_path / "there"), str(repository)]
    subprocess.run(command, env=environment, check=True, timeout=300, capture_output=True)
    for name, config in CONFIGS.items():
        saved(tmp_path / "here" / name, config)
        assert bytes_of(tmp_path / "here" / name) == bytes_of(tmp_path / "there" / name)


def test_an_adapter_is_never_written_over_another(tmp_path: Path) -> None:
    adapters = saved(tmp_path, CONFIGS["roles"])
    before = bytes_of(tmp_path)
    with pytest.raises(FormatError, match="already holds"):
        adapters.save(tmp_path)
    assert bytes_of(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    adapters = saved(tmp_path / "a", CONFIGS["roles"])
    (tmp_path / "file").write_text("")
    with pytest.raises(GraftError, match="file"):
        adapters.save(tmp_path / "file")
    with pytest.raises(GraftError, match="file"):
        adapters.save(tmp_path / "file" / "below")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_not_saved(value: float, tmp_path: Path) -> None:
    adapters = saved(tmp_path / "a", CONFIGS["roles"])
    with torch.no_grad():
        next(adapters.parameters("default"))[0, 0] = value
    with pytest.raises(FormatError, match="not finite"):
        adapters.save(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def edit_config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(content))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


A_KEY = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"

DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), CONFIG),
    "no config": (lambda f: (f / CONFIG).unlink(), CONFIG),
    "config empty": (lambda f: (f / CONFIG).write_text(""), "JSON"),
    "config cut off": (lambda f: (f / CONFIG).write_text((f / CONFIG).read_text()[:90]), "JSON"),
    "config not text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "JSON"),
    "config a list": (lambda f: (f / CONFIG).write_text("[1]"), "list"),
    "no type": (lambda f: edit_config(f, peft_type=None), "peft_type"),
    "unknown type": (lambda f: edit_config(f, peft_type="HRA"), "HRA"),
    "rank of zero": (lambda f: edit_config(f, r=0), "r: "),
    "rank null": (lambda f: edit_config(f, r=None), "r: "),
    "dora": (lambda f: edit_config(f, use_dora=True), "lora_magnitude_vector"),
    "rank pattern": (lambda f: edit_config(f, rank_pattern={"k_proj": 7}), "shape of"),
    "lora bias": (lambda f: edit_config(f, lora_bias=True), r"missing: .*lora_B.bias"),
    "tokens": (lambda f: edit_config(f, trainable_token_indices=[1]), "trainable_tokens|another base"),
    "replication": (lambda f: edit_config(f, layer_replication=[[0, 1]]), "layer_replication"),
    "pissa": (lambda f: edit_config(f, init_lora_weights="pissa_niter_4"), "pissa"),
    "olora": (lambda f: edit_config(f, init_lora_weights="olora"), "olora"),
    "targets of another model": (lambda f: edit_config(f, target_modules=["c_attn"]), "c_attn"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), TENSORS),
    "only a pickle": (lambda f: (f / TENSORS).rename(f / "adapter_model.bin"), "pickle"),
    "tensors empty": (lambda f: (f / TENSORS).write_bytes(b""), TENSORS),
    "tensors cut off": (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-9]), TENSORS),
    "tensors of noise": (lambda f: (f / TENSORS).write_bytes(b"\x99" * 4000), TENSORS),
    "missing": (lambda f: edit_tensors(f, lambda t: t.pop(A_KEY)), f"missing: {A_KEY}"),
    "no tensor at all": (lambda f: edit_tensors(f, lambda t: t.clear()), "missing: "),
    "unexpected": (lambda f: edit_tensors(f, lambda t: t.update(x=t[A_KEY].clone())), "unexpected: x"),
    "of another site": (
        lambda f: edit_tensors(f, lambda t: t.update({A_KEY.replace("k_", "up_"): t[A_KEY].clone()})),
        r"unexpected: .*up_proj\.lora_A",
    ),
    "mis-shaped": (
        lambda f: edit_tensors(f, lambda t: t.update({A_KEY: t[A_KEY][:, 1:].clone()})),
        "shape of",
    ),
    "empty tensor": (lambda f: edit_tensors(f, lambda t: t.update({A_KEY: t[A_KEY][:0]})), "shape of"),
    "nan": (lambda f: edit_tensors(f, lambda t: t[A_KEY].fill_(float("nan"))), A_KEY),
    "other base weight": (
        lambda f: edit_tensors(
            f, lambda t: t.update({f"{A_KEY[:-13]}base_layer.weight": torch.ones(16, 32)})
        ),
        "other base weight",
    ),
    "damaged identity": (lambda f: (f / EXTRA).write_text('{"base": {"name": "x"}}'), EXTRA),
    "identity not json": (lambda f: (f / EXTRA).write_text("{"), EXTRA),
}


@pytest.mark.parametrize("already", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_the_model_is_untouched(damage: str, already: bool, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    saved(folder, CONFIGS["roles"])
    harm, word = DAMAGE[damage]
    harm(folder)
    model = tiny("llama")
    if already:
        attach(model, LoraConfig(r=1), "other", storage=FOLDER)
    unchanged, adapters = snapshot(model), adapters_of(model)
    with pytest.raises(GraftError, match=word):
        attach_folder(model, folder, storage=FOLDER)
    unchanged()
    assert adapters_of(model) is adapters
    assert adapters is None or adapters.names == ("other",)


def test_the_folder_above_points_to_the_adapter(tmp_path: Path) -> None:
    saved(tmp_path / "inner", CONFIGS["roles"])
    with pytest.raises(FormatError, match=r"Did you mean .*inner"):
        attach_folder(tiny("llama"), tmp_path, storage=FOLDER)


def test_unknown_fields_warn(tmp_path: Path) -> None:
    saved(tmp_path, CONFIGS["roles"])
    edit_config(tmp_path, invented_in_2031=True)
    model = tiny("llama")
    with pytest.warns(UserWarning, match="invented_in_2031"):
        attach_folder(model, tmp_path, storage=FOLDER)


def test_an_adapter_of_another_base_of_the_same_shapes_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, CONFIGS["roles"])
    other = tiny("llama", seed=1)
    unchanged = snapshot(other)
    with pytest.raises(FormatError, match="another base"):
        attach_folder(other, tmp_path, storage=FOLDER)
    unchanged()
    adapters = attach(other, LoraConfig(r=1), "other", storage=FOLDER)
    with pytest.warns(UserWarning, match="another base"):
        adapters.load(tmp_path, "anyway", strict=False)
    assert "anyway" in adapters


def test_a_base_that_was_tuned_a_little_is_another_base(tmp_path: Path) -> None:
    saved(tmp_path, CONFIGS["roles"])
    other = tiny("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.2)
    with pytest.raises(FormatError, match="another base"):
        attach_folder(other, tmp_path, storage=FOLDER)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_dtype_is_the_same_base(dtype: torch.dtype, tmp_path: Path) -> None:
    saved(tmp_path, CONFIGS["roles"])
    attach_folder(tiny("llama").to(dtype), tmp_path, storage=FOLDER)


def test_the_same_base_under_other_adapters_and_merges_is_the_same_base(tmp_path: Path) -> None:
    adapters = saved(tmp_path / "a", CONFIGS["roles"], "llama-tied")
    before = bytes_of(tmp_path / "a")
    adapters.add("other", LoraConfig(r=2, target_modules="mlp"))
    stir(adapters, "other")
    adapters.merge(["default", "other"])
    adapters.save(tmp_path / "b")
    assert bytes_of(tmp_path / "b") == before
    adapters.load(tmp_path / "a", "again")


def test_an_adapter_with_its_own_head_fits_a_base_with_any_head(tmp_path: Path) -> None:
    """A new classification head is random every time the base is loaded."""
    adapters = saved(tmp_path, LoraConfig(r=2, modules_to_save=("classifier",)), "bert")
    fresh = tiny("bert")
    with torch.no_grad():
        fresh.classifier.weight.normal_()
    attach_folder(fresh, tmp_path, storage=FOLDER)
    torch.testing.assert_close(logits(fresh, batch("bert")), logits(adapters.model, batch("bert")))


def test_not_strict_lists_what_was_not_applied(tmp_path: Path) -> None:
    saved(tmp_path, CONFIGS["roles"])
    edit_tensors(tmp_path, lambda t: t.update(x=t.pop(A_KEY)))
    adapters = attach(tiny("llama"), LoraConfig(r=1), "other", storage=FOLDER)
    with pytest.warns(UserWarning, match=f"missing: {A_KEY}; unexpected: x"):
        adapters.load(tmp_path, "partly", strict=False)
    assert adapters.active == ("other",) and "partly" in adapters.names
    assert not any(p.requires_grad for p in adapters.parameters("partly"))


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_leaves_no_half_loaded_adapter(tmp_path: Path) -> None:
    saved(tmp_path, CONFIGS["roles"])
    edit_tensors(tmp_path, lambda t: t.update(x=t.pop(A_KEY)))
    adapters = attach(tiny("llama"), LoraConfig(r=1), "other", storage=FOLDER)
    with pytest.raises(UserWarning, match="missing"):
        adapters.load(tmp_path, "partly", strict=False)
    assert adapters.names == ("other",)


def test_a_loaded_adapter_is_inactive_and_frozen_and_its_name_is_checked(tmp_path: Path) -> None:
    saved(tmp_path, CONFIGS["roles"])
    adapters = attach(tiny("llama"), LoraConfig(r=1), "other", storage=FOLDER)
    adapters.load(tmp_path, "again")
    assert adapters.active == adapters.trainable == ("other",)
    for name in ("again", "no/name"):
        with pytest.raises(GraftError, match=name):
            adapters.load(tmp_path, name)
    assert adapters.names == ("other", "again")


def test_a_sixteen_bit_file_loads_with_the_same_values(tmp_path: Path) -> None:
    saved(tmp_path, CONFIGS["roles"])
    tensors = {key: tensor.to(torch.bfloat16) for key, tensor in load_file(tmp_path / TENSORS).items()}
    save_file(tensors, tmp_path / TENSORS)
    adapters = attach_folder(tiny("llama"), tmp_path, storage=FOLDER)
    own = adapters.named_parameters("default")["model.layers.0.self_attn.k_proj.lora_A"]
    assert own.dtype == torch.float32 and torch.equal(own, tensors[A_KEY].float())


def test_saving_and_loading_do_no_network_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("network")

    monkeypatch.setattr(socket, "socket", refuse)
    saved(tmp_path, CONFIGS["roles"])
    attach_folder(tiny("llama"), tmp_path, storage=FOLDER)
