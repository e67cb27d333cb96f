"""Trainers of transformers and TRL on models with adapters, against PEFT under transformers' Trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from graftlm.core.errors import CheckpointError, ConfigError
from graftlm.formats.layout import TENSORS
from graftlm.integrations import peft_api
from graftlm.integrations.hf_trainer import GraftTrainer, GraftTrainerMixin, Reference
from graftlm.methods.attach import adapters_of

from .trainer_task import LORA, arguments, attached, base, losses, rows, wrapped

TASK = Path(__file__).parent / "trainer_task.py"
pytestmark = pytest.mark.filterwarnings(
    "ignore:.* is deprecated and will be removed in v6:FutureWarning",
    "ignore:.*pin_memory.*:UserWarning",
    "ignore:Could not find a config file in:UserWarning",
)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of PEFT under transformers' Trainer."""
    folder = tmp_path_factory.mktemp("peft")
    trainer = transformers.Trainer(
        model=wrapped(peft), args=arguments(folder, save_strategy="no"), train_dataset=rows()
    )
    trainer.train()
    found = losses(trainer)
    assert found[-1] < found[0]
    return found


@pytest.mark.parametrize("trainer_class", [transformers.Trainer, GraftTrainer])
def test_losses_are_those_of_peft(trainer_class: Any, expected: list[float], tmp_path: Path) -> None:
    trainer = trainer_class(model=wrapped(), args=arguments(tmp_path), train_dataset=rows())
    trainer.train()
    assert losses(trainer) == pytest.approx(expected, rel=1e-5)


def test_an_attached_model_trains_like_a_wrapped_one(expected: list[float], tmp_path: Path) -> None:
    model = attached()
    theirs = peft_api.get_peft_model_state_dict(wrapped())
    peft_api.set_peft_model_state_dict(model, theirs)
    trainer = GraftTrainer(model=model, args=arguments(tmp_path), train_dataset=rows())
    trainer.train()
    assert losses(trainer) == pytest.approx(expected, rel=1e-5)


def test_a_checkpoint_holds_the_adapter_and_nothing_of_the_base(tmp_path: Path) -> None:
    trainer = GraftTrainer(model=attached(), args=arguments(tmp_path, max_steps=4), train_dataset=rows())
    trainer.train()
    names = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    adapter = {"adapter_config.json", "adapter_model.safetensors", "graft.json", "training_args.json"}
    adapter |= {"adapter_training.safetensors"}
    theirs = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert names == adapter | theirs
    assert json.loads((tmp_path / "checkpoint-4" / "training_args.json").read_text())["max_steps"] == 4
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "checkpoint-4")
    ours = trainer.model.eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    torch.testing.assert_close(loaded(ids).logits, ours(ids).logits, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["attached", "wrapped", "plain", "projected"])
def test_resuming_in_another_process_is_the_uninterrupted_run(kind: str, tmp_path: Path) -> None:
    run(tmp_path / "whole", kind)
    run(tmp_path / "rest", kind, tmp_path / "whole" / "checkpoint-4")
    whole, rest = (load_file(tmp_path / name / "final" / TENSORS) for name in ("whole", "rest"))
    first = load_file(tmp_path / "whole" / "checkpoint-4" / TENSORS)
    assert whole.keys() == rest.keys()
    assert all(torch.equal(whole[key], rest[key]) for key in whole)
    assert not any(torch.equal(whole[key], first[key]) for key in whole)


def run(folder: Path, kind: str, checkpoint: Path | None = None) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TASK), str(folder), kind, *([str(checkpoint)] if checkpoint else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("trainer_class", [transformers.Trainer, GraftTrainer])
def test_the_best_model_is_there_at_the_end(trainer_class: Any, tmp_path: Path) -> None:
    """A rate that ruins the model after a while: the best is not the last."""
    settings = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    trainer = trainer_class(
        model=wrapped(),
        args=arguments(tmp_path, **settings, learning_rate=0.5, lr_scheduler_type="constant"),
        train_dataset=rows(),
        eval_dataset=rows(16, seed=1),
    )
    trainer.train()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evaluated), rel=1e-5)
    assert trainer.state.best_metric == pytest.approx(min(evaluated))


def test_the_reference_is_the_base(tmp_path: Path) -> None:
    trainer = GraftTrainer(model=attached(init_lora_weights=False), args=arguments(tmp_path))
    ids = torch.tensor([[3, 4, 5, 6]])
    model, plain = trainer.model.eval(), base().eval()
    with trainer.reference():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    with trainer.null_ref_context():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    assert not torch.allclose(model(ids).logits, plain(ids).logits)


def test_lora_plus_gives_the_output_side_its_own_rate(tmp_path: Path) -> None:
    args = arguments(tmp_path, weight_decay=0.1, lr_scheduler_type="constant")
    trainer = GraftTrainer(model=attached(), args=args, loraplus_lr_ratio=16.0)
    groups = trainer.create_optimizer().param_groups
    adapters = adapters_of(trainer.model)
    assert adapters is not None
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    named = adapters.named_parameters("default")
    assert len(rates) == len(named)
    for name, parameter in named.items():
        assert rates[id(parameter)] == pytest.approx(0.48 if name.endswith("lora_B") else 0.03)
    assert {group["weight_decay"] for group in groups} == {0.1}


