"""A base whose layers stay in files: the same values to the bit, in the memory of two layers."""

from __future__ import annotations

import copy
import os
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from graftlm.core.errors import ConfigError, ModelError
from graftlm.core.notices import collected, forget_notices
from graftlm.methods.adaption_prompt import AdaptionPromptConfig
from graftlm.methods.attach import adapters_of
from graftlm.methods.base import MethodConfig
from graftlm.methods.bottleneck import BottleneckConfig
from graftlm.methods.full import FullConfig
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lora import LoraConfig
from graftlm.methods.merge_in_passing import merged_in_passing
from graftlm.methods.prefix import PrefixTuningConfig
from graftlm.models.attach import attach_from_base
from graftlm.models.load import load_model
from graftlm.models.recompute.policy import Policy, recomputing
from graftlm.models.save_quantised import save_base
from graftlm.models.streaming.disk import DiskMover
from graftlm.models.streaming.streamed import placement_of, streamed_layers, streaming_of
from graftlm.models.tensor_files import read_headers

from .bases import checkpoint, small, tokenizer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="mapped memory cannot be released there")
LORA = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, init_lora_weights="gaussian")
IDS = torch.randint(4, 16, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh_notices() -> Iterator[None]:
    forget_notices()
    yield
    forget_notices()


def load(folder: Path, placement: str, **options: Any) -> Any:
    return load_model(folder, device="cpu", placement=placement, **options)[0]


def trained(
    model: Any, config: MethodConfig = LORA, policy: Policy = "nothing", steps: int = 10
) -> list[Tensor]:
    """Losses, gradient norms and the trained weights of some steps."""
    torch.manual_seed(0)
    adapters = attach_from_base(model, config, "default")
    parameters = list(adapters.named_parameters("default").values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    model.train()
    found: list[Tensor] = []
    ids = IDS.to(model.device)
    with recomputing(model, policy):
        for _ in range(steps):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            found += [loss.detach(), torch.nn.utils.clip_grad_norm_(parameters, 1.0)]
            optimizer.step()
            optimizer.zero_grad()
    return found + [parameter.detach() for parameter in parameters]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def all_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def saved(folder: Path, kind: str, stored: str) -> Path:
    """A checkpoint of several files, in that dtype or quantised."""
    dtype = torch.float32 if stored == "nf4-float32" else torch.bfloat16 if "-" in stored else None
    dense = checkpoint(folder / "dense", kind, shards="60KB", dtype=dtype or getattr(torch, stored))
    if dtype is None:
        return dense
    packed, name = stored.split("-")
    save_base(
        *load_model(dense, quantization=packed, dtype=name, device="cpu"),
        folder / "packed",
        max_shard_size="30KB",
    )
    return folder / "packed"


CASES = [
    ("llama", "float32", "nothing"),
    ("llama", "float32", "everything"),
    ("llama", "bfloat16", "nothing"),
    ("llama", "bfloat16", "everything"),
    ("llama", "nf4-bfloat16", "nothing"),
    ("llama", "nf4-bfloat16", "everything"),
    ("llama", "nf4-float32", "nothing"),
    ("llama-tied", "float32", "nothing"),
    ("gpt2", "bfloat16", "everything"),
    ("gemma3", "nf4-float32", "everything"),
    ("cut-up", "float32", "nothing"),
    ("cut-up", "int8-bfloat16", "everything"),
    ("llama", "fp8-bfloat16", "nothing"),
]


@pytest.mark.parametrize(("kind", "stored", "policy"), CASES)
def test_training_is_equal_to_the_bit(kind: str, stored: str, policy: Policy, tmp_path: Path) -> None:
    folder = saved(tmp_path, kind, stored)
    dtype = stored.rpartition("-")[2]
    steps = 3 if kind == "cut-up" else 10  # that one goes through its layers many times
    resident = trained(load(folder, "resident", dtype=dtype), policy=policy, steps=steps)
    assert all_equal(trained(load(folder, "disk", dtype=dtype), policy=policy, steps=steps), resident)


METHODS: dict[str, MethodConfig] = {
    "dora": LoraConfig(r=4, use_dora=True),
    "pissa": LoraConfig(r=4, init_lora_weights="pissa"),
    "modules_to_save": LoraConfig(r=4, modules_to_save=["lm_head", "layers.1.mlp.down_proj"]),
    "ia3": IA3Config(),
    "bottleneck": BottleneckConfig(),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
    "adaption_prompt": AdaptionPromptConfig(adapter_layers=2),
    "norms": FullConfig(parts="norms"),
}


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_every_method_trains_on_it(config: MethodConfig, tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", "float32")
    resident = trained(load(folder, "resident"), config, steps=3)
    assert all_equal(trained(load(folder, "disk"), config, steps=3), resident)


def test_a_sequence_to_sequence_model(tmp_path: Path) -> None:
    folder = saved(tmp_path, "t5", "float32")
    found = []
    for placement in ("resident", "disk"):
        model = load(folder, placement)
        with torch.no_grad():
            found.append(model(input_ids=IDS, decoder_input_ids=IDS).logits)
    assert torch.equal(*found)


def test_writing_text_and_saving(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", "nf4-bfloat16")
    written, files = [], []
    for placement in ("resident", "disk"):
        model, made = load_model(folder, dtype="bfloat16", device="cpu", placement=placement)
        written.append(model.generate(IDS[:1], max_new_tokens=8, do_sample=False))
        save_base(model, made, tmp_path / placement)
        files.append({file.name: file.read_bytes() for file in (tmp_path / placement).iterdir()})
    assert torch.equal(*written)
    assert files[0] == files[1]


def test_merged_in_passing(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", "float32")
    found = []
    for placement in ("resident", "disk"):
        model = load(folder, placement)
        trained(model, LoraConfig(r=4), steps=2)
        adapters = adapters_of(model.eval())
        assert adapters is not None
        with merged_in_passing(adapters):
            found.append(logits(model))
    assert torch.equal(*found)


# ------------------------------------------------------------------------------------------ memory


def wide(folder: Path, layers: int) -> Path:
    """Layers of 72 pages in one file each, and small ends."""
    config = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": layers}
    small("llama", **config).save_pretrained(folder, max_shard_size="600KB")
    tokenizer().save_pretrained(folder)
    return folder


def mapped_bytes(folder: Path) -> int:
    """Resident pages of this process that lie in files of that folder."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = str(folder) in line
        elif inside and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


def _note(folder: Path, peaks: list[int], *_: object) -> None:
    peaks.append(mapped_bytes(folder))


def layer_bytes(model: nn.Module) -> int:
    return max(sum(p.nbytes for p in layer.parameters() if p.dim() > 1) for layer in streamed_layers(model))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("policy", ["nothing", "everything"])
def test_two_layers_are_in_memory_whatever_their_number(policy: Policy, tmp_path: Path) -> None:
    held: dict[int, int] = {}
    for layers in (4, 10):
        folder = wide(tmp_path / str(layers), layers)
        model = load(folder, "disk")
        ends = sum(p.nbytes for p in (model.lm_head.weight, model.model.embed_tokens.weight))
        peaks: list[int] = []
        note = partial(_note, folder, peaks)
        for layer in streamed_layers(model):
            layer.register_forward_hook(note)
            layer.get_submodule("mlp").register_full_backward_hook(note)
        trained(model, LoraConfig(r=2), policy=policy, steps=1)
        assert len(peaks) >= 2 * layers
        assert max(peaks) <= 2 * layer_bytes(model) + ends + 64 * 4096
        held[layers] = max(peaks)
    assert held[10] - held[4] <= layer_bytes(model) // 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_release_all(tmp_path: Path) -> None:
    folder = wide(tmp_path / "base", 6)
    model = load(folder, "disk")
    for parameter in model.parameters():
        parameter.detach().sum()
    assert mapped_bytes(folder) > 4 * layer_bytes(model)
    streaming = streaming_of(model)
    assert streaming is not None
    streaming.release_all()
    assert mapped_bytes(folder) < layer_bytes(model)


# ------------------------------------------------------------------------------- what is said, refused


def test_it_says_what_a_pass_reads(tmp_path: Path) -> None:
    model = load(saved(tmp_path, "llama", "bfloat16"), "disk")
    placement, why = placement_of(model)
    assert placement == "disk"
    assert re.search(r"2 layers of .* stay on disk, .* each pass, forward or backward, reads 0.1 MB", why)
    assert any(why in said for said in collected())
    assert placement_of(small("llama")) == ("resident", "the whole base is in memory")


@pytest.mark.parametrize(("placement", "near"), [("disc", "'disk'"), ("gpu", "resident, disk, host")])
def test_an_unknown_placement(placement: str, near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_model("./nowhere", placement=placement)
    assert near in str(caught.value)


def test_host_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the device is the CPU"):
        load_model("./nowhere", placement="host", device="cpu")


def test_another_dtype_than_the_stored_one(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", "float32")
    with pytest.raises(ModelError, match="stored in float32 and is to compute in bfloat16") as caught:
        load(folder, "disk", dtype="bfloat16")
    assert "dtype='float32'" in caught.value.fix and "save_pretrained" in caught.value.fix


def test_a_base_that_would_have_to_be_quantised(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", "bfloat16")
    with pytest.raises(ConfigError, match="not stored as nf4") as caught:
        load(folder, "disk", quantization="nf4")
    assert "save_base" in caught.value.fix


def test_experts_that_are_rearranged_and_what_helps(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "base", "mixtral")
    with pytest.raises(ModelError, match="cannot be used from its files") as caught:
        load(folder, "disk")
    assert "save_original_format=False" in caught.value.fix
    model, made = load_model(folder, device="cpu")
    model.save_pretrained(tmp_path / "again", save_original_format=False)
    made.save_pretrained(tmp_path / "again")
    streamed = trained(load(tmp_path / "again", "disk"), steps=3)
    assert all_equal(streamed, trained(load(folder, "resident"), steps=3))


def test_a_missing_and_a_cut_file(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", "float32")
    first = sorted(folder.glob("*.safetensors"))[0]
    os.truncate(first, first.stat().st_size - 8)
    with pytest.raises(ModelError, match="cut short"):
        load(folder, "disk")
    first.unlink()
    with pytest.raises(ModelError, match="lacks 1 of"):
        load(folder, "disk")


def test_a_missing_tensor(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "base", "llama")
    file = folder / "model.safetensors"
    tensors = {name: stored.read() for name, stored in read_headers([file]).items()}
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="do not fill its model") as caught:
        load(folder, "disk")
    assert "model.layers.1.mlp.up_proj.weight" in str(caught.value)


def test_files_that_are_deleted_or_replaced_stay_readable(tmp_path: Path) -> None:
    folder = wide(tmp_path / "base", 3)
    model = load(folder, "disk")
    before = logits(model)
    for file in folder.glob("*.safetensors"):
        file.unlink()
        file.write_bytes(b"something else")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("how", ["cut", "written"])
def test_files_that_change_in_place(how: str, tmp_path: Path) -> None:
    folder = wide(tmp_path / "base", 3)
    model = load(folder, "disk")
    logits(model)
    for file in folder.glob("*.safetensors"):
        if how == "cut":
            os.truncate(file, 4096)
        else:
            with file.open("r+b") as opened:
                opened.seek(-64, os.SEEK_END)
                opened.write(bytes(64))
            os.utime(file)
    with pytest.raises(ModelError, match="was changed while it was in use"):
        logits(model)


def test_a_weight_that_is_written_to(tmp_path: Path) -> None:
    model = load(wide(tmp_path / "base", 4), "disk")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    with pytest.raises(ModelError, match="layer 1 was written to"):
        logits(model)


def test_tensors_at_odd_addresses_are_read(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "base", "llama")
    expected = logits(load(folder, "resident"))
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" "  # JSON ends in as much space as anybody likes
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    with pytest.raises(ModelError, match="cannot be used from its files"):
        load(folder, "disk")
    assert torch.equal(logits(load(folder, "resident")), expected)


def test_a_model_without_marked_layers() -> None:
    with pytest.raises(ModelError, match="no layers that could be streamed"):
        streamed_layers(nn.Sequential(nn.Linear(2, 2)))


def test_a_copy_of_a_model_has_weights_of_its_own(tmp_path: Path) -> None:
    model = load(saved(tmp_path, "llama", "float32"), "disk")
    again = copy.deepcopy(model)
    assert torch.equal(logits(again), logits(model))
    streaming = streaming_of(model)
    assert streaming is not None and isinstance(streaming.mover, DiskMover)
