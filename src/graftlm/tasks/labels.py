"""The task that an adapter with a head was trained for, told from the files beside it."""

from __future__ import annotations

from pathlib import Path

from graftlm.models.heads import PROBLEMS, ending_of_adapter
from graftlm.tasks.reward import REWARD
from graftlm.training.task_section import TaskChoice


def task_of_adapter(folder: Path) -> TaskChoice | None:
    """Classification of rows or tokens with the labels of its head, or a reward; None where it has no head.

    Raises:
        FormatError: what the files say of the head makes no sense.
    """
    ending = ending_of_adapter(folder)
    if ending is None or ending.kind == "text":
        return None
    if ending.kind == "tokens":
        return TaskChoice.parse({"type": "token_classification", "labels": ending.labels})
    if ending.labels == (REWARD,) and ending.problem == "number":
        return TaskChoice.parse("reward")
    labels = () if ending.problem == "number" else ending.labels
    problem = PROBLEMS[ending.problem]
    return TaskChoice.parse({"type": "classification", "labels": labels, "problem_type": problem})
