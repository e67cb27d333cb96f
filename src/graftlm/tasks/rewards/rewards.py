"""Rewards by name: built in, a function in a Python file, or a reward adapter; never trusted to work.

A function that raises, or gives what is no number, costs the answers concerned and nothing else: they are
named once, counted, and teach nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from graftlm.core.config import suggest
from graftlm.core.errors import ConfigError, DataError
from graftlm.core.notices import notice
from graftlm.data.prompts import EncodedPrompt, Prompt
from graftlm.tasks.rewards.file import load_function, required_names
from graftlm.tasks.rewards.functions import BUILT_IN, Judge

ADAPTER = "adapter:"
"""What the name of a reward adapter begins with."""


@dataclass(frozen=True)
class Written:
    """An answer that is to be judged: its text, and its tokens with the end token where one came."""

    prompt: EncodedPrompt
    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """What one reward says of one answer: None where it says nothing; `failure` is why, by its own fault."""

    value: float | None
    failure: str = ""


class Reward(Protocol):
    """One reward of a recipe."""

    @property
    def name(self) -> str:
        """As the recipe has it."""

    @property
    def digest(self) -> str:
        """Changes with what it computes; "" for what changes with the program only."""

    def __call__(self, written: Sequence[Written]) -> list[Score]:
        """A score for each answer, in order."""


@dataclass(frozen=True)
class BuiltIn:
    """A reward of this package: compares with the reference."""

    name: str
    judge: Judge
    digest: str = ""

    def __call__(self, written: Sequence[Written]) -> list[Score]:
        return [Score(self.judge(each.text, each.prompt.prompt.reference)) for each in written]


@dataclass(frozen=True)
class FromFile:
    """A function in a Python file, called as TRL calls its reward functions.

    It gets `prompts`, `completions` and `completion_ids`, and every column of the data by its name, all as
    lists; what it does not name among its parameters it does not get. It returns a number for each
    completion; None says that the function does not judge that one.
    """

    name: str
    function: Callable[..., Any]
    wants: frozenset[str] | None
    """The names it takes; None: all."""
    digest: str
    _said: set[str] = field(default_factory=set)

    def __call__(self, written: Sequence[Written]) -> list[Score]:
        found = self._call(written)
        if isinstance(found, str) and len(written) > 1:  # which of them it was shows one by one
            return [score for each in written for score in self([each])]
        scores = [Score(None, found)] * len(written) if isinstance(found, str) else [*map(_score, found)]
        for each, score in zip(written, scores, strict=True):
            self._say(each.prompt.row, score.failure)
        return scores

    def _call(self, written: Sequence[Written]) -> Sequence[Any] | str:
        """What the function returns, or what is wrong with it."""
        arguments = arguments_of(written)
        if self.wants is not None:
            arguments = {name: value for name, value in arguments.items() if name in self.wants}
        try:
            found = self.function(**arguments)
        except Exception as error:  # somebody else's code: whatever it raises concerns these answers only
            return f"raised {type(error).__name__}" + (f" ({error})" if str(error) else "")
        if hasattr(found, "tolist"):
            found = found.tolist()
        if not isinstance(found, list | tuple):
            return f"returned {type(found).__name__}, not a list of numbers"
        if len(found) != len(written):
            return f"returned {len(found)} rewards for {len(written)} completions"
        return found

    def _say(self, row: int, failure: str) -> None:
        kind = failure.partition(" (")[0]
        if failure and kind not in self._said:
            self._said.add(kind)
            notice(
                f"The reward {self.name} {failure}, first for an answer to row {row}. Such answers teach "
                "nothing and are counted."
            )


def arguments_of(written: Sequence[Written]) -> dict[str, list[Any]]:
    """What a reward function can ask for, each a list with an entry for each answer."""
    columns = dict.fromkeys(name for each in written for name in each.prompt.prompt.columns)
    found = {name: [each.prompt.prompt.columns.get(name) for each in written] for name in columns}
    return {
        **found,
        "prompts": [each.prompt.prompt.asked for each in written],
        "completions": [_completion(each) for each in written],
        "completion_ids": [list(each.tokens) for each in written],
    }


def load_rewards(names: Sequence[str], prompts: Sequence[Prompt]) -> tuple[Reward, ...]:
    """The rewards of a recipe; reward adapters excepted, which need the model.

    Raises:
        ConfigError: a name that stands for nothing, a file or function that is missing, or a function that
            asks for columns that the data lack.
        DataError: a built-in reward has no references to compare with.
    """
    columns = frozenset(name for prompt in prompts for name in prompt.columns)
    found: list[Reward] = []
    for name in names:
        if name in BUILT_IN:
            _require_references(name, prompts)
            found.append(BuiltIn(name, BUILT_IN[name]))
        elif ":" in name:
            found.append(_from_file(name, columns))
        else:
            raise ConfigError(
                f"There is no reward {name!r}{suggest(name, list(BUILT_IN))}",
                meaning=f"Built in are {', '.join(BUILT_IN)}; any other is a function in a Python file.",
                fix="Name the file and the function: --set task.rewards=rewards.py:correct",
            )
    return tuple(found)


def _from_file(name: str, columns: frozenset[str]) -> FromFile:
    path, _, function_name = name.rpartition(":")
    function = load_function(Path(path).expanduser(), function_name)
    needed, wants = required_names(function)
    given = columns | {"prompts", "completions", "completion_ids"}
    if missing := sorted(needed - given):
        raise ConfigError(
            f"The reward {name} asks for {', '.join(missing)}, which the data do not have.",
            meaning="A reward function gets prompts, completions, completion_ids and the data's columns, "
            f"which are {', '.join(sorted(columns))}.",
            fix="Correct the names of its parameters, or give those the data lack a default.",
        )
    digest = hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
    return FromFile(name, function, wants, digest)


def _require_references(name: str, prompts: Sequence[Prompt]) -> None:
    without = [prompt.row for prompt in prompts if not prompt.reference.strip()]
    if without:
        raise DataError(
            f"{len(without):,} of {len(prompts):,} rows have no answer that {name!r} could compare with.",
            problems=[f"row {row}" for row in without[:10]],
            meaning="Built-in rewards compare what is written with the right answer.",
            fix="Give the rows an 'answer', or judge by a function: --set task.rewards=rewards.py:correct",
        )


def _completion(written: Written) -> Any:
    """As TRL: a text where the prompt is one, else the assistant's message in a list."""
    if not written.prompt.prompt.is_chat:
        return written.text
    return [{"role": "assistant", "content": written.text}]


def _score(value: Any) -> Score:
    if value is None:
        return Score(None)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return Score(None, f"returned {type(value).__name__} where a number belongs")
    if not math.isfinite(number):
        return Score(None, f"returned {number}")
    return Score(number)
