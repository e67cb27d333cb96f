"""Preference tuning and learning from rewards (D27, D28)."""

from __future__ import annotations

import json
from pathlib import Path

from case import Case, tuned, write_rows

from graftlm.models.sprout import demo_data_path

SMALL = (
    "train.per_device_train_batch_size=4",
    "train.gradient_accumulation_steps=1",
    "train.eval_steps=10",
    "data.max_length=128",
)


def pairs(folder: Path, count: int = 100, mixed_up: int = 0) -> Path:
    """The right answer to a message against that to another one; each `mixed_up`-th the other way round."""
    lines = demo_data_path().read_text(encoding="utf-8").splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    found = []
    for number, row in enumerate(rows):
        answers = [row["completion"], rows[(7 * number + 3) % count]["completion"]]
        if mixed_up and number % mixed_up == 0:
            answers.reverse()
        found.append({"prompt": row["prompt"], "chosen": answers[0], "rejected": answers[1]})
    return write_rows(folder / "pairs.jsonl", found)


# D27


def displaced(folder: Path) -> Path:
    return tuned(folder, pairs(folder), *SMALL, "train.learning_rate=5e-3", task="dpo")


def tossed(folder: Path) -> Path:
    """Every second pair is the other way round: nothing is left to learn."""
    settings = (*SMALL, "train.max_steps=40", "train.learning_rate=5e-5")
    return tuned(folder, pairs(folder, mixed_up=2), *settings, task="dpo")


def told_apart(folder: Path) -> Path:
    return tuned(folder, pairs(folder), *SMALL, "train.max_steps=40", task="dpo")


# D28

GROUPS = (
    "train.per_device_train_batch_size=4",
    "train.gradient_accumulation_steps=1",
    "train.max_steps=8",
    "task.num_generations=4",
    "task.max_completion_length=16",
    "data.max_length=128",
)
GRADED = '''"""How near an answer is to eight letters."""


def letters(completions, **columns):
    return [-abs(len(text) - 8) / 8 for text in completions]
'''


def words(folder: Path) -> Path:
    rows = [{"prompt": f"Write about {n}.", "answer": f"xq{n}zz"} for n in range(60)]
    return write_rows(folder / "words.jsonl", rows)


def hopeless(folder: Path) -> Path:
    """No answer is ever the reference: every group has the same reward."""
    return tuned(folder, words(folder), *GROUPS, task="grpo")


def graded(folder: Path) -> Path:
    (folder / "rewards.py").write_text(GRADED, encoding="utf-8")
    reward = f"task.rewards={folder / 'rewards.py'}:letters"
    return tuned(folder, words(folder), *GROUPS, reward, task="grpo")


def cut_short(folder: Path) -> Path:
    """Answers may have two tokens."""
    (folder / "rewards.py").write_text(GRADED, encoding="utf-8")
    settings = (f"task.rewards={folder / 'rewards.py'}:letters", "task.max_completion_length=2")
    return tuned(folder, words(folder), *GROUPS, *settings, task="grpo")


CASES = (
    Case("D27", "displaced", displaced),
    Case("D27", "mixed-up", tossed, told_apart),
    Case("D28", "no-difference", hopeless, graded),
    Case("D28", "cut-off", cut_short),
)