def test_lora_plus_without_a_lora_is_refused(tmp_path: Path) -> None:
    model = peft_api.get_peft_model(base(), peft_api.IA3Config())
    trainer = GraftTrainer(model=model, args=arguments(tmp_path), loraplus_lr_ratio=16.0)
    with pytest.raises(ConfigError, match="LoRA B"):
        trainer.create_optimizer()


def test_activation_checkpointing_gives_the_same_losses(expected: list[float], tmp_path: Path) -> None:
    args = arguments(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    )
    for model in (wrapped(), attached()):
        peft_api.set_peft_model_state_dict(model, peft_api.get_peft_model_state_dict(wrapped()))
        trainer = GraftTrainer(model=model, args=args, train_dataset=rows())
        trainer.train()
        assert losses(trainer) == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_without_the_adapter_is_refused(tmp_path: Path) -> None:
    trainer = GraftTrainer(model=attached(), args=arguments(tmp_path, max_steps=4), train_dataset=rows())
    trainer.train()
    adapters = trainer.adapters
    adapters.add("second", adapters.config("default"))
    with pytest.raises(CheckpointError, match="does not fit"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    (tmp_path / "checkpoint-4" / "adapter_training.safetensors").unlink()
    with pytest.raises(CheckpointError, match="'second'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.slow
@pytest.mark.parametrize("mixed_in", [False, True])
def test_sft_of_trl(mixed_in: bool, tmp_path: Path) -> None:
    """TRL's trainer on a wrapped model gives the losses that it gives with PEFT."""
    trl = pytest.importorskip("trl")

    class Mixed(GraftTrainerMixin, trl.SFTTrainer):  # type: ignore[misc]
        """TRL's trainer with Graft's checkpoints."""

    found = []
    for library, kind in ((peft, trl.SFTTrainer), (peft_api, Mixed if mixed_in else trl.SFTTrainer)):
        folder = tmp_path / library.__name__
        settings = arguments(folder, max_steps=8).to_dict()
        own = {key: settings[key] for key in SFT_KEYS}
        args = trl.SFTConfig(
            **own, output_dir=str(folder), max_length=16, bf16=False, gradient_checkpointing=False
        )
        trainer = kind(model=wrapped(library), args=args, train_dataset=rows(), processing_class=tokenizer())
        trainer.train()
        found.append(losses(trainer))
        assert (folder / "checkpoint-8" / "adapter_config.json").is_file()
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    resumed = (Mixed if mixed_in else trl.SFTTrainer)(
        model=wrapped(), args=args, train_dataset=rows(), processing_class=tokenizer()
    )
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert losses(resumed) == pytest.approx(found[1], rel=1e-6)


@pytest.mark.slow
def test_dpo_of_trl_with_the_base_as_reference(tmp_path: Path) -> None:
    """The base under the adapters is the reference, without a second copy; PEFT's losses."""
    trl = pytest.importorskip("trl")
    texts = {
        "prompt": [f"{n} {n + 1}" for n in range(3, 27)],
        "chosen": [f" {n + 2} {n + 3}" for n in range(3, 27)],
        "rejected": [f" {n} {n}" for n in range(3, 27)],
    }
    found = []
    for library in (peft, peft_api):
        settings = arguments(tmp_path, max_steps=4).to_dict()
        own = {key: settings[key] for key in SFT_KEYS}
        args = trl.DPOConfig(**own, output_dir=str(tmp_path), bf16=False, gradient_checkpointing=False)
        model = wrapped(library)
        reference = None if library is peft else Reference(model)
        trainer = trl.DPOTrainer(
            model=model,
            ref_model=reference,
            args=args,
            train_dataset=datasets.Dataset.from_dict(texts),
            processing_class=tokenizer(),
        )
        trainer.train()
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[0][-1] < found[0][0]


def test_a_reference_shares_the_model_and_leaves_it_alone() -> None:
    model = attached(init_lora_weights=False).train()
    reference = Reference(model).eval().requires_grad_(False)
    ids = torch.tensor([[3, 4, 5, 6]])
    assert model.training and any(parameter.requires_grad for parameter in model.parameters())
    assert list(reference.parameters()) == [] and reference.config is model.config
    model.eval()
    assert torch.equal(reference(ids).logits, base().eval()(ids).logits)
    assert not torch.allclose(model(ids).logits, reference(ids).logits)


SFT_KEYS = (
    *(
        "per_device_train_batch_size",
        "max_steps",
        "learning_rate",
        "logging_steps",
        "save_steps",
        "report_to",
    ),
    *("disable_tqdm", "use_cpu", "seed"),
)


def tokenizer() -> Any:
    """One word per token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({str(number): number for number in range(48)}, unk_token="0"))
    words.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")


def test_the_defaults_of_the_task_train_what_they_say() -> None:
    targets = {path.rpartition(".")[2] for path in adapters_of(attached()).parts("default")}  # type: ignore[union-attr]
    assert targets == set(LORA["target_modules"])
