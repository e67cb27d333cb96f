"""What all sides of a row read: a base with random weights, the adapter they start from, the examples."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.case import Case, parse_case

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("GRAFT_SHARED", ROOT.parent / "shared"))
TOKENIZER = "gpt2-tiny-en"
"""Of the shared models: splits real examples into tokens."""
BASE, ADAPTER, EXAMPLES = "base", "adapter", "examples.json"
PHRASES, PHRASE = 64, 16
REDUCTION = 16
"""Of a bottleneck."""
VIRTUAL = 20
"""Tokens of a prefix."""

Example = tuple[list[int], list[int]]
"""Token ids, and labels: unshifted, -100 where nothing is learnt."""


def write(case: Case, folder: Path) -> None:
    """All that a row needs, into `folder`."""
    examples = real_examples(case) if case.data else phrases(case)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EXAMPLES).write_text(json.dumps(examples), encoding="utf-8")
    if not case.on_device:
        write_model(case, folder)


def write_model(case: Case, folder: Path) -> None:
    """A model with random weights and a tokenizer, and the adapter that every side starts from."""
    import torch
    from transformers import AutoModelForCausalLM

    from graftlm.formats.layout import FOLDER
    from graftlm.methods.attach import attach
    from graftlm.models.load import load_tokenizer

    torch.manual_seed(0)
    config = case.model.config(max(case.length, 2048))
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / BASE)
    load_tokenizer("sprout").save_pretrained(folder / BASE)
    adapters = attach(model, method_config(case), storage=FOLDER)
    adapters.save(folder / ADAPTER, "default")


def method_config(case: Case) -> Any:
    """Our configuration of the method; PEFT, where it has the method, reads the same from the folder."""
    from graftlm.methods.bottleneck import BottleneckConfig
    from graftlm.methods.ia3 import IA3Config
    from graftlm.methods.lora import LoraConfig
    from graftlm.methods.prefix import PrefixTuningConfig

    if case.method == "ia3":
        return IA3Config()
    if case.method == "prefix":
        return PrefixTuningConfig(num_virtual_tokens=VIRTUAL)
    if case.method == "bottleneck":
        return BottleneckConfig(reduction_factor=REDUCTION)
    return LoraConfig(
        r=case.rank,
        lora_alpha=2 * case.rank,
        lora_dropout=case.dropout,
        target_modules="all-linear",
        use_dora=case.method == "dora",
    )


def phrases(case: Case) -> list[Example]:
    """Rows with something to learn: drawn from 64 phrases of 16 tokens. Every token but the first counts."""
    import torch

    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(case.model.vocabulary, (PHRASES, PHRASE), generator=generator)
    picks = torch.randint(PHRASES, (case.steps * case.rows, -(-case.length // PHRASE)), generator=generator)
    rows: list[list[int]] = drawn[picks].flatten(1)[:, : case.length].tolist()
    return [(row, [-100, *row[1:]]) for row in rows]


def real_examples(case: Case) -> list[Example]:
    """The first training examples of a real data set, encoded by `graft tune`: the loss is on the answers."""
    from graftlm.models.load import load_tokenizer
    from graftlm.tasks.sft import SftTask
    from graftlm.training.recipe import DataSection, ModelSection, Recipe

    section = DataSection(path=str(SHARED / "data" / case.data), max_length=case.length)
    tokenizer = load_tokenizer(SHARED / "models" / TOKENIZER)
    task = SftTask(Recipe(model=ModelSection(name=TOKENIZER), data=section))
    task.read()
    task.encode(tokenizer)
    rows = task.dataset.train
    wanted = case.steps * case.examples
    if len(rows) < wanted:
        raise SystemExit(f"{case.data} has {len(rows)} examples, and {wanted} are needed")
    return [(list(row.input_ids), list(row.labels)) for row in rows[:wanted]]


def per_step(case: Case, folder: Path) -> list[list[Example]]:
    """The examples of every step, as they were written."""
    read = json.loads((folder / EXAMPLES).read_text(encoding="utf-8"))
    size = case.examples if case.data else case.rows
    return [[(ids, labels) for ids, labels in read[at : at + size]] for at in range(0, len(read), size)]


def lengths(steps: Sequence[Sequence[Example]]) -> list[int]:
    """Real tokens of every step."""
    return [sum(len(ids) for ids, _ in step) for step in steps]


if __name__ == "__main__":
    write(parse_case(sys.argv[1]), Path(sys.argv[2]))
