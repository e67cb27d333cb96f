"""The work of one micro-batch in a training step, by class: counted from config, sites and data.

A token costs two operations for each weight forward and two for the gradient of what it reads; trained
matrices another two for their own gradient. Bytes are those of passes over activations and of the operands
of each product. The factors below say how much of each the parts really take. They were fitted to 39 kept
rows of the benchmarks on two cores (lengths, batches, ranks, models, methods; 4 % median error), and are the
same for every model, method and length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from graftlm.planning.base_facts import BaseFacts
from graftlm.planning.sites import Sites
from graftlm.planning.work import ATTENTION_BACKWARD, ATTENTION_START, Work

BASE, ADAPTER, ATTENTION = "base products", "adapter products", "attention"
HEAD, PASSES, OPTIMIZER = "head", "passes over memory", "optimizer"
DECODING, RECOMPUTED, OPERATIONS = "decoding of a packed base", "recomputation", "operations"
STREAMED = "weights on their way"
STEP_PARTS = (BASE, ADAPTER, ATTENTION, HEAD, PASSES, OPTIMIZER, DECODING, RECOMPUTED, STREAMED, OPERATIONS)

COLD = 1.06
"""Times the arithmetic of a product, in a step where its operands are not in the caches."""
THIN = 1.85
"""Times the arithmetic of thin products: a rank is too few sums for a matrix unit."""
ADAPTER_PASSES = 1.65
"""Of the least traffic over the wide sides of thin products."""
POINTWISE_PASSES = 1.3
"""Of the least traffic of norms, rotary embedding and gating: sums and copies between them come to it."""
LOGIT_BYTES = 9.0
"""Per logit of a labelled row, forward and backward: maximum, exponentials, sum and gradient, in chunks that
caches partly hold."""
HEAD_ARITHMETIC, HEAD_READS = 0.85, 0.4
"""Of the head's arithmetic (its products are the largest of a step) and of its weight, once a pass."""
FORWARD_SHARE = 0.4
"""Of passes over activations and of operations."""
MASKED = 2.0
"""Attention that is not causal computes both halves."""
PLAIN_ATTENTION = 4.0
"""How many times slower attention is where the kernel for documents does not do it."""
BLOCK_OPERATIONS, SITE_OPERATIONS, BATCH_OPERATIONS = 450.0, 80.0, 340.0
"""Small operations of a block of the base, of a place of the adapter and of a micro-batch, both ways."""
TENSOR_OPERATIONS = 2.0
OPTIMIZER_PASSES = 1.6
OPTIMIZER_BYTES = 32
"""A parameter in float32: AdamW reads four values and writes three; the norm reads the gradient once more."""
MOST = 0.9
"""Share of labelled rows from which the end of the last layer is computed for all (`objectives.sft`)."""


@dataclass(frozen=True)
class Load:
    """One micro-batch in figures."""

    tokens: float
    """That the blocks see, padding and virtual tokens included."""
    targets: float
    """With a label."""
    document: float
    """Mean tokens that attend to each other, seen from a token."""
    size: int
    """Bytes of an activation."""


@dataclass(frozen=True)
class Shape:
    """What a block needs of the facts."""

    linear: float
    """Numbers in linear layers of all blocks."""
    spare: float
    """Of those, in the last block behind its attention's input: computed for labelled rows only."""
    wide: float
    """Values that enter or leave the linear layers, per token, over all blocks."""
    packed: float
    """Numbers that are decoded, where the base is quantised."""
    head: float


def shape_of(facts: BaseFacts, *, quantised: bool) -> Shape:
    """Sums over the linear layers."""
    blocks = [each for each in facts.linears if each.in_block]
    linear = sum(each.parameters for each in blocks)
    own = facts.hidden_size * facts.head_size * (facts.heads + 2 * facts.kv_heads)
    last = linear / max(1, facts.layers)
    packed = facts.quantisable if quantised or facts.stored_quantised else 0
    return Shape(
        linear=linear,
        spare=0.0 if facts.is_encoder_decoder else max(0.0, last - own),
        wide=sum((each.rows + each.columns) * each.count for each in blocks),
        packed=packed,
        head=facts.hidden_size * facts.vocabulary,
    )


def forward_work(facts: BaseFacts, shape: Shape, load: Load, *, is_native: bool) -> dict[str, Work]:
    """The base alone, forward, without a head."""
    tokens, size = load.tokens, load.size
    moved = size * (shape.linear + 0.5 * tokens * shape.wide)
    seen = load.document + ATTENTION_START
    scores = 2.0 * seen * facts.heads * facts.head_size * facts.layers * tokens
    slower = 1.0 if is_native else MASKED * PLAIN_ATTENTION
    return {
        BASE: Work(flops=COLD * 2.0 * tokens * shape.linear, bytes=moved),
        ATTENTION: Work(attention=scores * slower),
        PASSES: Work(bytes=FORWARD_SHARE * POINTWISE_PASSES * _pointwise(facts, load)),
        DECODING: Work(decoded=shape.packed),
        OPERATIONS: Work(operations=FORWARD_SHARE * BLOCK_OPERATIONS * facts.layers),
    }


