"""What a head says of whole rows, and of single tokens, on any model and in any form of batch.

A causal model reads the last real token of a row for the whole row. Its head gets those tokens only, and
where the model's attention takes documents, rows lie side by side without padding. Every other model is
called as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.data.batches import WIDTH_STEP, Batch
from graftlm.data.encode import IGNORED
from graftlm.data.filled import filled
from graftlm.data.forms import DOCUMENTS, for_attention
from graftlm.methods.lanes import Lanes
from graftlm.methods.site import base_modules
from graftlm.methods.virtual.stacks import is_causal, is_encoder_decoder
from graftlm.models.fusing.last_rows import only
from graftlm.models.generate import evaluation_mode
from graftlm.models.heads import head_modules
from graftlm.objectives.sft import attention_of
from graftlm.objectives.together import joint_of
from graftlm.quant.facts import device_of

LAST, OWN = "the head on the tokens that are read", "the model's own logits"


class RowLogits:
    """Logits of what has a label: [rows, labels] of a batch whose `labels` mark one token of every row, or
    [labelled tokens, labels]. Rows and tokens come in the order of the batch."""

    def __init__(self, model: nn.Module) -> None:
        self.head, why = _plain_head(model)
        self.is_token = type(model).__name__.endswith("ForTokenClassification")
        if self.head and not self._is_same(model):
            self.head, why = "", "its logits are not its head on the last hidden states"
        self.path = LAST if self.head else OWN
        self.why = why

    def __call__(self, model: Any, batch: Batch, tokens: int = 0) -> Tensor:
        """`tokens`: what flat batches are filled up to at least."""
        return self._of(model, self._ready(model, batch, tokens))

    def together(self, model: Any, batches: Mapping[str, Batch], lanes: Lanes) -> dict[str, Tensor]:
        """The logits of several micro-batches by the adapters that they belong to, from one pass."""
        joint = joint_of(batches, attention_of(model), next(model.parameters()).dtype)
        chosen = joint.chosen(joint.batch.labels != IGNORED)
        if not self.head:
            with joint.over(lanes):
                logits = model(**joint.batch.inputs).logits
            counts = [len(batch.labels) for batch in batches.values()]
            return dict(
                zip(batches, chosen.of(logits) if self.is_token else logits.split(counts), strict=True)
            )
        index, of_index = chosen.index()
        index = index.to(joint.batch.inputs["input_ids"].device, non_blocking=True)
        with joint.over(lanes, {len(index): of_index}):
            with chosen.only(index) as said:
                hidden = model.base_model(**joint.batch.inputs, use_cache=False)[0]
            width = joint.batch.labels.shape[1]
            states = hidden[0] if said.taken else hidden[:, -width:].flatten(0, 1).index_select(0, index)
            found = chosen.of_index(self._of_states(model, states))
        return dict(zip(batches, found, strict=True))

    def _ready(self, model: Any, batch: Batch, tokens: int) -> Batch:
        """The batch in the form that the model reads."""
        if not self.head or attention_of(model) != DOCUMENTS:
            return batch
        batch = for_attention(batch, DOCUMENTS, next(model.parameters()).dtype)
        # A matrix product of a new shape is prepared anew: lengths are multiples of `WIDTH_STEP`.
        return filled(batch, max(tokens, -(-batch.labels.shape[1] // WIDTH_STEP) * WIDTH_STEP))

    def _of(self, model: Any, batch: Batch) -> Tensor:
        if not self.head:
            logits: Tensor = model(**batch.inputs).logits
            return _chosen(logits, batch.labels != IGNORED) if self.is_token else logits
        wanted = batch.labels != IGNORED
        with only(wanted) as said:
            hidden = model.base_model(**batch.inputs, use_cache=False)[0]
        return self._of_states(
            model, hidden[0] if said.taken else _chosen(hidden[:, -wanted.shape[1] :], wanted)
        )

    def _of_states(self, model: Any, states: Tensor) -> Tensor:
        if self.is_token:  # the heads of tokens drop some of what they read, where the architecture says so
            states = getattr(model, "dropout", nn.Identity())(states)
        found: Tensor = model.get_submodule(self.head)(states)
        return found

    def _is_same(self, model: Any) -> bool:
        """Two rows of a probe, the second of them padded, tell."""
        ids = torch.arange(3, 13, device=device_of(model)).view(2, 5)
        said = getattr(model.config.get_text_config(), "pad_token_id", None)
        pad = 0 if said is None else int(said)
        ids, mask, labels = (
            torch.where(ids == pad, 13, ids),
            torch.ones_like(ids),
            torch.full((2, 5), IGNORED),
        )
        labels[0, 4] = labels[1, 2] = 0
        mask[1, 3:] = 0
        ids = torch.where(mask == 0, pad, ids)
        batch = Batch({"input_ids": ids, "attention_mask": mask}, labels, 2, 8, (), ((5,), (3,)))
        with evaluation_mode(model):
            expected = model(**batch.inputs, use_cache=False).logits.float()
            expected = _chosen(expected, labels != IGNORED) if self.is_token else expected
            found = self(model, batch).float()
        near = 1e-4 if next(model.parameters()).dtype == torch.float32 else 2e-2
        return bool(torch.allclose(found, expected, rtol=near, atol=near * float(expected.abs().max())))


def _plain_head(model: Any) -> tuple[str, str]:
    """The path of a head that is one linear layer behind a causal backbone, or why there is none."""
    if is_encoder_decoder(model) or not is_causal(model.base_model):
        return "", "every token of a row sees every other"
    modules, heads = base_modules(model), head_modules(model)
    if len(heads) != 1 or not isinstance(modules[heads[0]], nn.Linear):
        return "", "its head is more than a linear layer"
    return heads[0], "the model is causal and its head linear"


def _chosen(values: Tensor, wanted: Tensor) -> Tensor:
    """Those rows [R, N] of [B, T, N] that a boolean [B, T] on the host names."""
    index = wanted.flatten().nonzero().flatten().to(values.device, non_blocking=True)
    return values.flatten(0, 1).index_select(0, index)
