"""Faults of structure (D20 to D23, D29, D30): what people do to adapters in loops of their own, by PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from case import Case, Diagnosed, tuned, write_rows
from foreign import (
    TARGETS,
    TEXT,
    base_model,
    lora,
    optimizer_of,
    peft_adapter,
    tokenizer_of,
    train,
    with_lora,
)
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainingArguments

from graftlm.integrations.diagnosis_callback import DiagnosisCallback
from graftlm.integrations.loop_state import note_evaluation, note_training
from graftlm.models.sprout import sprout_folder

SUMS = [{"prompt": f"What is twice {n}?", "completion": f"It is {2 * n}."} for n in range(90)]


def sound_adapter(folder: Path) -> Diagnosed:
    return _adapter(peft_adapter(folder / "adapter"))


def _adapter(folder: Path) -> Diagnosed:
    return Diagnosed(folder, base="sprout")


# D20


def embedding_saved_apart(folder: Path) -> Diagnosed:
    return _adapter(peft_adapter(folder / "adapter", modules_to_save=["embed_tokens"]))


def head_adapted(folder: Path) -> Diagnosed:
    return _adapter(peft_adapter(folder / "adapter", target_modules=[*TARGETS, "lm_head"]))


def embedding_copied(folder: Path) -> Path:
    data = write_rows(folder / "rows.jsonl", SUMS)
    return tuned(folder, data, "train.max_steps=3", "method.modules_to_save=[embed_tokens]")


def merged_apart(folder: Path) -> Diagnosed:
    """A trained copy of the embedding is merged, and the config says that the head is the same tensor still,
    as older versions of the libraries leave it."""
    model = with_lora(base_model(), modules_to_save=["embed_tokens"])
    train(model, optimizer_of(model))
    model.merge_and_unload().save_pretrained(folder / "merged")
    _say_tied(folder / "merged", says=True)
    return Diagnosed(folder / "merged")


def merged_and_said(folder: Path) -> Diagnosed:
    made = merged_apart(folder)
    _say_tied(made.folder, says=False)
    return made


def _say_tied(folder: Path, *, says: bool) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": says}))


# D21


def embedding_saved(folder: Path) -> Diagnosed:
    model = with_lora(base_model())
    train(model, optimizer_of(model))
    model.save_pretrained(folder / "adapter", save_embedding_layers=True)
    return _adapter(folder / "adapter")


def head_copied(folder: Path) -> Path:
    data = write_rows(folder / "rows.jsonl", SUMS)
    return tuned(folder, data, "train.max_steps=3", "method.modules_to_save=[lm_head]")


# D22


def head_forgotten(folder: Path) -> Diagnosed:
    """Without `task_type` PEFT does not know that there is a head."""
    return _classifier(folder, None)


def head_trained(folder: Path) -> Diagnosed:
    return _classifier(folder, "SEQ_CLS")


def _classifier(folder: Path, task_type: str | None) -> Diagnosed:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(sprout_folder(), num_labels=2)
    config.pad_token_id = 0
    model = AutoModelForSequenceClassification.from_pretrained(sprout_folder(), config=config)
    adapted = get_peft_model(model, lora(task_type=task_type))
    ids = tokenizer_of(sprout_folder())(TEXT, return_tensors="pt")["input_ids"]
    train(adapted, optimizer_of(adapted), {"input_ids": ids, "labels": torch.tensor([1])})
    adapted.save_pretrained(folder / "adapter")
    return _adapter(folder / "adapter")


# D23


def second_not_active(folder: Path) -> Diagnosed:
    return _second(folder, activate="default")


def second_active(folder: Path) -> Diagnosed:
    return _second(folder, activate="second")


def _second(folder: Path, *, activate: str) -> Diagnosed:
    model = with_lora(base_model())
    model.add_adapter("second", lora())
    model.set_adapter(activate)
    train(model, optimizer_of(model))
    model.save_pretrained(folder / "adapters")
    return _adapter(folder / "adapters" / "second")


def activated_too_late(folder: Path) -> Diagnosed:
    return _noted_second(folder, late=True)


def activated_in_time(folder: Path) -> Diagnosed:
    return _noted_second(folder, late=False)


def _noted_second(folder: Path, *, late: bool) -> Diagnosed:
    model = with_lora(base_model())
    model.add_adapter("second", lora())
    if not late:
        model.set_adapter("second")
    optimizer = optimizer_of(model)
    model.set_adapter("second")
    note_training(model, folder / "adapters", optimizer)
    train(model, optimizer)
    model.save_pretrained(folder / "adapters")
    return _adapter(folder / "adapters" / "second")


# D29


def optimizer_made_first(folder: Path) -> Diagnosed:
    """The optimizer holds the weights of the base, from before the adapter froze them."""
    return _loop(folder, first=True)


def optimizer_made_last(folder: Path) -> Diagnosed:
    return _loop(folder, first=False)


def _loop(folder: Path, *, first: bool) -> Diagnosed:
    base = base_model()
    early = torch.optim.AdamW(base.parameters(), lr=1e-3)
    model = with_lora(base)
    train(model, early if first else optimizer_of(model))
    model.save_pretrained(folder / "adapter")
    return _adapter(folder / "adapter")


def trainer_with_old_optimizer(folder: Path) -> Diagnosed:
    return _trainer(folder, first=True)


def trainer_with_new_optimizer(folder: Path) -> Diagnosed:
    return _trainer(folder, first=False)


def _trainer(folder: Path, *, first: bool) -> Diagnosed:
    """`transformers.Trainer` with an optimizer of one's own, and our callback."""
    transformers.set_seed(0)
    base = base_model()
    early = torch.optim.SGD(base.parameters(), lr=1e-3)
    model = with_lora(base)
    optimizer = (
        early if first else torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    )
    ids = tokenizer_of(sprout_folder())(TEXT)["input_ids"]
    rows = [{"input_ids": ids, "labels": ids}] * 4
    arguments = TrainingArguments(
        str(folder / "out"), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, optimizers=(optimizer, None),
        callbacks=[DiagnosisCallback()],
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(folder / "out"))
    return _adapter(folder / "out")


