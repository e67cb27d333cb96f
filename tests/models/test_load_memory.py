"""What loading a quantised base costs in memory, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from .bases import tokenizer

HIDDEN, INNER, LAYERS, VOCABULARY = 2048, 5632, 10, 16_000
MB = 1_000_000

MEASURE = """
import json, re, sys
from pathlib import Path
from graftlm.models.footprint import footprint
from graftlm.models.load import load_model

def kilobytes():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

load_model("sprout", quantization=sys.argv[2], dtype="bfloat16", device="cpu")  # imports, compiles
Path("/proc/self/clear_refs").write_text("5")  # the mark starts afresh
before = kilobytes()
model, _ = load_model(sys.argv[1], quantization=sys.argv[2], dtype="bfloat16", device="cpu")
found = footprint(model)
print(json.dumps({"peak": 1024 * (kilobytes() - before), "packed": found.packed_bytes,
                  "others": sum(found.other_bytes.values()), "bits": found.bits_per_parameter}))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 1 GB in eleven files. Its layers repeat the same values: making them takes longest."""
    folder = tmp_path_factory.mktemp("gigabyte")
    config = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
    LlamaConfig(
        vocab_size=VOCABULARY, dtype="bfloat16", architectures=["LlamaForCausalLM"], **config, **heads
    ).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    shapes = {f"mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")}
    shapes |= {"mlp.down_proj": (HIDDEN, INNER)}
    shapes |= {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qo"}
    shapes |= {f"self_attn.{name}_proj": (512, HIDDEN) for name in "kv"}
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), torch.ones(HIDDEN).bfloat16())
    layer = {name: torch.randn(shape).mul_(0.02).bfloat16() for name, shape in shapes.items()} | norms
    ends = {name: torch.randn(VOCABULARY, HIDDEN).bfloat16() for name in ("model.embed_tokens", "lm_head")}
    parts = [ends | {"model.norm": torch.ones(HIDDEN).bfloat16()}]
    for number in range(LAYERS):
        parts.append({f"model.layers.{number}.{name}": value.clone() for name, value in layer.items()})
    places = {}
    for number, part in enumerate(parts):
        tensors = {f"{name}.weight": value for name, value in part.items()}
        save_file(tensors, folder / f"part-{number}.safetensors", metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_memory_peaks_at_the_quantised_model(kind: str, base: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(base), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    model, largest = found["packed"] + found["others"], 2 * VOCABULARY * HIDDEN
    print(
        f"{kind}: peak {found['peak'] / MB:.0f} MB, model {model / MB:.0f} MB ({found['bits']:.3f} bits), "
        f"largest tensor {largest / MB:.0f} MB"
    )
    assert found["peak"] <= model + 3 * largest + 150 * MB
    assert found["peak"] <= model + largest, "the bound of today's code"
