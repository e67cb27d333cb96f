"""Next-token log-probabilities from a server with OpenAI's completions API, one request for each."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graftlm.core.errors import UsageError

TOP = 20
"""Likeliest tokens that are asked for; servers seldom give more."""
SECONDS = 60.0
_TOKEN_ID = re.compile(r"token_id:(\d+)")


def server_at(
    address: str, tokenizer: Any, vocabulary: int
) -> Callable[[Sequence[str], Sequence[Sequence[int]]], Tensor]:
    """A function from names of adapters and prompts to log-probabilities [N, V]; NaN for what is not told.

    Prompts are sent as token ids. Tokens come back as `token_id:7` (vLLM's `return_tokens_as_token_ids`) or
    as text; text that several tokens stand for is left out.

    Raises:
        UsageError: the address is no http address.
    """
    if not re.fullmatch(r"https?://\S+", address):
        raise UsageError(
            f"{address} is no address of a server.", fix="Give one such as http://localhost:8000."
        )
    place = address.rstrip("/").removesuffix("/v1") + "/v1/completions"
    ids = _unique_texts(tokenizer, vocabulary)

    def ask(names: Sequence[str], prompts: Sequence[Sequence[int]]) -> Tensor:
        found = torch.full((len(names), vocabulary), torch.nan)
        for row, name, prompt in zip(found, names, prompts, strict=True):
            for token, value in _told(place, name, prompt).items():
                number = _number(token, ids)
                if number is not None and number < vocabulary:
                    row[number] = value
            if int((~row.isnan()).sum()) < 2:
                raise _no_log_probs(place, "fewer than two known tokens came back")
        return found

    return ask


def _told(place: str, name: str, prompt: Sequence[int]) -> Mapping[str, float]:
    """The likeliest next tokens as the server spells them."""
    asked = {
        "model": name,
        "prompt": list(prompt),
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": TOP,
        "return_tokens_as_token_ids": True,
    }
    request = urllib.request.Request(place, json.dumps(asked).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            content = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:300]
        raise UsageError(
            f"{place} refuses a prompt for {name} ({error.code}): {said}",
            meaning="It serves no adapter of that name, or gives no log-probabilities.",
            fix="Serve each adapter under the name of its run, as it is shown here.",
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{place} does not answer: {error}.", fix="Start the server first.") from None
    try:
        found: dict[str, float] = content["choices"][0]["logprobs"]["top_logprobs"][0]
        return {str(token): float(value) for token, value in found.items()}
    except (KeyError, IndexError, TypeError, AttributeError):
        raise _no_log_probs(place, "the answer has no logprobs.top_logprobs") from None


def _no_log_probs(place: str, why: str) -> UsageError:
    return UsageError(
        f"{place} gives no log-probabilities: {why}.",
        meaning="Who answers is told by the probabilities of the next token.",
        fix="Let the server give the likeliest tokens (vLLM: --max-logprobs 20).",
    )


def _unique_texts(tokenizer: Any, vocabulary: int) -> dict[str, int]:
    """Text of a token -> its id, where no other token has that text."""
    found: dict[str, int] = {}
    several = set()
    for number in range(min(vocabulary, len(tokenizer))):
        text = tokenizer.decode([number])
        if text in found:
            several.add(text)
        found[text] = number
    return {text: number for text, number in found.items() if text not in several}


def _number(token: str, ids: Mapping[str, int]) -> int | None:
    match = _TOKEN_ID.fullmatch(token)
    return int(match[1]) if match else ids.get(token)
