"""Trainers of TRL on models with adapters of ours: TRL's losses with PEFT, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers

from graftlm.core.errors import AdapterError, TargetError, UsageError
from graftlm.formats.layout import FOLDER
from graftlm.integrations import peft_api
from graftlm.integrations.hf_trainer import Reference
from graftlm.methods.attach import adapters_of, attach
from graftlm.methods.base import MethodConfig
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lora import LoraConfig
from graftlm.methods.prefix import PrefixTuningConfig
from graftlm.methods.prompt import PromptTuningConfig
from graftlm.methods.tokens import TrainableTokensConfig

from .test_hf_trainer import tokenizer
from .trainer_task import LORA, SETTINGS, base, losses

trl = pytest.importorskip("trl")
from graftlm.integrations.trl import LOADS_REFERENCE, bridged, require_trainable  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

TEXTS = {
    "prompt": [f"{n} {n + 1}" for n in range(3, 27)],
    "chosen": [f" {n + 2} {n + 3}" for n in range(3, 27)],
    "rejected": [f" {n} {n}" for n in range(3, 27)],
}
ANSWERS = {"prompt": TEXTS["prompt"], "completion": TEXTS["chosen"]}
MARKED = {
    "prompt": TEXTS["prompt"] * 2,
    "completion": TEXTS["chosen"] + TEXTS["rejected"],
    "label": [True] * 24 + [False] * 24,
}
QUESTIONS = {"prompt": TEXTS["prompt"]}


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    own: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 3e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return own | changes


def rewarded(completions: list[str], **columns: Any) -> list[float]:
    """Longer texts are better."""
    return [float(len(text)) for text in completions]


def plain(kind: str) -> Any:
    """The model without adapters: one that writes, or one that gives a number for each row."""
    if kind != "reward":
        return base()
    torch.manual_seed(0)
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SETTINGS, num_labels=1))


def theirs(kind: str) -> Any:
    """With PEFT's LoRA."""
    torch.manual_seed(1)
    task = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
    return peft.get_peft_model(plain(kind), peft.LoraConfig(**LORA, task_type=task))


def ours(kind: str) -> Any:
    """With ours by `attach`, at the same start."""
    model = plain(kind)
    saved = {"modules_to_save": ["score"]} if kind == "reward" else {}
    attach(model, LoraConfig(**LORA, **saved), storage=FOLDER)
    start = peft.get_peft_model_state_dict(theirs(kind))
    peft_api.set_peft_model_state_dict(model, start)
    return model


def make(kind: str, model: Any, folder: Path, wrap: Any = bridged, **changes: Any) -> Any:
    """A trainer of this kind, bridged or as it is."""
    rows = {"sft": ANSWERS, "dpo": TEXTS, "kto": MARKED, "reward": TEXTS}.get(kind, QUESTIONS)
    name = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "reward": "Reward"}.get(kind, kind.upper())
    own = settings(folder, **changes)
    if kind in ("grpo", "rloo"):
        own |= {"beta": 0.1, "num_generations": 4, "max_completion_length": 6, "temperature": 1.0}
    more = {"reward_funcs": rewarded} if kind in ("grpo", "rloo") else {}
    return wrap(getattr(trl, f"{name}Trainer"))(
        model=model,
        args=getattr(trl, f"{name}Config")(**own),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer(),
        **more,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "reward", "grpo", "rloo"])
def test_losses_are_those_of_trl_with_peft(kind: str, tmp_path: Path) -> None:
    found = []
    for made, wrap in ((theirs, lambda trainer: trainer), (ours, bridged)):
        trainer = make(kind, made(kind), tmp_path / made.__name__, wrap)
        trainer.train()
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-6)
    assert len(set(found[0])) > 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo", "rloo"])
def test_the_reference_is_the_same_weights(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = __import__(f"trl.trainer.{kind}_trainer", fromlist=["x"])
    load = getattr(module, LOADS_REFERENCE)
    model = ours(kind)
    trainer = make(kind, model, tmp_path)
    assert isinstance(trainer.ref_model, Reference)
    assert list(trainer.ref_model.parameters()) == []
    assert getattr(module, LOADS_REFERENCE) is load  # only this trainer was given a view


@pytest.mark.slow
def test_nothing_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    sent: list[Any] = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **what: sent.append(what))
    make("sft", ours("sft"), tmp_path)
    assert sent == []
    make("sft", theirs("sft"), tmp_path, lambda trainer: trainer)
    assert len(sent) == 1  # what the other trainer does


@pytest.mark.slow
def test_a_checkpoint_holds_the_adapter_and_goes_on(tmp_path: Path) -> None:
    trainer = make("dpo", ours("dpo"), tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    again = make("dpo", ours("dpo"), tmp_path, save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again) == pytest.approx(losses(trainer), rel=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["lm_head"]),
        LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        TrainableTokensConfig(token_indices=[3]),
    ],
    ids=["head", "embedding", "copied head", "tokens"],
)
def test_adapters_that_would_not_be_trained_are_refused(config: MethodConfig) -> None:
    model = base()
    attach(model, config, storage=FOLDER)
    with pytest.raises(TargetError, match="would not train the adapters on") as refused:
        require_trainable(model, bridged(trl.SFTTrainer))
    assert "graft tune" in refused.value.fix


def test_a_prompt_is_refused() -> None:
    model = base()
    attach(model, PromptTuningConfig(num_virtual_tokens=2), storage=FOLDER)
    with pytest.raises(AdapterError, match="cannot train the prompt of 'default'"):
        require_trainable(model, bridged(trl.DPOTrainer))


@pytest.mark.slow
def test_a_prefix_trains_as_peft_s(tmp_path: Path) -> None:
    torch.manual_seed(1)
    given = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    other = peft.get_peft_model(base(), given)
    model = base()
    attach(model, PrefixTuningConfig(num_virtual_tokens=3), storage=FOLDER)
    peft_api.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(other))
    found = []
    for each, wrap in ((other, lambda trainer: trainer), (model, bridged)):
        trainer = make("sft", each, tmp_path, wrap)
        trainer.train()
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_layers_are_fine_and_a_head_of_a_reward_too() -> None:
    model = base()
    attach(model, IA3Config(), storage=FOLDER)
    require_trainable(model, bridged(trl.GRPOTrainer))
    require_trainable(ours("reward"), bridged(trl.RewardTrainer))


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(AdapterError):
        require_trainable(base(), trl.SFTTrainer)
    with pytest.raises(AdapterError, match="The model is 'sprout'"):
        require_trainable("sprout", trl.SFTTrainer)  # type: ignore[arg-type]
    model = ours("sft")
    with pytest.raises(AdapterError, match="peft_config"):
        bridged(trl.SFTTrainer)(model, peft_config=peft.LoraConfig())
    assert adapters_of(model) is not None


def test_a_trl_that_loads_references_in_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trl.DPOTrainer
    monkeypatch.delattr(f"trl.trainer.dpo_trainer.{LOADS_REFERENCE}")
    with pytest.raises(UsageError, match="DPOTrainer of this TRL has no"):
        bridged(trainer)
