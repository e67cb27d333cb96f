"""(IA)^3 in PEFT's format: files of either side load on the other, and training takes the same steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach, attach_folder
from graftlm.methods.ia3 import IA3Config, IA3Input

from ..methods.tiny import batch, logits, stir, tiny
from .peers import noisy

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* is deprecated and will be removed in v6:FutureWarning",
    "ignore:Could not find a config file in:UserWarning",
    "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning",
)
"""What PEFT says about tiny models without a name."""

NAMES = ("adapter_config.json", "adapter_model.safetensors")
BERT = {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]}

# kind of model, PEFT's task, fields of both configs; without fields: the defaults of both
CASES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "llama": ("llama", "CAUSAL_LM", {}),
    "gpt2": ("gpt2", "CAUSAL_LM", {}),
    "bert": ("bert", None, BERT),
    "t5": ("t5", "SEQ_2_SEQ_LM", {}),
    "no feed-forward": ("llama", None, {"target_modules": ["k_proj", "up_proj"], "feedforward_modules": []}),
    "expressions": (
        "llama",
        None,
        {"target_modules": r".*\.1\..*(v|down)_proj", "feedforward_modules": r".*down_proj"},
    ),
    "excluded": (
        "bert",
        None,
        BERT | {"exclude_modules": ["attention.output.dense"], "modules_to_save": ["classifier"]},
    ),
    "classification": ("roberta", "SEQ_CLS", BERT),
}


def base(kind: str) -> Any:
    """A model in which every part has a say; BERT's usual start is next to zero."""
    return tiny(kind, **({"initializer_range": 0.3} if kind in ("bert", "roberta") else {}))


def theirs(kind: str, task: str | None, fields: dict[str, Any]) -> Any:
    """A PEFT model whose factors differ from 1."""
    torch.manual_seed(1)
    fields = fields | ({"fan_in_fan_out": True} if kind == "gpt2" else {})
    model = peft.get_peft_model(base(kind), peft.IA3Config(task_type=task, **fields)).eval()
    return noisy(model, 0.3)


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in load_file(folder / NAMES[1]).items()}


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saves_loads_here(case: str, tmp_path: Path) -> None:
    kind, task, fields = CASES[case]
    model = theirs(kind, task, fields)
    expected = logits(model, batch(kind))
    model.save_pretrained(tmp_path / "theirs")

    ours = base(kind)
    adapters = attach_folder(ours, tmp_path / "theirs", storage=FOLDER)
    torch.testing.assert_close(logits(ours, batch(kind)), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(logits(base(kind), batch(kind)), expected, atol=1e-3)
    adapters.save(tmp_path / "ours")
    assert shapes(tmp_path / "ours") == shapes(tmp_path / "theirs")
    before, after = (load_file(tmp_path / side / NAMES[1]) for side in ("theirs", "ours"))
    assert all(torch.equal(after[key], before[key]) for key in before)

    adapters.merge()
    torch.testing.assert_close(logits(ours, batch(kind)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_here_loads_in_peft(case: str, tmp_path: Path) -> None:
    kind, task, fields = CASES[case]
    if case == "classification":
        fields = fields | {"modules_to_save": ["classifier"]}
    ours = base(kind)
    adapters = attach(ours, IA3Config(task_type=task, **fields), storage=FOLDER)
    stir(adapters)
    expected = logits(ours, batch(kind))
    adapters.save(tmp_path / "ours")
    content = json.loads((tmp_path / "ours" / NAMES[0]).read_text())
    assert set(content) <= set(vars(peft.IA3Config()))
    assert content["fan_in_fan_out"] is (kind == "gpt2")

    model: Any = peft.PeftModel.from_pretrained(base(kind), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(model, batch(kind)), expected, rtol=0, atol=1e-5)
    model.save_pretrained(str(tmp_path / "again"))
    assert shapes(tmp_path / "again") == shapes(tmp_path / "ours")
    model.merge_adapter()
    torch.testing.assert_close(logits(model, batch(kind)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1])
def test_layers_are_written_as_names(layer: int, tmp_path: Path) -> None:
    """PEFT's config has no such field."""
    ours = tiny("llama")
    adapters = attach(ours, IA3Config(layers_to_transform=layer), storage=FOLDER)
    stir(adapters)
    adapters.save(tmp_path)
    model: Any = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    torch.testing.assert_close(logits(model, batch("llama")), logits(ours, batch("llama")), rtol=0, atol=1e-5)
    again = tiny("llama")
    assert [*attach_folder(again, tmp_path, storage=FOLDER).parts("default")] == [*adapters.parts("default")]


def test_a_file_of_one_key_loads(tmp_path: Path) -> None:
    model = theirs("llama", None, {})
    model.save_pretrained(tmp_path)
    (tmp_path / NAMES[0]).write_text(json.dumps({"peft_type": "IA3"}))
    ours = tiny("llama")
    parts = attach_folder(ours, tmp_path, storage=FOLDER).parts("default")
    assert {path for path, part in parts.items() if isinstance(part, IA3Input)} == {
        f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)
    }
    expected = logits(model, batch("llama"))
    torch.testing.assert_close(logits(ours, batch("llama")), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert", "t5"])
def test_ten_steps_of_adamw_are_pefts(case: str) -> None:
    kind, _, fields = CASES[case]

    def train(model: Any, parameters: list[Tensor]) -> list[Tensor]:
        model.train()
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for step in range(10):
            model(**batch(kind, seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach() for parameter in parameters]

    ours = base(kind)
    adapters = attach(ours, IA3Config(**fields), storage=FOLDER)
    mine = train(ours, [*adapters.parameters("default")])
    peft_fields = fields | ({"fan_in_fan_out": True} if kind == "gpt2" else {})
    model = peft.get_peft_model(base(kind), peft.IA3Config(**peft_fields))
    named = {
        key.replace("base_model.model.", "").replace(".default", ""): parameter
        for key, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    other = train(model, [named[key] for key in adapters.named_parameters("default")])
    assert len(other) == len(named)
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert all(not torch.allclose(a, torch.ones(()), atol=1e-3) for a in mine)


@pytest.mark.parametrize("name", ["stories260K", "gpt2-tiny-en"])
def test_real_models_round_trip_through_peft(name: str, shared: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(shared / "models" / name).eval()

    inputs = {"input_ids": torch.arange(3, 40).view(1, -1)}
    ours = base()
    adapters = attach(ours, IA3Config(), storage=FOLDER)
    stir(adapters)
    adapters.save(tmp_path)
    model: Any = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(logits(model, inputs), logits(ours, inputs), rtol=0, atol=1e-4)
    again = base()
    attach_folder(again, tmp_path, storage=FOLDER)
    assert torch.equal(logits(again, inputs), logits(ours, inputs))
