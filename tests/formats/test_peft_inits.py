"""Round trips with PEFT of adapters that began in another way, of token rows and of expert parameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from graftlm.core.errors import FormatError
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach, attach_folder
from graftlm.methods.lora import LoraConfig
from graftlm.methods.starts.eva import initialise_from_data
from graftlm.methods.tokens import TrainableTokensConfig

from ..methods.test_experts import EXPERTS, mixture
from ..methods.tiny import batch, logits, stir, tiny
from .peers import noisy

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* is deprecated and will be removed in v6:FutureWarning",
    "ignore:Could not find a config file in:UserWarning",
    "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:.*rank_pattern keys did not match any targeted module:RuntimeWarning",  # it looks at modules only
    "ignore:.*alpha_pattern keys did not match any targeted module:RuntimeWarning",
    "ignore:`init_lora_weights` is 'eva' but `eva_config` is not specified:UserWarning",
    "ignore:(PiSSA|OLoRA) changes the base weights of the model:UserWarning",
)

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
IDS = [9, 3, 30]
ATTENTION = ["q_proj", "v_proj"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pissa": ("llama", {"init_lora_weights": "pissa", "target_modules": ATTENTION}),
    "pissa fast": ("llama", {"init_lora_weights": "pissa_niter_4", "target_modules": ATTENTION}),
    "pissa rslora": (
        "llama",
        {"init_lora_weights": "pissa", "target_modules": ATTENTION, "use_rslora": True},
    ),
    "pissa dora": ("llama", {"init_lora_weights": "pissa", "target_modules": ATTENTION, "use_dora": True}),
    "pissa conv1d": ("gpt2", {"init_lora_weights": "pissa", "target_modules": ["c_attn", "c_fc"]}),
    "pissa embedding": ("gpt2", {"init_lora_weights": "pissa", "target_modules": ["wte", "c_fc"]}),
    "pissa patterns": (
        "llama",
        {"init_lora_weights": "pissa", "target_modules": "all-linear"}
        | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 5}},
    ),
    "olora": ("llama", {"init_lora_weights": "olora", "target_modules": "all-linear"}),
    "olora conv1d": ("gpt2", {"init_lora_weights": "olora", "target_modules": ["c_attn", "c_fc"]}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal", "target_modules": ATTENTION}),
    "eva": ("llama", {"init_lora_weights": "eva", "target_modules": [*ATTENTION, "o_proj", "down_proj"]}),
    "tokens": ("llama", {"target_modules": ATTENTION, "trainable_token_indices": IDS}),
    "tokens tied": ("llama-tied", {"target_modules": ATTENTION, "trainable_token_indices": IDS}),
    "tokens by name": (
        "llama",
        {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": IDS, "lm_head": [4]}},
    ),
    "tokens t5": ("t5", {"target_modules": ["q", "v"], "trainable_token_indices": IDS}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "experts": ("Mixtral", {"target_modules": [], "target_parameters": EXPERTS}),
    "experts beside layers": ("Qwen3Moe", {"target_modules": ATTENTION, "target_parameters": EXPERTS}),
    "one stack": ("Qwen3Moe", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "transposed experts": ("GptOss", {"target_modules": [], "target_parameters": EXPERTS}),
    "ranks of experts": (
        "Mixtral",
        {"target_modules": [], "target_parameters": EXPERTS}
        | {"rank_pattern": {"gate_up_proj": 2}, "alpha_pattern": {"gate_up_proj": 5}},
    ),
}


def base(kind: str) -> Any:
    return mixture(kind) if kind[0].isupper() else tiny(kind)


def inputs(kind: str) -> dict[str, Tensor]:
    found = batch("llama" if kind[0].isupper() else kind)
    found["input_ids"][0, : len(IDS)] = torch.tensor(IDS)
    return found


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    found = load_file(folder / TENSORS)
    return {key: tuple(t.shape) for key, t in found.items() if not key.endswith("base_layer.weight")}


def stirred(model: Any) -> Any:
    """A PEFT model whose adapter changes the output."""
    return noisy(model).eval()


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_here_loads_in_peft_on_the_untouched_base(case: str, tmp_path: Path) -> None:
    kind, fields = CASES[case]
    ours = base(kind)
    adapters = attach(ours, LoraConfig(**{"r": 4, "lora_alpha": 12} | fields), storage=FOLDER)
    if case == "eva":
        initialise_from_data(adapters, "default", [inputs(kind), batch(kind, rows=8, length=20)])
    stir(adapters)
    expected = logits(ours, inputs(kind))
    assert not torch.allclose(logits(base(kind), inputs(kind)), expected, atol=1e-3)
    adapters.save(tmp_path / "ours")
    content = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert content["init_lora_weights"] is True and content["eva_config"] is None
    assert set(content) <= set(vars(peft.LoraConfig()))

    theirs = peft.PeftModel.from_pretrained(base(kind), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs, inputs(kind)), expected, rtol=0, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert shapes(tmp_path / "theirs") == shapes(tmp_path / "ours")
    again = base(kind)
    attach_folder(again, tmp_path / "ours", storage=FOLDER)
    torch.testing.assert_close(logits(again, inputs(kind)), expected, rtol=0, atol=1e-5)


LOADABLE = [case for case, (_, fields) in CASES.items() if "pissa" not in case and "olora" not in case]


@pytest.mark.filterwarnings("ignore:lora with eva initialization:UserWarning")
@pytest.mark.parametrize("case", LOADABLE)
def test_what_peft_saves_loads_here(case: str, tmp_path: Path) -> None:
    kind, fields = CASES[case]
    torch.manual_seed(1)
    theirs = peft.get_peft_model(base(kind), peft.LoraConfig(**{"r": 4, "lora_alpha": 12} | fields))
    if case == "eva":
        data = [inputs(kind), batch(kind, rows=8, length=20)]
        peft.initialize_lora_eva_weights(theirs, data, show_progress_bar=False)
    expected = logits(stirred(theirs), inputs(kind))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = base(kind)
    adapters = attach_folder(ours, tmp_path / "theirs", storage=FOLDER)
    torch.testing.assert_close(logits(ours, inputs(kind)), expected, rtol=0, atol=1e-5)
    adapters.save(tmp_path / "ours")
    assert shapes(tmp_path / "ours") == shapes(tmp_path / "theirs")


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(("init", "kind"), [("pissa", "llama"), ("olora", "llama"), ("pissa", "gpt2")])
def test_what_peft_converts_is_what_is_saved_here(
    init: str, kind: str, use_rslora: bool, tmp_path: Path
) -> None:
    """PEFT's own conversion to a plain LoRA gives the same change, from the same training."""
    targets = ATTENTION if kind == "llama" else ["c_attn", "c_fc"]
    fields = {"r": 4, "lora_alpha": 12, "init_lora_weights": init, "target_modules": targets}
    theirs = peft.get_peft_model(base(kind), peft.LoraConfig(**fields, use_rslora=use_rslora))
    theirs.peft_config["default"].init_lora_weights = True  # so that the initial file is not begun anew
    theirs.save_pretrained(tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = init
    ours = base(kind)
    adapters = attach(ours, LoraConfig(**fields, use_rslora=use_rslora), storage=FOLDER)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    for model, parameters in ((theirs, trained), (ours, list(adapters.parameters("default")))):
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(**inputs(kind)).loss.backward()
            optimizer.step()
    expected = logits(ours, inputs(kind))
    torch.testing.assert_close(logits(theirs, inputs(kind)), expected, rtol=0, atol=1e-4)
    adapters.save(tmp_path / "ours")
    converted = tmp_path / "converted"
    theirs.save_pretrained(converted, path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    loaded = base(kind)
    attach_folder(loaded, converted, storage=FOLDER)
    torch.testing.assert_close(logits(loaded, inputs(kind)), expected, rtol=0, atol=1e-4)
    assert shapes(converted) == shapes(tmp_path / "ours")
    ours_content, their_content = (
        json.loads((f / CONFIG).read_text()) for f in (tmp_path / "ours", converted)
    )
    for field in ("r", "init_lora_weights", "use_rslora"):
        assert ours_content[field] == their_content[field]
    assert ours_content["lora_alpha"] == pytest.approx(their_content["lora_alpha"])


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_file_that_belongs_to_an_edited_base_is_refused_with_the_fix(init: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights=init)
    peft.get_peft_model(tiny("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="path_initial_model_for_weight_conversion"):
        attach_folder(tiny("llama"), tmp_path, storage=FOLDER)


# Token rows alone.

TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("llama", {}),
    "tied": ("llama-tied", {}),
    "scaled": ("gemma3", {}),
    "conv1d": ("gpt2", {}),
    "named": ("llama", {"target_modules": ["embed_tokens"]}),
    "head too": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "encoder": ("bert", {}),
    "t5": ("t5", {}),
    "bart": ("bart", {}),
}


def _ours_saved(kind: str, fields: dict[str, Any], folder: Path) -> Tensor:
    model = base(kind)
    adapters = attach(model, TrainableTokensConfig(token_indices=IDS, **fields), storage=FOLDER)
    stir(adapters, size=1.0)
    adapters.save(folder)
    return logits(model, inputs(kind))


def _theirs_saved(kind: str, fields: dict[str, Any], folder: Path) -> Tensor:
    model = stirred(peft.get_peft_model(base(kind), peft.TrainableTokensConfig(token_indices=IDS, **fields)))
    model.save_pretrained(str(folder))
    return logits(model, inputs(kind))


@pytest.mark.parametrize("writer", [_ours_saved, _theirs_saved])
@pytest.mark.parametrize("case", TABLES)
def test_token_rows_alone_go_both_ways(
    case: str, writer: Callable[[str, dict[str, Any], Path], Tensor], tmp_path: Path
) -> None:
    kind, fields = TABLES[case]
    expected = writer(kind, fields, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(kind), tmp_path).eval()
    torch.testing.assert_close(logits(theirs, inputs(kind)), expected, rtol=0, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert shapes(tmp_path / "theirs") == shapes(tmp_path)
    ours = base(kind)
    adapters = attach_folder(ours, tmp_path, storage=FOLDER)
    torch.testing.assert_close(logits(ours, inputs(kind)), expected, rtol=0, atol=1e-5)
    adapters.save(tmp_path / "ours")
    assert shapes(tmp_path / "ours") == shapes(tmp_path)
