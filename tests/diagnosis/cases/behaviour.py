"""What base and adapter do: merging, identity, virtual tokens, forgetting (D01, D09, D11, D24)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from case import Case, Diagnosed, tuned, write_rows
from safetensors.torch import load_file, save_file

from graftlm.models.sprout import demo_data_path, sprout_folder
from graftlm.verbs.merge import merge

Row = dict[str, Any]
SMALL = (
    "train.per_device_train_batch_size=4",
    "train.gradient_accumulation_steps=1",
    "data.max_length=128",
)
"""Steps of four rows, none of them cut."""


def messages(folder: Path, count: int = 90) -> Path:
    """The first rows of the embedded base's own task."""
    lines = demo_data_path().read_text(encoding="utf-8").splitlines()[:count]
    return write_rows(folder / "messages.jsonl", [json.loads(line) for line in lines])


# D01


def merged_into_the_original(folder: Path) -> Path:
    run = tuned(folder, messages(folder), *SMALL, "train.max_steps=40", method="qlora")
    return merge(run, folder / "merged", into="original").out


def merged_into_four_bits(folder: Path) -> Path:
    run = tuned(folder, messages(folder), *SMALL, "train.learning_rate=2e-4", method="qlora")
    return merge(run, folder / "merged", requantize="nf4", force=True).out


# D09


def with_another_base(folder: Path) -> Diagnosed:
    """The base was trained on, after the adapter was made for it."""
    run = tuned(folder, messages(folder), *SMALL)
    other = shutil.copytree(sprout_folder(), folder / "other-base")
    weights = load_file(other / "model.safetensors")
    (other / "model.safetensors").unlink()
    save_file(
        {name: -tensor.flip(0).contiguous() for name, tensor in weights.items()},
        other / "model.safetensors",
        metadata={"format": "pt"},
    )
    return Diagnosed(run, base=str(other))


def with_its_own_base(folder: Path) -> Path:
    return tuned(folder, messages(folder), *SMALL)


def with_a_stray_segment(folder: Path) -> Diagnosed:
    """Saved from inside a wrapper, as some tools do: every key has one segment too many."""
    adapter = tuned(folder, messages(folder), *SMALL) / "adapter"
    elsewhere = shutil.copytree(adapter, folder / "elsewhere")
    (elsewhere / "graft.json").unlink()
    tensors = load_file(elsewhere / "adapter_model.safetensors")
    prefix = "base_model.model."
    renamed = {key.replace(prefix, f"{prefix}module.", 1): tensor for key, tensor in tensors.items()}
    save_file(renamed, elsewhere / "adapter_model.safetensors", metadata={"format": "pt"})
    return Diagnosed(elsewhere, base="sprout")


def without_stray_segment(folder: Path) -> Diagnosed:
    return Diagnosed(tuned(folder, messages(folder), *SMALL) / "adapter", base="sprout")


def inert(folder: Path) -> Path:
    return tuned(folder, messages(folder), *SMALL, "train.learning_rate=1e-9")


def sums(folder: Path) -> Path:
    rows = [{"prompt": f"What is twice {n}?", "completion": f"It is {2 * n}."} for n in range(90)]
    return write_rows(folder / "sums.jsonl", rows)


def on_another_task(folder: Path) -> Diagnosed:
    """An adapter for messages is used for sums as well."""
    run = tuned(folder, messages(folder), *SMALL, "train.learning_rate=4e-3", "train.max_steps=40")
    return Diagnosed(run, data=sums(folder))


# D11


def random_prefix(folder: Path) -> Path:
    settings = (*SMALL, "method.num_virtual_tokens=8", "method.prefix_projection=false")
    return tuned(folder, messages(folder), *settings, method="prefix")


def random_prompt(folder: Path) -> Path:
    settings = (*SMALL, "method.num_virtual_tokens=8", "method.prompt_tuning_init=RANDOM")
    return tuned(folder, messages(folder), *settings, method="prompt")


# D24


def forgetful(folder: Path) -> Path:
    # What the base knew is told by the base: it writes the text itself.
    measured = ("eval.before_after=true", "eval.known_path=null")
    settings = (*SMALL, "train.learning_rate=6e-3", "train.max_steps=60", *measured)
    return tuned(folder, messages(folder), *settings)


CASES = (
    Case("D01", "original-base", merged_into_the_original, deep=True),
    Case("D01", "four-bits", merged_into_four_bits, deep=True),
    Case("D09", "another-base", with_another_base, with_its_own_base, deep=True),
    Case("D09", "stray-segment", with_a_stray_segment, without_stray_segment, deep=True),
    Case("D09", "inert", inert, deep=True),
    Case("D09", "another-task", on_another_task, deep=True),
    Case("D11", "random-prefix", random_prefix, deep=True),
    Case("D11", "random-prompt", random_prompt, deep=True),
    Case("D24", "large-steps", forgetful),
)
