"""Does whoever serves several adapters answer as the one that was asked for?

A canary is a prompt whose next-token distribution is known for each adapter, computed by it alone. Whoever
serves the adapters is asked all prompts under every name, in turn, so that a cache that forgets whose keys
and values it holds is led into answering with another adapter's. `Ask` is that server: a routed batch of
ours, or anything else that gives next-token log-probabilities.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from graftlm.core.errors import AdapterError
from graftlm.core.progress import progress
from graftlm.diagnosis.facts.behaviour import Canary, Fit
from graftlm.formats.content_digest import content_digest
from graftlm.methods.adapter_set import AdapterSet
from graftlm.models.agreement import logits_on
from graftlm.models.generate import evaluation_mode, input_device
from graftlm.verbs.diagnosing.loaded import NAME, Loaded, put
from graftlm.verbs.diagnosing.served import server_at
from graftlm.verbs.diagnosing.subject import subject_of

BASE = "base"
PROMPTS = 16
LENGTHS = (4, 12, 24, 40)
"""Tokens of the prompts, in turn: servers keep keys and values in blocks, often of 16."""

Prompt = Sequence[int]
Ask = Callable[[Sequence[str], Sequence[Prompt]], Tensor]
"""Names (`base` for none) and prompts, one for each request -> log-probabilities of the next token [N, V];
NaN where nothing is said of a token."""


@dataclass(frozen=True)
class Signature:
    """What one adapter says alone: log-probabilities of the token after each prompt [P, V]."""

    name: str
    digest: str
    said: Tensor
    folder: str = ""


def canaries_of(loaded: Loaded, beside: Sequence[Path], served: str | None) -> tuple[Canary, ...]:
    """Put further adapters on the same base and see who answers: a routed batch, or the server at `served`.

    Raises:
        AdapterError: one of them does not fit this base; FormatError: it cannot be read;
        UsageError: the server does not answer, or not as such servers do.
    """
    folders = {_own_name(loaded.folder, {}): loaded.folder}
    names = {next(iter(folders)): NAME}
    with ExitStack() as undo:
        for path in beside:
            folder = _adapter_in(path)
            name = _own_name(folder, folders)
            fit = put(loaded.adapters, folder, name)
            undo.callback(loaded.adapters.delete, name)
            _require_fit(fit, folder, loaded)
            folders[name], names[name] = folder, name
        prompts = canary_prompts(loaded.model)
        known = signatures(loaded.model, loaded.adapters, names, prompts, folders)
        if served is None:
            return tuple(check(routed_batch(loaded.model, loaded.adapters, names), known, prompts))
        ask = server_at(served, loaded.tokenizer, known[0].said.shape[1])
        return tuple(check(ask, known[:-1], prompts, beside=known[-1:]))


def _adapter_in(path: Path) -> Path:
    folder = subject_of(path).adapter
    if folder is None:
        raise AdapterError(f"{path} has no adapter yet.", fix="Name a run that has ended.")
    return folder


def _require_fit(fit: Fit, folder: Path, loaded: Loaded) -> None:
    if fit.problems or fit.other_base:
        raise AdapterError(
            f"The adapter in {folder} does not fit the base of {loaded.folder}.",
            problems=list(fit.problems[:10]),
            fix="Adapters that are served together have one base.",
        )


def canary_prompts(model: nn.Module, count: int = PROMPTS) -> list[list[int]]:
    """Random tokens of different lengths: adapters differ most on what nobody trained them on."""
    generator = torch.Generator().manual_seed(0)
    table = model.get_input_embeddings()  # type: ignore[operator]
    vocabulary = int(table.num_embeddings)
    lengths = [LENGTHS[number % len(LENGTHS)] for number in range(count)]
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]


def signatures(
    model: nn.Module,
    adapters: AdapterSet,
    names: Mapping[str, str],
    prompts: Sequence[Prompt],
    folders: Mapping[str, Path],
) -> list[Signature]:
    """What each adapter says alone, and last the base. `names`: as one is asked for -> its name here."""
    found = []
    for name, here in names.items():
        with adapters.activated(here):
            said = _next(logits_on(model, prompts))
        found.append(Signature(name, content_digest(folders[name]), said, shlex.quote(str(folders[name]))))
    with adapters.disabled():
        return [*found, Signature(BASE, "", _next(logits_on(model, prompts)))]


def routed_batch(model: nn.Module, adapters: AdapterSet, names: Mapping[str, str]) -> Ask:
    """Our own serving: one batch, each row with its adapter."""

    def ask(wanted: Sequence[str], prompts: Sequence[Prompt]) -> Tensor:
        rows = [None if name == BASE else names[name] for name in wanted]
        texts = [torch.tensor(list(prompt)) for prompt in prompts]
        ids = pad_sequence(texts, batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True, padding_side="left")
        device = input_device(model)
        with evaluation_mode(model), adapters.routed(rows):
            logits: Tensor = model(
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
            ).logits
        return logits[:, -1].float().log_softmax(-1).cpu()

    return ask


def check(
    ask: Ask, asked: Sequence[Signature], prompts: Sequence[Prompt], *, beside: Sequence[Signature] = ()
) -> list[Canary]:
    """Ask for every adapter with every prompt, prompt by prompt, and compare with all signatures.

    Args:
        beside: who is not asked for, and might answer all the same.
    """
    wanted = [each.name for each in asked]
    answers: dict[str, list[Tensor]] = {name: [] for name in wanted}
    with progress("asking canaries") as tick:
        for number, prompt in enumerate(prompts, start=1):
            for name, row in zip(wanted, ask(wanted, [prompt] * len(wanted)), strict=True):
                answers[name].append(row)
            tick(number, len(prompts))
    known = [*asked, *beside]
    return [_canary(each, torch.stack(answers[each.name]), known) for each in asked if each.name != BASE]


def _canary(own: Signature, said: Tensor, known: Sequence[Signature]) -> Canary:
    far = {each.name: divergence(said, each.said) for each in known}
    others = [divergence(each.said, own.said) for each in known if each is not own]
    nearest = min(far, key=lambda name: (far[name], name != own.name))
    return Canary(
        own.name, own.digest, far[own.name], nearest, far[nearest], min(others, default=0.0), own.folder
    )


def divergence(said: Tensor, expected: Tensor) -> float:
    """Largest over prompts of KL(expected || said) in nats. Shapes: log-probabilities [P, V] each.

    Where `said` is NaN nothing was said of a token: the others are compared among themselves.

    >>> nothing = float("nan")
    >>> said = torch.tensor([[0.6, 0.3, nothing]]).log()
    >>> round(divergence(said, torch.tensor([[0.5, 0.25, 0.25]]).log()), 6)
    0.0
    """
    silent = said.isnan()
    theirs, ours = (
        torch.where(silent, -torch.inf, each.double()).log_softmax(-1) for each in (expected, said)
    )
    terms = torch.where(theirs.isneginf(), 0.0, theirs.exp() * (theirs - ours))
    return max(0.0, float(terms.sum(-1).max()))


def _next(logits: Sequence[Tensor]) -> Tensor:
    return torch.stack([each[-1].log_softmax(-1) for each in logits])


def _own_name(folder: Path, taken: Mapping[str, Path]) -> str:
    """The name of the run, or of the folder, told apart by a number."""
    plain = folder.absolute().parent.name if folder.name == "adapter" else folder.absolute().name
    name, number = plain, 2
    while name in taken or name == BASE:
        name, number = f"{plain}-{number}", number + 1
    return name
