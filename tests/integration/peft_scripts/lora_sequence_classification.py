"""LoRA on an encoder with a new classification head, by transformers' Trainer."""

import os
import tempfile
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

shared = Path(os.environ["GRAFT_SHARED"])
name = shared / "models" / "roberta-tiny-en"
set_seed(0)

tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=["query", "value"])
model = get_peft_model(model, config)
model.print_trainable_parameters()

folder = shared / "data" / "sentence-polarity"
files = {"train": str(folder / "train.jsonl"), "test": str(folder / "eval.jsonl")}
with tempfile.TemporaryDirectory() as cache:
    data = load_dataset("json", data_files=files, cache_dir=cache)
    data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=48), batched=True)
    train = data["train"].shuffle(seed=1).select(range(160))
    test = data["test"].shuffle(seed=1).select(range(64))

    arguments = TrainingArguments(
        output_dir=str(Path(cache) / "out"),
        learning_rate=5e-3,
        per_device_train_batch_size=8,
        num_train_epochs=1,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=test,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda result: {"accuracy": float((result[0].argmax(-1) == result[1]).mean())},
    )
    trainer.train()
    metrics = trainer.evaluate()

for entry in trainer.state.log_history:
    if "loss" in entry:
        print(f"step {entry['step']} loss {entry['loss']}")
print(f"eval loss {metrics['eval_loss']:.6f} accuracy {metrics['eval_accuracy']:.4f}")
head = [key for key, value in model.named_parameters() if value.requires_grad and "classifier" in key]
print("the head is trained:", bool(head), "on", torch.get_default_dtype())
