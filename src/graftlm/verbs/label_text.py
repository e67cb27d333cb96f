"""What a model with a head tells of one text, in words: labels with probabilities, a number, or tags."""

from __future__ import annotations

from typing import Any

import torch

from graftlm.formats.ending import KINDS
from graftlm.methods.virtual.stacks import task_of
from graftlm.models.generate import context_length, evaluation_mode, input_device

SHOWN = 3
"""Labels that are told, the likeliest first."""


def tells_labels(model: Any) -> bool:
    """Whether the model labels what it reads, rather than writing."""
    return task_of(model) in KINDS


def label_text(model: Any, tokenizer: Any, text: str) -> str:
    """What the model as it stands tells of `text`."""
    encoded = tokenizer(
        text, return_tensors="pt", truncation=True, max_length=context_length(model), verbose=False
    ).to(input_device(model))
    with evaluation_mode(model):
        logits = model(**encoded).logits[0].float().cpu()
    names = model.config.id2label
    if logits.dim() == 2:
        tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])
        pairs = zip(tokens, logits.argmax(-1).tolist(), strict=True)
        return "\n".join(f"{token}\t{names[number]}" for token, number in pairs)
    problem = model.config.problem_type
    if problem == "regression" or len(logits) == 1:
        return f"{float(logits[0]):.4g}"
    shares = logits.sigmoid() if problem == "multi_label_classification" else logits.softmax(-1)
    best = torch.argsort(shares, descending=True)[:SHOWN].tolist()
    return "\n".join(f"{names[number]} {100 * float(shares[number]):.1f} %" for number in best)
