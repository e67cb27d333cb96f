"""A training step of a run, taken on tensors without values: how many bytes are alive, and when.

The real adapter on the real architecture, the real loss, the faster parts and the recomputation that the run
would have: whatever is changed in them changes the prediction too.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from graftlm.data.batches import Batch, Batches
from graftlm.data.encode import Encoded
from graftlm.evaluation.perplexity import row_losses
from graftlm.evaluation.rows import Tokens
from graftlm.methods.base import MethodConfig
from graftlm.models.fusing.fused import Fusable, fusable, fused
from graftlm.models.recompute.policy import Policy, obstacle, recomputing
from graftlm.objectives.base import Objective
from graftlm.objectives.classification import ClassificationObjective
from graftlm.objectives.seq2seq import Seq2SeqObjective
from graftlm.objectives.sft import FEW, SftObjective
from graftlm.objectives.token_classification import TokenClassificationObjective
from graftlm.planning.base_facts import BaseFacts
from graftlm.planning.ledger import Ledger
from graftlm.planning.stand_in import base_of, tensors_of, with_adapter, without_values
from graftlm.quant.scheme import Scheme


@dataclass(frozen=True)
class Load:
    """What a micro-batch consists of."""

    rows: int
    length: int
    """Tokens of a row, or of a window."""
    documents: int = 1
    """In a row."""
    share: float = 1.0
    """Of the tokens that have a label."""
    is_packed: bool = True

    @property
    def tokens(self) -> int:
        """In all."""
        return self.rows * self.length


@dataclass(frozen=True)
class StepBytes:
    """Bytes beyond the model's own tensors. Gradients that wait for the update count among them."""

    kept: float
    """Alive when the forward pass is over."""
    forward: float
    """The most at a time in the forward pass."""
    backward: float
    """The most at a time in the backward pass."""
    gradients: float
    """Alive when it is over."""

    def between(self, other: StepBytes, share: float) -> StepBytes:
        """On the line through both: self at 0, `other` at 1."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return StepBytes(*(one + share * (two - one) for one, two in pairs))


class Stage:
    """A base with its adapter, ready for rehearsals."""

    def __init__(
        self,
        facts: BaseFacts,
        config: MethodConfig | None,
        scheme: Scheme | None,
        dtype: torch.dtype,
        *,
        layers: int | None = None,
    ) -> None:
        """Without a `config` it is the base alone."""
        self.facts = facts
        self.model = base_of(facts, scheme, dtype, layers=layers)
        if config is not None:
            with_adapter(self.model, config)
        without_values(self.model)
        self._objective: Objective[Any] | None = None
        self._fusable: Fusable | None = None

    def policies(self) -> list[Policy]:
        """What can be recomputed in this model."""
        names: Sequence[Policy] = ("nothing", "cheap", "feed_forward", "everything")
        return [name for name in names if obstacle(self.model, name) is None]

    def step(self, load: Load, policy: Policy, *, is_first: bool) -> StepBytes:
        """One micro-batch, forward and backward; `is_first`: no gradients of earlier ones wait."""
        with self._watched() as ledger:
            objective, found = self._ready()
            batch = batch_of(objective, load)
            self.model.train()
            with fused(found), recomputing(self.model, policy):
                if not is_first:
                    self._begin_gradients()
                found_bytes = self._micro_batch(ledger, objective, batch)
            self._forget_gradients()
        return found_bytes

    def evaluation(self, rows: int, length: int) -> int:
        """Most bytes at a time while the loss on held-out rows of that length is measured."""
        ids = tuple(number % FEW for number in range(length))
        with self._watched() as ledger:
            row_losses(self.model, [Tokens(ids, (-100, *ids[1:]), number) for number in range(rows)])
            return ledger.peak

    @torch.no_grad()
    def reading(self, rows: int, length: int) -> int:
        """Most bytes at a time in a forward pass that keeps nothing, its logits included."""
        ids = torch.zeros(rows, length, dtype=torch.long)
        inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if self.facts.is_encoder_decoder else {})
        self.model.eval()
        with self._watched() as ledger:
            self.model(**inputs, use_cache=False)
            return ledger.peak

    def _micro_batch(self, ledger: Ledger, objective: Objective[Any], batch: Any) -> StepBytes:
        ledger.mark()
        loss = objective(self.model, batch).loss_sum
        kept, forward = ledger.live, ledger.mark()
        loss.backward()
        backward = ledger.mark()
        del loss
        return StepBytes(kept, forward, backward, ledger.live)

    def _ready(self) -> tuple[Objective[Any], Fusable]:
        if self._objective is None or self._fusable is None:
            self._objective, self._fusable = objective_of(self.model, self.facts), fusable(self.model)
        return self._objective, self._fusable

    @contextmanager
    def _watched(self) -> Iterator[Ledger]:
        ledger = Ledger()
        ledger.knows(*tensors_of(self.model))
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), ledger:
            warnings.simplefilter("ignore")  # what torch says of tensors without values concerns nobody
            yield ledger

    def _begin_gradients(self) -> None:
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def _forget_gradients(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None


def objective_of(model: nn.Module, facts: BaseFacts) -> Objective[Any]:
    """The loss by what the base ends in."""
    if facts.ending.kind == "rows":
        return ClassificationObjective(model, facts.ending.problem)
    if facts.ending.kind == "tokens":
        return TokenClassificationObjective(model)
    if facts.is_encoder_decoder:
        return Seq2SeqObjective(model, label_smoothing=0.0)
    return SftObjective(model)


def batch_of(objective: Objective[Any], load: Load) -> Batch:
    """A micro-batch of that load, as the run's own data code makes it."""
    if isinstance(objective, Seq2SeqObjective):
        target = max(1, round(load.share * load.length))
        objective.shape = (max(1, load.length - target), target)
        return objective.probe(load.tokens)
    if isinstance(objective, ClassificationObjective | TokenClassificationObjective):
        objective.longest = load.length
        batch: Batch = objective.probe(load.tokens)
        return batch
    return _causal(load)


def _causal(load: Load) -> Batch:
    """Windows of documents, or padded rows; answers stand at the end of each."""
    count = load.documents if load.is_packed else 1
    lengths = [load.length // count + (number < load.length % count) for number in range(count)]
    rows = [
        Encoded(_ids(length), _labels(length, load.share), number, False)
        for number, length in enumerate(lengths * load.rows)
    ]
    batches = Batches(
        rows,
        rows_per_batch=load.rows,
        max_length=load.length,
        packing=load.is_packed,
        seed=0,
        pad_token_id=0,
    )
    return batches.batch(0, 0)


def _ids(length: int) -> tuple[int, ...]:
    return tuple(number % FEW for number in range(length))


def _labels(length: int, share: float) -> tuple[int, ...]:
    labelled = min(length - 1, max(1, round(share * length)))
    return (-100,) * (length - labelled) + _ids(length)[length - labelled :]


def like(load: Load, tokens: int) -> Load:
    """The same kind of micro-batch with about so many tokens."""
    length = max(2, round(tokens / load.rows))
    return replace(load, length=length, documents=min(load.documents, max(1, length // 2)))
