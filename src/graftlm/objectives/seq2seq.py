"""Sequence to sequence: cross-entropy of the target's tokens, written by the decoder of an encoder-decoder.

The logits of a batch never exist at once: what the output head is given is cut into chunks of positions. The
way there is chosen once per run and said: `path` and `why`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from graftlm.core.config import Config
from graftlm.data.batches import Batch
from graftlm.data.encode import IGNORED
from graftlm.data.pair_batches import padded
from graftlm.data.pairs import Pair
from graftlm.kernels.ops import linear_cross_entropy
from graftlm.models.encoder_decoder import (
    head_bias,
    head_input,
    require_encoder_decoder,
)
from graftlm.objectives.base import LossParts, Objective
from graftlm.objectives.packed_head import packed_cross_entropy
from graftlm.objectives.sft import rows_per_chunk
from graftlm.quant.embedding import packed_head
from graftlm.quant.facts import device_of

Path = Literal["frozen head", "packed head", "head in chunks", "full logits"]

FEW = 16
"""Different tokens in a probe; any vocabulary has as many."""


class Seq2SeqSettings(Config):
    """What an encoder-decoder learns, and how it is asked."""

    aliases: ClassVar[dict[str, str]] = {
        "label_smoothing_factor": "label_smoothing",
        "generation_num_beams": "num_beams",
        "generation_max_length": "max_target_length",
        "prefix": "source_prefix",
    }

    max_target_length: int | None = Field(None, ge=2)
    """Longest target in tokens; none: as long as a source may be (`data.max_length`)."""
    source_prefix: str = ""
    """What every source begins with, such as `summarize: ` for T5."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the probability that training spreads over the whole vocabulary (Szegedy et al. 2016)."""
    num_beams: int = Field(1, ge=1)
    """Width of the beam search that answers held-out rows; 1 is greedy."""


class Seq2SeqObjective(Objective[Batch]):
    """Sum of -log p(token) over the tokens of a batch's targets, smoothed where asked, and their number."""

    def __init__(
        self, model: nn.Module, *, label_smoothing: float, shape: tuple[int, int] = (32, 32)
    ) -> None:
        """`shape`: tokens of a source and of a target in a probe."""
        require_encoder_decoder(model)
        self.smoothing, self.shape = label_smoothing, shape
        self.path, self.why = choose_path(model, label_smoothing)

    def __call__(self, model: nn.Module, batch: Batch) -> LossParts:
        if self.path == "full logits":
            states = model(**batch.inputs, use_cache=False).logits
        else:
            states = head_input(model, batch.inputs)
        kept = (batch.labels != IGNORED).flatten().nonzero().flatten()
        labels = batch.labels.flatten()[kept].to(states.device, non_blocking=True)
        rows = states.flatten(0, 1).index_select(0, kept.to(states.device, non_blocking=True))
        return LossParts(self._loss(model, rows, labels), batch.target_tokens)

    def probe(self, length: int) -> Batch:
        """Rows of the probe's shape, as many as it takes."""
        source, target = self.shape
        if source + target > length:
            source = max(1, length * source // (source + target))
            target = max(1, length - source)
        ids = tuple(number % FEW for number in range(max(source, target)))
        count = max(1, round(length / (source + target)))
        rows = [Pair(ids[:source], ids[:target], ids[:target], number, False) for number in range(count)]
        return padded(rows, 0, (source, target))

    def _loss(self, model: Any, rows: Tensor, labels: Tensor) -> Tensor:
        """Of what the head is given at labelled positions [R, width], or of its logits."""
        if self.path == "full logits":
            return self._in_chunks(lambda part: part, rows, labels, rows.shape[-1])
        head = model.get_output_embeddings()
        if self.path == "head in chunks":
            logits = logits_of(model)
            return self._in_chunks(logits, rows, labels, _vocabulary(head))
        bias = None if head.bias is None else head.bias.detach()
        behind = head_bias(model)
        if behind is not None:
            bias = (behind if bias is None else bias + behind).to(rows.dtype)
        packed = packed_head(head)
        if packed is not None:
            return packed_cross_entropy(rows, packed, labels, bias)
        chunk = rows_per_chunk(_vocabulary(head))
        return linear_cross_entropy(rows, head.weight, labels, bias=bias, chunk_rows=chunk)

    def _in_chunks(
        self, logits: Callable[[Tensor], Tensor], rows: Tensor, labels: Tensor, vocabulary: int
    ) -> Tensor:
        """Sum over chunks of positions; each chunk's logits are formed again in backward, not kept."""
        precise = torch.promote_types(rows.dtype, torch.float32)

        def loss(part: Tensor, target: Tensor) -> Tensor:
            smoothing = self.smoothing
            return F.cross_entropy(
                logits(part).to(precise), target, reduction="sum", label_smoothing=smoothing
            )

        total = torch.zeros((), device=rows.device, dtype=precise)
        size = rows_per_chunk(vocabulary)
        for part, target in zip(rows.split(size), labels.split(size), strict=True):
            total = total + checkpoint(loss, part, target, use_reentrant=False)
        return total


def choose_path(model: Any, label_smoothing: float) -> tuple[Path, str]:
    """How logits are formed on this model, and why not in a faster way."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        return "full logits", "the model has no separate output head"
    if not _logits_are_head_of_input(model):
        return "full logits", "the model changes its logits after the output head"
    if label_smoothing > 0:
        return "head in chunks", "label smoothing asks for every logit"
    if any(parameter.requires_grad for parameter in head.parameters()):
        return "head in chunks", "the output head is trained or adapted"
    if packed_head(head) is not None:
        return "packed head", "the output head is frozen and stored in 8 bits"
    if type(head) is nn.Linear:
        return "frozen head", "the output head is frozen"
    return "head in chunks", "the output head is no plain linear layer"


def logits_of(model: Any) -> Callable[[Tensor], Tensor]:
    """From what the output head is given to the model's logits."""
    head, bias = model.get_output_embeddings(), head_bias(model)

    def logits(states: Tensor) -> Tensor:
        found: Tensor = head(states)
        return found if bias is None else found + bias

    return logits


@torch.no_grad()
def _logits_are_head_of_input(model: Any) -> bool:
    """A probe of eight tokens tells whether anything but a bias follows the head."""
    device = device_of(model)
    ids = torch.arange(8, device=device).remainder(_vocabulary(model.get_output_embeddings())).unsqueeze(0)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}
    was_training = model.training
    model.eval()
    try:
        direct = model(**inputs, use_cache=False).logits.float()
        formed = logits_of(model)(head_input(model, inputs)).float()
    finally:
        model.train(was_training)
    return bool(torch.allclose(direct, formed, rtol=1e-5, atol=1e-5 * float(direct.abs().max())))


def _vocabulary(head: Any) -> int:
    """How many logits a head gives, without decoding the weight of a packed one."""
    return int(head.weight.shape[0] if packed_head(head) is None else head.out_features)
