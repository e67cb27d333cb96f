"""Properties of an adapted model at work: generating text, and compiled."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graftlm.testing.case import Adapted, Case
from graftlm.testing.expect import expect, expect_close, expect_equal
from graftlm.testing.learning import gradients
from graftlm.testing.models import ENCODER_DECODERS, ENCODERS
from graftlm.testing.together import ROWS, mixed, row_by_row

NEW_TOKENS = 4
LENGTHS = (7, 3, 5, 4, 6)


def no_generation(case: Case) -> str:
    """Why this kind of model does not generate, or nothing."""
    return f"{case.kind} is an encoder and generates nothing" if case.family in ENCODERS else ""


def generates(case: Case) -> None:
    """A padded batch, each prompt alone, without the cache, and the plain argmax give the same tokens."""
    adapted = case.adapted()
    prompts = _prompts(case)[:3]
    together = _generate(case, adapted, prompts)
    alone = torch.cat([_generate(case, adapted, [prompt]) for prompt in prompts])
    expect_equal(together, alone, "tokens of a padded batch, against each prompt alone")
    uncached = _generate(case, adapted, prompts, use_cache=False)
    expect_equal(uncached, together, "tokens without the cache")
    if case.family not in ENCODER_DECODERS:
        expect_equal(_greedy(adapted, prompts[0]), together[:1], "tokens against the argmax of the logits")
    beams = _generate(case, adapted, prompts, num_beams=2)
    alone = torch.cat([_generate(case, adapted, [prompt], num_beams=2) for prompt in prompts])
    expect_equal(beams, alone, "tokens of a padded batch with beams, against each prompt alone")


def generates_routed(case: Case) -> None:
    """`generate` with one adapter per row gives each row the tokens of its adapter alone."""
    adapted = mixed(case)
    prompts = _prompts(case)
    for beams in (1, 2):
        generate = partial(_generate, case, adapted, num_beams=beams)
        alone = row_by_row(adapted, lambda row: generate([prompts[row]]))  # noqa: B023
        with adapted.adapters.routed(ROWS):
            found = generate(prompts)
        expect_equal(found, torch.cat(alone), f"tokens of a routed batch with {beams} beams")


def compiles(case: Case, backend: str = "aot_eager") -> None:
    """`torch.compile(fullgraph=True)` takes the adapted model without a graph break; the gradients agree."""
    adapted = case.adapted(model=case.shallow())
    model, inputs = adapted.model.train(), _without_loss(case, adapted)
    results = []
    with _compiler():
        for call in (model, torch.compile(model, fullgraph=True, backend=backend)):
            model.zero_grad()
            loss = call(**inputs, use_cache=False).logits.logsumexp(-1).mean()
            loss.backward()
            results.append((loss.detach(), gradients(adapted.adapters.named_parameters("default"))))
    (wanted, eager), (found, compiled) = results
    expect_close(found, wanted, "a mean over the compiled logits")
    for name, gradient in eager.items():
        expect_close(compiled[name], gradient, f"the compiled gradient of {name}", rtol=1e-3)


def compiles_with_inductor(case: Case) -> None:
    """The same with PyTorch's own backend, which generates code: seconds per case."""
    compiles(case, backend="inductor")


def switches_compiled(case: Case) -> None:
    """In a compiled model, switching to an adapter for the second time compiles nothing."""
    from torch._dynamo.testing import CompileCounter

    adapted = case.adapted("a", "b", model=case.shallow())
    inputs = _without_loss(case, adapted)
    with _compiler(), torch.no_grad():
        counter = CompileCounter()
        compiled: Any = torch.compile(adapted.model, fullgraph=True, backend=counter)
        counts = []
        for _ in range(2):
            for name in ("a", "b"):
                adapted.adapters.activate(name)
                found = compiled(**inputs, use_cache=False).logits
                expect_close(found, adapted.logits(inputs), f"compiled logits of {name}")
            counts.append(counter.frame_count)
    expect(counts[0] > 0, "nothing was compiled")
    expect(counts[1] == counts[0], f"switching again compiles {counts[1] - counts[0]} more times")


def _without_loss(case: Case, adapted: Adapted) -> dict[str, Tensor]:
    """No labels: some models log a warning where they choose a loss, which no compiler takes."""
    inputs = dict(adapted.inputs)
    labels = inputs.pop("labels")
    return inputs | ({"decoder_input_ids": labels} if case.family in ENCODER_DECODERS else {})


def _prompts(case: Case) -> list[Tensor]:
    ids = case.inputs(rows=len(LENGTHS))["input_ids"]
    return [row[:length] for row, length in zip(ids, LENGTHS, strict=True)]


def _generate(case: Case, adapted: Adapted, prompts: Sequence[Tensor], **options: Any) -> Tensor:
    """New tokens [rows, NEW_TOKENS].

    Prompts to be continued are padded on the left; those of an encoder, which may count positions from its
    first token, on the right.
    """
    longest = max(map(len, prompts))
    on_right = case.family in ENCODER_DECODERS
    pads = [(0, longest - len(p)) if on_right else (longest - len(p), 0) for p in prompts]
    ids = torch.stack([F.pad(prompt, sides) for prompt, sides in zip(prompts, pads, strict=True)])
    mask = torch.stack([F.pad(torch.ones_like(p), sides) for p, sides in zip(prompts, pads, strict=True)])
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    with torch.no_grad():
        found: Tensor = adapted.model.generate(input_ids=ids, attention_mask=mask, **settings)
    return found[:, -NEW_TOKENS:]


def _greedy(adapted: Adapted, prompt: Tensor) -> Tensor:
    ids = prompt[None]
    for _ in range(NEW_TOKENS):
        scores = adapted.logits({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[:, -1]
        scores[:, adapted.model.generation_config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    return ids[:, -NEW_TOKENS:]


@contextmanager
def _compiler() -> Iterator[None]:
    """A compiler that remembers nothing of other cases, before or afterwards."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
        warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)  # in PyTorch's inductor
        yield
    torch._dynamo.reset()
