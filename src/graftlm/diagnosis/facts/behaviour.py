"""Facts from running base and adapter."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """A mean over the same items before and after; `low` and `high`: 95 % interval of the difference."""

    before: float
    after: float
    low: float
    high: float
    items: int

    @property
    def difference(self) -> float:
        """After less before."""
        return self.after - self.before


@dataclass(frozen=True)
class Fit:
    """How the file of an adapter fits the base that it is put on."""

    applied: int
    """Tensors that found their place."""
    problems: tuple[str, ...] = ()
    """Tensors that are missing, were not expected, or have another shape; each named."""
    other_base: str = ""
    """The base that the adapter was trained on, where it is not this one."""
    base: str = ""
    """This one."""


@dataclass(frozen=True)
class Effect:
    """What an adapter does to next-token distributions on probes; KL in nats per token."""

    tokens: int
    mean_logit_change: float
    """Mean over all logits of |adapter - base|."""
    mean_kl: float


@dataclass(frozen=True)
class Merged:
    """A merged model against base + adapter, on text that the adapter writes."""

    folder: str
    stored: str
    """`bfloat16`, or `nf4` where it is stored in few bits."""
    tokens: int
    mean_kl: float
    top1: float
    nll_change: float | None
    """Growth of the loss on the probes, as part of itself; None of a model that writes no text."""
    effect_kl: float | None = None
    """How far the adapter moves its base on the same probes: what the merge has to keep."""
    adapter: str = ""
    """What it was made of, as a command needs it."""
    other_files: tuple[str, ...] = ()
    """What of the tokenizer is another one than that of the base: its vocabulary, its template ..."""
    is_loadable: bool = True
    why_not: str = ""


@dataclass(frozen=True)
class Canary:
    """What came back where adapter `name` was asked for, by KL (nats) to what each adapter says alone."""

    name: str
    digest: str
    """Of the adapter's config and tensors: the same content has the same digest, whatever its name."""
    to_own: float
    nearest: str
    """The name whose own answers are nearest to what came back; the base is `base`."""
    to_nearest: float
    apart: float
    """KL between what this adapter says alone and what the nearest other one says."""
    folder: str = ""
    """Where the adapter lies."""


@dataclass(frozen=True)
class Refusals:
    """Prompts of one kind that were refused, by base and adapter; unreadable answers are left out."""

    prompts: int
    before: int
    after: int
    lost: int
    """Refused by the base, answered by the adapter."""
    gained: int
    """The other way round."""


@dataclass(frozen=True)
class Safety:
    """Both sides of safety on the same prompts."""

    unsafe: Refusals
    safe: Refusals
    unreadable: int = 0
    """Prompts that were left out: one of the two answers is empty or repeats itself."""


@dataclass(frozen=True)
class SeedProbe:
    """Short trainings of the same recipe that differ in their seed alone."""

    steps: int
    losses: tuple[float, ...]
    """On held-out rows, at the end of each."""


@dataclass(frozen=True)
class BehaviourFacts:
    """Facts from running base and adapter; a field is None where it was not looked at."""

    fit: Fit | None = None
    effect: Effect | None = None
    task_loss: Change | None = None
    """Loss on the rows that somebody named, nats per token, of base and adapter."""
    task_data: str = ""
    """Where those rows are."""
    known_loss: Change | None = None
    """Loss on text that the base knew, nats per token, of base and adapter."""
    answer_tokens: Change | None = None
    """Length of the answers to held-out prompts, in tokens, of base and adapter."""
    merged: Merged | None = None
    canaries: tuple[Canary, ...] | None = None
    served: str = ""
    """Address of the server that answered them; a routed batch of our own where it is empty."""
    safety: Safety | None = None
    seeds: SeedProbe | None = None
