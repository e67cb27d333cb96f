"""Supervised fine-tuning: next-token cross-entropy on the labelled tokens of a causal language model.

Only rows with a label reach the output head, in chunks, so that the logits of a batch never exist at
once. The way there is chosen once per run and said: `path` and `why`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from graftlm.core.config import Config
from graftlm.core.errors import ModelError
from graftlm.data.batches import WIDTH_STEP, Batch, Batches
from graftlm.data.encode import Encoded
from graftlm.data.filled import filled
from graftlm.data.fixed import Fixed
from graftlm.data.forms import for_attention
from graftlm.kernels.log_probs import linear_log_probs
from graftlm.kernels.ops import linear_cross_entropy
from graftlm.methods.lanes import Lanes
from graftlm.models.fusing.last_rows import only
from graftlm.objectives.base import LossParts, Objective
from graftlm.objectives.numbers import require_numbers
from graftlm.objectives.packed_head import packed_cross_entropy, packed_log_probs
from graftlm.objectives.together import Chosen, Joint, joint_of
from graftlm.quant.embedding import packed_head
from graftlm.quant.facts import device_of

LOGITS_PER_CHUNK = 2**24
"""Elements of logits that exist at a time: 64 MiB in float32."""

MOST = 0.9
"""Share of rows with a label from which on choosing them early gains nothing."""

Path = Literal["frozen head", "packed head", "trained head", "full logits"]


FEW = 16
"""Different tokens in a probe; any vocabulary has as many."""


class SftSettings(Config):
    """Supervised fine-tuning has no settings of its own; the data section says what is trained on."""


class SftObjective(Objective[Batch]):
    """Sum of -log p(token) over the labelled tokens of a batch, and their number."""

    def __init__(self, model: nn.Module) -> None:
        require_causal(model)
        self.path, self.why = choose_path(model)

    def __call__(self, model: nn.Module, batch: Batch) -> LossParts:
        return self.computed(model, self.flattened(model, batch))

    def flattened(self, model: nn.Module, batch: Batch) -> Batch:
        """The batch in the form that the model's attention reads, in one of few lengths."""
        batch = for_attention(batch, attention_of(model), next(model.parameters()).dtype)
        # A matrix product of a new shape is prepared anew: lengths are multiples of `WIDTH_STEP`.
        whole_steps = -(-batch.labels.shape[1] // WIDTH_STEP) * WIDTH_STEP
        return filled(batch, max(self.tokens, whole_steps))

    def computed(self, model: nn.Module, batch: Batch) -> LossParts:
        """The loss of a batch in that form."""
        labels = F.pad(batch.labels[:, 1:], (0, 1), value=-100)
        rows = labels != -100
        if self.path == "full logits":
            logits = take_rows(model(**batch.inputs, use_cache=False).logits, rows)
            targets = labels[rows].to(logits.device, non_blocking=True)
            loss = _chunked(_sum_of_cross_entropies, logits, targets, logits.shape[-1])
        else:
            hidden = wanted_states(model, batch.inputs, rows)
            loss = self._head_loss(model, hidden, labels[rows].to(hidden.device, non_blocking=True))
        return LossParts(loss, batch.target_tokens)

    def together(self, model: nn.Module, batches: Mapping[str, Batch], lanes: Lanes) -> dict[str, LossParts]:
        """As `TogetherObjective`.

        Raises:
            ModelError: the output head is trained or adapted.
        """
        if self.path == "trained head":
            raise ModelError(
                "The output head is trained, and the tokens of several adapters go over it together.",
                fix="Train these adapters one after the other.",
            )
        dtype = next(model.parameters()).dtype
        joint = joint_of(batches, attention_of(model), dtype)
        labels = F.pad(joint.batch.labels[:, 1:], (0, 1), value=-100)
        chosen = joint.chosen(labels != -100)
        targets = [labels.flatten()[own] for own in chosen.each]
        if self.path == "full logits":
            with joint.over(lanes):
                logits = model(**joint.batch.inputs, use_cache=False).logits
            losses = [
                _chunked(_sum_of_cross_entropies, part, own.to(part.device), part.shape[-1])
                for part, own in zip(chosen.of(logits), targets, strict=True)
            ]
        else:
            hidden = torch.cat(states_together(model, joint, chosen, lanes))
            each = self._log_probs(model, hidden, torch.cat(targets).to(hidden.device, non_blocking=True))
            losses = [-part.sum() for part in each.split([len(own) for own in targets])]
        found = zip(batches.items(), losses, strict=True)
        return {name: LossParts(loss, batch.target_tokens) for (name, batch), loss in found}

    def of_fixed(self, model: nn.Module, batch: Fixed) -> Tensor:
        """The loss of a batch in a shape that repeats, by a frozen head: no tensor is read on the way."""
        inputs: dict[str, Any] = {**batch.inputs, "max_length_q": batch.shape[0]}
        ids = batch.inputs["input_ids"]
        with only(torch.empty(ids.shape, dtype=torch.bool, device="meta"), batch.index) as wanted:
            hidden = hidden_states(model, inputs)
        rows = hidden[0] if wanted.taken else hidden[0].index_select(0, batch.index)
        return self._head_loss(model, rows, batch.targets)

    def probe(self, length: int) -> Batch:
        """One row with a label on every token."""
        ids = tuple(number % FEW for number in range(length))
        row = Encoded(ids, (-100, *ids[1:]), 1, False)
        layout: dict[str, Any] = {"rows_per_batch": 1, "packing": False, "seed": 0, "pad_token_id": 0}
        return Batches([row], max_length=length, **layout).batch(0, 0)

    def _log_probs(self, model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
        """log p(label) of each row by the head, which is not trained: the rows of all go over it together."""
        head = model.get_output_embeddings()
        packed = packed_head(head)
        if packed is not None:
            return packed_log_probs(hidden, packed, labels, head.bias)[0]
        chunk = rows_per_chunk(vocabulary_of(head))
        return linear_log_probs(hidden, head.weight, labels, bias=head.bias, chunk_rows=chunk)[0]

    def _head_loss(self, model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
        head = model.get_output_embeddings()
        vocabulary = vocabulary_of(head)
        if self.path == "frozen head":
            chunk = rows_per_chunk(vocabulary)
            return linear_cross_entropy(hidden, head.weight, labels, bias=head.bias, chunk_rows=chunk)
        packed = packed_head(head)
        if self.path == "packed head" and packed is not None:
            return packed_cross_entropy(hidden, packed, labels, head.bias)
        return _chunked(lambda h, t: _sum_of_cross_entropies(head(h), t), hidden, labels, vocabulary)


def require_causal(model: nn.Module) -> None:
    """Refuse a model that reads in one half and writes in another.

    Raises:
        ModelError: it is an encoder-decoder model.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder model.",
            meaning="Here a causal model continues a text; this one writes a target to a source.",
            fix="Use --task seq2seq, or choose a base whose architecture ends in ForCausalLM.",
        )


def choose_path(model: Any) -> tuple[Path, str]:
    """How logits are formed on this model, and why not in a faster way."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or getattr(model, "base_model", model) is model:
        return "full logits", "the model has no separate output head"
    if not _logits_are_head_of_hidden(model, head):
        return "full logits", "the model changes its logits after the output head"
    if type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters()):
        return "frozen head", "the output head is frozen"
    if packed_head(head) is not None and not any(p.requires_grad for p in head.parameters()):
        return "packed head", "the output head is frozen and stored in 8 bits"
    return "trained head", "the output head is trained or adapted"


def attention_of(model: Any) -> str:
    """The attention implementation that decides how documents in one window are kept apart."""
    config = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    return str(getattr(config, "_attn_implementation", None) or "sdpa")


def hidden_states(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Last hidden states of the backbone. Shape: [B, T, H]."""
    hidden: Tensor = model.base_model(**inputs, use_cache=False)[0]
    return hidden


def wanted_states(model: Any, inputs: dict[str, Tensor], rows: Tensor) -> Tensor:
    """Hidden states of some rows [R, H], those that a boolean [B, T] names: of the tokens that something is
    predicted from. The model may leave the others out at its end.
    """
    if int(rows.sum()) > MOST * rows.numel():
        return take_rows(hidden_states(model, inputs), rows)
    with only(rows) as wanted:
        hidden = hidden_states(model, inputs)
    return hidden[0] if wanted.taken else take_rows(hidden, rows)


def states_together(model: Any, joint: Joint, chosen: Chosen, lanes: Lanes) -> list[Tensor]:
    """Hidden states of the tokens that each lane wants, [count, H]."""
    if not chosen.is_few:
        with joint.over(lanes):
            return chosen.of(hidden_states(model, joint.batch.inputs))
    index, of_index = chosen.index()
    device = joint.batch.inputs["input_ids"].device
    with (
        joint.over(lanes, {len(index): of_index}),
        chosen.only(index.to(device, non_blocking=True)) as wanted,
    ):
        hidden = hidden_states(model, joint.batch.inputs)
    return chosen.of_index(hidden[0]) if wanted.taken else chosen.of(hidden)


def take_rows(values: Tensor, wanted: Tensor) -> Tensor:
    """Those rows [R, N] of [B, T, N] that a boolean [B, T] names; where it is on the host, nobody waits."""
    index = wanted.flatten().nonzero().flatten().to(values.device, non_blocking=True)
    return values.flatten(0, 1).index_select(0, index)


def rows_per_chunk(vocabulary: int) -> int:
    """Rows whose logits fit into one chunk."""
    return max(16, LOGITS_PER_CHUNK // vocabulary)


def vocabulary_of(head: Any) -> int:
    """How many logits a head gives, without decoding the weight of a packed one."""
    return int(head.weight.shape[0] if packed_head(head) is None else head.out_features)


@torch.no_grad()
def _logits_are_head_of_hidden(model: Any, head: nn.Module) -> bool:
    """Some models cap or scale their logits; their config or a probe of eight tokens tells.

    A soft cap hardly bends small logits, so the probe alone would miss it on a fresh model. The same
    product of the same tensors agrees almost to the bit; who does not pass takes the slower, exact way.
    """
    if getattr(model.config.get_text_config(), "final_logit_softcapping", None):
        return False
    vocabulary = vocabulary_of(head)
    ids = torch.arange(8, device=device_of(model)).remainder(vocabulary).unsqueeze(0)
    was_training = model.training
    model.eval()
    try:
        direct = model(input_ids=ids, use_cache=False).logits.float()
        formed = head(hidden_states(model, {"input_ids": ids})).float()
    finally:
        model.train(was_training)
    require_numbers(direct, model)
    return bool(torch.allclose(direct, formed, rtol=1e-5, atol=1e-5 * float(direct.abs().max())))


def _chunked(
    loss: Callable[[Tensor, Tensor], Tensor], rows: Tensor, labels: Tensor, vocabulary: int
) -> Tensor:
    """Sum over chunks; each chunk's logits are formed again in backward instead of being kept."""
    total = torch.zeros((), device=rows.device, dtype=_precision(rows))
    size = rows_per_chunk(vocabulary)
    for part, target in zip(rows.split(size), labels.split(size), strict=True):
        total = total + checkpoint(loss, part, target, use_reentrant=False)
    return total


def _sum_of_cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.to(_precision(logits)), labels, reduction="sum")


def _precision(values: Tensor) -> torch.dtype:
    """Of the loss: float32, or that of the model where it is higher."""
    return torch.promote_types(values.dtype, torch.float32)