def head_work(shape: Shape, vocabulary: int, rows: float, size: int, *, passes: float) -> Work:
    """Of the output head: one product forward; in training one more, for the gradient."""
    moved = HEAD_READS * size * shape.head + 0.5 * LOGIT_BYTES * rows * vocabulary
    return Work(flops=HEAD_ARITHMETIC * 2.0 * rows * shape.head, bytes=moved) * passes


def training_work(
    facts: BaseFacts,
    sites: Sites,
    shape: Shape,
    load: Load,
    recompute: str,
    *,
    is_native: bool,
    is_full: bool,
) -> dict[str, Work]:
    """One micro-batch forward and backward; `optimizer_work` comes once a step.

    Args:
        is_native: attention is computed by the kernel for documents.
        is_full: the head is trained or reads what is.
    """
    forward = forward_work(facts, shape, load, is_native=is_native)
    share = sites.backward_share
    both = FORWARD_SHARE + (1 - FORWARD_SHARE) * share
    unlabelled = 1.0 - load.targets / load.tokens
    spare = shape.spare * unlabelled if unlabelled > 1 - MOST else 0.0
    base = forward[BASE] * (1 + share) + Work(flops=-2.0 * load.tokens * spare * (1 + share))
    copied = Work(flops=2.0 * load.tokens * min(sites.copied, shape.linear))
    found = {
        BASE: base + copied,
        ATTENTION: forward[ATTENTION] * (1 + ATTENTION_BACKWARD * share) + _added_keys(facts, sites, load),
        ADAPTER: _adapter(sites, load),
        HEAD: head_work(shape, facts.vocabulary, load.targets, load.size, passes=3 if is_full else 2),
        PASSES: Work(bytes=both * POINTWISE_PASSES * _pointwise(facts, load)),
        DECODING: forward[DECODING] * (1 + share),
        OPERATIONS: Work(
            operations=BATCH_OPERATIONS
            + BLOCK_OPERATIONS * facts.layers * both
            + SITE_OPERATIONS * sites.places
        ),
    }
    return {**found, RECOMPUTED: _recomputed(forward, found[ADAPTER], facts, load, recompute, share)}


def optimizer_work(sites: Sites) -> Work:
    """Clipping and the update, once a step; lengths of columns where the method takes them (DoRA)."""
    return Work(
        flops=2.0 * sites.normed,
        bytes=OPTIMIZER_PASSES * OPTIMIZER_BYTES * sites.trainable,
        operations=TENSOR_OPERATIONS * sites.tensors,
    )


def _adapter(sites: Sites, load: Load) -> Work:
    """Thin products, with traffic over the wide side of each: too few sums for a value that is read."""
    moved = 0.5 * 3.5 * sites.narrow + 5.0 * sites.scaled
    traffic = ADAPTER_PASSES * load.size * load.tokens * moved
    return Work(flops=THIN * 6.0 * load.tokens * sites.products, bytes=traffic)


def _added_keys(facts: BaseFacts, sites: Sites, load: Load) -> Work:
    each = 4.0 * load.tokens * facts.heads * facts.head_size
    return Work(attention=each * sites.added_keys * (1 + ATTENTION_BACKWARD))


def _pointwise(facts: BaseFacts, load: Load) -> float:
    """Least traffic of what is computed value by value, forward and backward.

    A residual sum with its norm reads two and writes two vectors; its backward reads three and writes one.
    Rotary embedding reads and writes queries and keys. A gated product reads two and writes one; its backward
    reads three and writes two.
    """
    norms = 2 * (4 + 4) * facts.hidden_size
    rotary = 2 * 2 * (facts.heads + facts.kv_heads) * facts.head_size
    gating = (3 + 5) * facts.intermediate_size
    return load.size * load.tokens * facts.layers * float(norms + rotary + gating)


def _recomputed(
    forward: Mapping[str, Work], adapter: Work, facts: BaseFacts, load: Load, recompute: str, share: float
) -> Work:
    if recompute in ("everything", "offload"):
        again = sum((work for part, work in forward.items()), Work()) + adapter * (1 / 3)
        return again * share
    if recompute == "feed_forward":
        inner = 2.0 * facts.hidden_size * facts.intermediate_size * facts.layers
        return Work(flops=2.0 * load.tokens * inner, bytes=0.2 * forward[PASSES].bytes) * share
    return Work(bytes=0.3 * forward[PASSES].bytes) * share if recompute == "cheap" else Work()