# D30


def dropout_in_evaluation(folder: Path) -> Diagnosed:
    return _evaluated(folder, evaluates=False)


def no_dropout_in_evaluation(folder: Path) -> Diagnosed:
    return _evaluated(folder, evaluates=True)


def _evaluated(folder: Path, *, evaluates: bool) -> Diagnosed:
    model = with_lora(base_model(), lora_dropout=0.1)
    train(model, optimizer_of(model))
    if evaluates:
        model.eval()
    ids = tokenizer_of(sprout_folder())(TEXT, return_tensors="pt")["input_ids"]
    note_evaluation(model, folder / "adapter", {"input_ids": ids})
    model.save_pretrained(folder / "adapter")
    return _adapter(folder / "adapter")


def partly_merged(folder: Path) -> Diagnosed:
    return _merged(folder, layers=1)


def wholly_merged(folder: Path) -> Diagnosed:
    return _merged(folder, layers=None)


def _merged(folder: Path, *, layers: int | None) -> Diagnosed:
    model = with_lora(base_model())
    train(model, optimizer_of(model))
    model.save_pretrained(folder / "adapter")
    sites = [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "merge")]
    for site in sites[:layers]:
        site.merge()
    note_evaluation(model.eval(), folder / "adapter")
    return _adapter(folder / "adapter")


CASES: tuple[Case, ...] = (
    Case("D20", "embedding-saved-apart", embedding_saved_apart),
    Case("D20", "head-adapted", head_adapted),
    Case("D20", "embedding-copied", embedding_copied),
    Case("D20", "merged-apart", merged_apart, merged_and_said),
    Case("D21", "embedding-saved", embedding_saved, sound_adapter),
    Case("D21", "head-copied", head_copied),
    Case("D22", "head-forgotten", head_forgotten, head_trained),
    Case("D23", "second-not-active", second_not_active, second_active),
    Case("D23", "activated-too-late", activated_too_late, activated_in_time),
    Case("D29", "optimizer-made-first", optimizer_made_first, optimizer_made_last),
    Case("D29", "trainer-with-old-optimizer", trainer_with_old_optimizer, trainer_with_new_optimizer),
    Case("D30", "dropout-in-evaluation", dropout_in_evaluation, no_dropout_in_evaluation),
    Case("D30", "partly-merged", partly_merged, wholly_merged),
)
