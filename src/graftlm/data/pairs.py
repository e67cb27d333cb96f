"""Sources and targets as token ids: what an encoder-decoder reads, and what it learns to write.

Both are encoded in the tokenizer's own way: its begin and end tokens, its language marks, and for targets the
tokenizer's target side where it has one. A source that is too long is cut at its end, before the tokens that
close it; of a target that is too long only the beginning is learnt, without an end token, since a cut answer
does not teach where to stop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graftlm.data.records import Example, Problem
from graftlm.data.tokenizer import Tokenizer

_CHUNK = 512
"""Examples tokenised per call: large enough for the tokenizer's own parallelism."""
_SPEAKERS = {
    "system": "System",
    "user": "User",
    "assistant": "Assistant",
    "tool_call": "Call",
    "tool": "Tool",
}

Shift = Callable[[Sequence[int]], tuple[int, ...]]
"""From the ids of a target to what the decoder reads while it writes them, one behind."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One row ready for an encoder-decoder.

    source: what the encoder reads. target: what is written, each token of it learnt. decoder: what the
    decoder reads meanwhile; as long as the target. truncated: something was left out to make it fit.
    """

    source: tuple[int, ...]
    target: tuple[int, ...]
    decoder: tuple[int, ...]
    row: int
    truncated: bool
    text: str = ""
    """The source as it was written: ids do not always say it."""

    @property
    def tokens(self) -> int:
        """Tokens that a model passes through: of source and target."""
        return len(self.source) + len(self.target)

    @property
    def target_tokens(self) -> int:
        """Tokens the loss is taken over."""
        return len(self.target)

    @property
    def digest(self) -> str:
        """SHA-256 (16 hex digits) of the ids: equal only for the same question asked of the model."""
        content = f"{list(self.source)}|{list(self.target)}|{list(self.decoder)}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Limits:
    """The most tokens of a source and of a target, and the text that every source begins with."""

    source: int
    target: int
    prefix: str = ""


@dataclass(frozen=True)
class PairEncodings:
    """All encoded rows, and what happened on the way."""

    rows: tuple[Pair, ...]
    problems: tuple[Problem, ...]


def source_text(example: Example) -> str:
    r"""Everything before the last answer, as one text; speakers are named once an earlier answer is in it.

    >>> from graftlm.data.records import Turn
    >>> turns = (Turn("user", "Translate.", False), Turn("assistant", "Gern.", True))
    >>> source_text(Example(turns, row=1))
    'Translate.'
    """
    before = example.turns[: _last(example)]
    if all(turn.role in ("system", "user") for turn in before):
        return "\n\n".join(turn.text for turn in before)
    return "\n".join(f"{_SPEAKERS[turn.role]}: {turn.text}" for turn in before)


def encode_pairs(
    examples: Sequence[Example], tokenizer: Tokenizer, limits: Limits, shift: Shift
) -> PairEncodings:
    """Encode all examples in order; rows without a source, or without a token to learn, are dropped and
    listed."""
    rows: list[Pair] = []
    problems: list[Problem] = []
    for start in range(0, len(examples), _CHUNK):
        some = examples[start : start + _CHUNK]
        whole = [example for example in some if _last(example) > 0]
        problems += [_no_source(example.row) for example in some if _last(example) < 1]
        if not whole:
            continue
        sources = _ids(tokenizer, text=[limits.prefix + source_text(example) for example in whole])
        targets = _ids(tokenizer, text_target=[example.turns[_last(example)].text for example in whole])
        for example, source, target in zip(whole, sources, targets, strict=True):
            text = limits.prefix + source_text(example)
            if not source or not target:
                problems.append(_no_tokens(example.row, "the answer" if source else "the source"))
                continue
            is_long = len(source) > limits.source or len(target) > limits.target
            if len(source) > limits.source:
                source = _shortened(tokenizer, text, limits.source)
                problems.append(_cut(example.row, "source"))
            if len(target) > limits.target:
                target = target[: limits.target]
                problems.append(_cut(example.row, "target"))
            rows.append(Pair(tuple(source), tuple(target), shift(target), example.row, is_long, text))
    return PairEncodings(tuple(rows), tuple(problems))


def encode_source(text: str, tokenizer: Tokenizer, limits: Limits) -> list[int]:
    """Ids of one source, as in training."""
    source = _ids(tokenizer, text=[limits.prefix + text])[0]
    return (
        source if len(source) <= limits.source else _shortened(tokenizer, limits.prefix + text, limits.source)
    )


def _last(example: Example) -> int:
    """The place of the last answer; 0 where nothing stands before it."""
    return max((place for place, turn in enumerate(example.turns) if turn.trained), default=0)


def _ids(tokenizer: Tokenizer, **texts: list[str]) -> list[list[int]]:
    return [list(ids) for ids in tokenizer(**texts, verbose=False)["input_ids"]]


def _shortened(tokenizer: Tokenizer, text: str, most: int) -> list[int]:
    return list(tokenizer(text, truncation=True, max_length=most, verbose=False)["input_ids"])


def _no_source(row: int) -> Problem:
    what = "nothing stands before the text to write"
    fix = "An encoder-decoder needs a source and a target: name their columns with data.format."
    return Problem(row, "error", "no_source", what, fix)


def _no_tokens(row: int, part: str) -> Problem:
    return Problem(row, "error", "nothing_trained", f"{part} has no token", "Remove the row.")


def _cut(row: int, part: str) -> Problem:
    fix = "Raise data.max_length." if part == "source" else "Raise task.max_target_length."
    return Problem(row, "warning", f"{part}_truncated", f"the end of the {part} is left out", fix)
