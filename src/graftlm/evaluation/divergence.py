"""How far adapters move a model: the KL divergence from the base at the tokens of given answers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from graftlm.data.branches import Branched
from graftlm.data.longest_first import longest_first
from graftlm.methods.attach import adapters_of
from graftlm.models.generate import Progress, StopFlag, evaluation_mode, input_device
from graftlm.objectives.sft import LOGITS_PER_CHUNK, choose_path, hidden_states

TOKENS_PER_BATCH = 4096


def without_adapters(model: nn.Module) -> AbstractContextManager[None]:
    """The base of a model for the length of a block: its adapters off, whichever are active."""
    adapters = adapters_of(model)
    return nullcontext() if adapters is None else adapters.disabled()


def is_base(model: nn.Module) -> bool:
    """Whether no adapter is applied."""
    adapters = adapters_of(model)
    return adapters is None or not adapters.active


def first_answer_divergences(
    model: nn.Module,
    rows: Sequence[Branched],
    *,
    progress: Progress | None = None,
    should_stop: StopFlag | None = None,
) -> list[float]:
    """KL(model with its adapters || base) in nats per token, for the first answer of each row.

    Exact, over the whole vocabulary, at every token of the answer as the data have it: zero for the base, and
    comparable between adapters that were measured on the same rows. `should_stop` raises where somebody asked
    to stop.
    """
    if is_base(model):
        return [0.0] * len(rows)
    path, _ = choose_path(model)
    found = [0.0] * len(rows)
    done = 0
    with evaluation_mode(model):
        lengths = [len(row.prompt) + len(row.answers[0]) for row in rows]
        for batch in longest_first(lengths, tokens=TOKENS_PER_BATCH):
            if should_stop is not None and should_stop():
                break
            some = [rows[place] for place in batch]
            for place, value in zip(batch, _means(model, some, is_whole=path == "full logits"), strict=True):
                found[place] = value
            done += len(batch)
            if progress is not None:
                progress(done, len(rows))
    return found


def _means(model: Any, rows: Sequence[Branched], *, is_whole: bool) -> list[float]:
    device = input_device(model)
    texts = [torch.tensor([*row.prompt, *row.answers[0]]) for row in rows]
    ids = pad_sequence(texts, batch_first=True)
    mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    wanted = torch.zeros_like(mask, dtype=torch.bool)
    for line, row in zip(wanted, rows, strict=True):
        line[len(row.prompt) - 1 : len(row.prompt) + len(row.answers[0]) - 1] = True
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    index = wanted.flatten().nonzero().flatten().to(device)

    def states() -> Tensor:
        if is_whole:
            known: Tensor = model(**inputs, use_cache=False).logits
        else:
            known = hidden_states(model, inputs)
        return known[:, -ids.shape[1] :].flatten(0, 1).index_select(0, index)

    def logits(part: Tensor) -> Tensor:
        formed: Tensor = part if is_whole else model.get_output_embeddings()(part)
        return formed.to(torch.promote_types(formed.dtype, torch.float32))

    policy = states()
    with without_adapters(model):
        base = states()
    values = []
    size = max(16, LOGITS_PER_CHUNK // int(model.config.get_text_config().vocab_size))
    for ours, theirs in zip(policy.split(size), base.split(size), strict=True):
        known = logits(ours).log_softmax(-1)
        with without_adapters(model):
            before = logits(theirs).log_softmax(-1)
        values.append((known.exp() * (known - before)).sum(-1).double().cpu())
    flat = torch.cat(values)
    ends = [*accumulate(len(row.answers[0]) for row in rows)]
    return [float(part.mean()) for part in flat.tensor_split(ends[:-1])]
