"""What the base of an adapter ends in, as `graft.json` keeps it: a trained head belongs to its labels."""

from __future__ import annotations

from typing import Any

from torch import nn

from graftlm.methods.virtual.stacks import task_of

KINDS = {"SEQ_CLS": "rows", "TOKEN_CLS": "tokens"}
"""PEFT's name of a task -> what its head labels."""


def ending_facts(model: nn.Module) -> dict[str, Any]:
    """The labels of a model that labels rows or tokens, in order, and what kind of labels they are; nothing
    of a model that writes text.

    >>> ending_facts(nn.Linear(2, 2))
    {}
    """
    kind = KINDS.get(task_of(model))
    config: Any = getattr(model, "config", None)
    if kind is None or config is None:
        return {}
    labels = [str(config.id2label[number]) for number in range(config.num_labels)]
    return {"ending": {"kind": kind, "labels": labels, "problem_type": getattr(config, "problem_type", None)}}
