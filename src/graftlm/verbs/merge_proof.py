"""What proves a merge: the same next-token distributions in memory, and again in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from graftlm.core.errors import MergeError
from graftlm.core.storage import require_space
from graftlm.evaluation.known_text import sample_known_text
from graftlm.formats.ending import KINDS
from graftlm.methods.virtual.stacks import task_of
from graftlm.models.agreement import Agreement, agreement, mean_nll
from graftlm.models.encoder_decoder import is_encoder_decoder, start_token
from graftlm.models.generate import Sampling, context_length
from graftlm.models.generate_answers import generate_answers
from graftlm.models.reload import PROBES

PROBE_ROWS, PROBE_TOKENS = 32, 48
SOURCE_TOKENS = 16
"""Of what an encoder-decoder reads before it writes a probe."""

MAX_REQUANTISED_KL = 0.05
"""Nats per token between the adapter as it was trained and its merge in few bits."""
MAX_REQUANTISED_NLL = 0.03
"""By how much of itself the loss on the probes may grow there."""

Logits = Sequence[Tensor]
Probes = Sequence[Sequence[int]]


def probes_of(model: Any, tokenizer: Any) -> Probes:
    """Text that the adapted model writes itself; texts of random tokens for one that labels what it reads.

    Raises:
        MergeError: what it computes is not finite.
    """
    if task_of(model) in KINDS:
        return _random_texts(model, tokenizer)
    try:
        if is_encoder_decoder(model):
            return _answers_of(model)
        rows = sample_known_text(model, tokenizer, rows=PROBE_ROWS, tokens=PROBE_TOKENS)
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        name = str(next(model.parameters()).dtype).removeprefix("torch.")
        raise MergeError(
            f"Base + adapter give numbers that are not finite in {name}.",
            meaning="The numbers are too large for this format, or the adapter diverged.",
            fix="Merge in a wider dtype: --dtype float32. Nothing was written.",
        ) from error
    return [row.input_ids for row in rows]


def _random_texts(model: Any, tokenizer: Any) -> Probes:
    """Rows of different lengths, framed as the tokenizer frames every text."""
    generator = torch.Generator().manual_seed(0)
    most = min(PROBE_TOKENS, context_length(model) or PROBE_TOKENS)
    lengths = torch.linspace(2, most, PROBE_ROWS).long().tolist()
    drawn = [torch.randint(len(tokenizer), (length,), generator=generator).tolist() for length in lengths]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in drawn]
    found = tokenizer(texts, truncation=True, max_length=most)["input_ids"]
    return [list(ids) for ids in found if ids]


def _answers_of(model: Any) -> Probes:
    """What an encoder-decoder writes to sources of random tokens, behind the token that it begins with."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    sources = torch.randint(vocabulary, (PROBE_ROWS, SOURCE_TOKENS), generator=generator).tolist()
    written = generate_answers(
        model, sources, max_new_tokens=PROBE_TOKENS, stop_ids=(), sampling=Sampling(seed=0)
    )
    start = start_token(model)
    return [([] if start is None else [start]) + list(answer.token_ids) for answer in written]


def require_same(expected: Logits, found: Logits, what: str) -> Agreement:
    """The agreement of two states that must be one model up to rounding.

    Raises:
        MergeError: they are not; `what` is what the error calls the second.
    """
    reached = agreement(expected, found)
    _require(reached, what)
    return reached


@dataclass(frozen=True)
class Envelope:
    """How far a merge in few bits is from the adapter that it was made of."""

    agreement: Agreement
    nll_change: float | None
    """Growth of the loss on the probes, as part of itself; None of a model that writes no text."""

    @property
    def is_inside(self) -> bool:
        return self.agreement.mean_kl <= MAX_REQUANTISED_KL and (self.nll_change or 0) <= MAX_REQUANTISED_NLL

    def __str__(self) -> str:
        return f"{self.agreement}, loss {percent(self.nll_change)}"


def percent(change: float | None) -> str:
    """A relative change, as a person reads it."""
    return "not measured" if change is None else f"{100 * change:+.1f} %"


def require_near(
    expected: Logits, found: Logits, probes: Probes, *, writes: bool, is_forced: bool
) -> Envelope:
    """How far the two are apart. `writes`: the logits are of next tokens, so that the probes have a loss.

    Raises:
        MergeError: farther than what may pass for the same adapter, unless `is_forced`.
    """
    change = mean_nll(found, probes) / mean_nll(expected, probes) - 1 if writes else None
    reached = Envelope(agreement(expected, found), change)
    if not (reached.is_inside or is_forced):
        raise MergeError(
            f"The requantised model differs from base + adapter: {reached}.",
            meaning=f"{MAX_REQUANTISED_KL} nats and {100 * MAX_REQUANTISED_NLL:.0f} % of loss may be lost.",
            fix="Merge without --requantize, or into int8; --force insists. Nothing was written.",
        )
    return reached


def in_fresh_process(folder: Path, dtype: str, probes: Probes, expected: Logits) -> Agreement:
    """Load the folder in a new interpreter and compare; the probes travel in a file beside it.

    Raises:
        MergeError: it cannot be loaded, or is another model.
    """
    probe_file = folder / PROBES
    tensors = {f"logits.{number}": logits for number, logits in enumerate(expected)}
    require_space(folder, sum(logits.numel() * logits.element_size() for logits in expected))
    save_file(tensors, probe_file, metadata={"probes": json.dumps([list(probe) for probe in probes])})
    # -P: a file of the current folder must not stand in for a module of the same name.
    command = [sys.executable, "-P", "-m", "graftlm.models.reload", str(folder), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    probe_file.unlink()
    if done.returncode != 0:
        raise MergeError(
            "The merged model cannot be loaded again.",
            problems=done.stderr.strip().splitlines()[-3:],
            meaning="What was written to disk is not a model that a fresh process can read.",
            fix="Report this together with `graft env`. Nothing was written.",
        )
    content = json.loads(done.stdout.strip().splitlines()[-1])
    content.pop("is_same_model")
    found = Agreement(**content)
    _require(found, "The merged model, read back from disk,")
    return found


def _require(found: Agreement, what: str) -> None:
    if not found.is_same_model:
        raise MergeError(
            f"{what} differs from base + adapter: {found}.",
            meaning="Rounding to the base's dtype, or a weight that two modules share, changed what it says.",
            fix="Merge in a wider dtype: --dtype float32. Nothing was written.",
        )
