"""Rewards by name: what is missing is said before the run, what fails in it costs only its answers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.core.errors import CheckpointError, ConfigError, DataError
from graftlm.core.notices import forget_notices, notices_to
from graftlm.data.prompts import EncodedPrompt, Prompt, to_prompts
from graftlm.tasks.policy.writer import totals_of
from graftlm.tasks.rewards.record import require_same
from graftlm.tasks.rewards.rewards import Score, Written, load_rewards

ROWS = [{"question": f"What is {n} + 1?", "answer": str(n + 1), "level": n} for n in range(4)]


def prompts(rows: list[dict[str, Any]] = ROWS) -> list[Prompt]:
    return to_prompts(rows, "auto", list(range(1, len(rows) + 1)), "rows.jsonl")[0]


def written(texts: list[str]) -> list[Written]:
    pairs = zip(prompts(), texts, strict=False)
    return [Written(EncodedPrompt((1, 2), p.row, p), text, (7, 8)) for p, text in pairs]


def file(folder: Path, code: str) -> Path:
    path = folder / "rewards.py"
    path.write_text(code)
    return path


def values(scores: list[Score]) -> list[float | None]:
    return [score.value for score in scores]


def test_built_in_rewards_compare_with_the_reference() -> None:
    (exact, number, within) = load_rewards(["exact_match", "last_number", "contains"], prompts())
    texts = [" 1\n", "I say 2.", "7", ""]
    assert values(exact(written(texts))) == [1.0, 0.0, 0.0, 0.0]
    assert values(number(written(texts))) == [1.0, 1.0, 0.0, 0.0]
    assert values(within(written(texts))) == [1.0, 1.0, 0.0, 0.0]


def test_a_function_gets_what_trl_gives_it(tmp_path: Path) -> None:
    path = file(tmp_path, (
        "SEEN = {}\n"
        "def all_of_it(prompts, completions, completion_ids, answer, **columns):\n"
        "    SEEN.update(prompts=prompts, completions=completions, ids=completion_ids)\n"
        "    SEEN.update(answer=answer, **columns)\n"
        "    return [float(c == a) for c, a in zip(completions, answer)]\n"
        "def short(completions, weight=2.0):\n"
        "    return [weight * len(c) for c in completions]\n"
    ))  # fmt: skip
    every, short = load_rewards([f"{path}:all_of_it", f"{path}:short"], prompts())
    assert values(every(written(["1", "x"]))) == [1.0, 0.0]
    seen = every.function.__globals__["SEEN"]  # type: ignore[attr-defined]
    assert seen["prompts"] == ["What is 0 + 1?", "What is 1 + 1?"]
    assert (seen["completions"], seen["ids"]) == (["1", "x"], [[7, 8], [7, 8]])
    assert (seen["answer"], seen["level"]) == (["1", "2"], [0, 1])
    assert values(short(written(["abc", ""]))) == [6.0, 0.0]


def test_a_chat_gets_messages(tmp_path: Path) -> None:
    path = file(
        tmp_path, "def last(completions, prompts):\n    return [len(c[0]['content']) for c in completions]\n"
    )
    rows = [{"prompt": [{"role": "user", "content": "Hi"}]}]
    (asked,) = prompts(rows)
    assert asked.asked == [{"role": "user", "content": "Hi"}]
    (reward,) = load_rewards([f"{path}:last"], [asked])
    assert values(reward([Written(EncodedPrompt((1, 2), 1, asked), "abc", (7,))])) == [3.0]


@pytest.mark.parametrize("code, name, seen", [
    ("", "correct", "no function 'correct'"),
    ("def corect(completions):\n    return []\n", "correct", "did you mean 'corect'?"),
    ("def correct(completions, gold):\n    return []\n", "correct", "asks for gold"),
    ("async def correct(completions):\n    return []\n", "correct", "asynchronous"),
    ("import no_such_module\n", "correct", "ModuleNotFoundError"),
    ("1 / 0\n", "correct", "ZeroDivisionError"),
])  # fmt: skip
def test_what_is_missing_is_said_first(tmp_path: Path, code: str, name: str, seen: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_rewards([f"{file(tmp_path, code)}:{name}"], prompts())
    assert seen in str(refusal.value)


def test_names_that_stand_for_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'exact_match'"):
        load_rewards(["exact_mach"], prompts())
    with pytest.raises(ConfigError, match="No file"):
        load_rewards([f"{tmp_path / 'nothing.py'}:correct"], prompts())
    with pytest.raises(DataError, match="could compare with") as refusal:
        load_rewards(["exact_match"], prompts([{"prompt": "Write something."}, {"prompt": "And again."}]))
    assert refusal.value.problems == ("row 1", "row 2")


def test_failures_are_named_once_and_cost_only_their_answers(tmp_path: Path) -> None:
    path = file(tmp_path, (
        "def brittle(completions):\n"
        "    return [1 / len(c) for c in completions]\n"
        "def odd(completions):\n"
        "    return [{'': None, 'nan': float('nan'), 'text': 'x'}.get(c, 0.5) for c in completions]\n"
        "def short(completions):\n"
        "    return [1.0] * (len(completions) - 1)\n"
        "def alone(completions):\n"
        "    return 1.0\n"
        "def array(completions):\n"
        "    import torch\n"
        "    return torch.tensor([2.0] * len(completions))\n"
    ))  # fmt: skip
    names = ("brittle", "odd", "short", "alone", "array")
    rewards = load_rewards([f"{path}:{name}" for name in names], prompts())
    brittle, odd, short, alone, array = rewards
    heard: list[str] = []
    forget_notices()
    with notices_to(heard.append):
        assert values(brittle(written(["ab", "", "abcd", ""]))) == [0.5, None, 0.25, None]
        scores = odd(written(["", "nan", "text", "good"]))
        assert values(scores) == [None, None, None, 0.5]
        assert [bool(score.failure) for score in scores] == [False, True, True, False]
        assert "0 rewards for 1" in short(written(["a", "b"]))[0].failure
        assert "not a list" in alone(written(["a"]))[0].failure
        assert values(array(written(["a", "b"]))) == [2.0, 2.0]
    assert sum("brittle" in text for text in heard) == 1
    assert "raised ZeroDivisionError (division by zero), first for an answer to row 2" in heard[0]


def test_sums_are_weighted_and_leave_failures_out() -> None:
    scores = [
        [Score(1.0), Score(0.0), Score(None), Score(None), Score(1.0)],
        [Score(2.0), Score(None), Score(None), Score(3.0), Score(None, "raised X")],
    ]
    table, failed, totals = totals_of(scores, (1.0, 0.5))
    assert table.shape == failed.shape == (5, 2)
    assert totals[:2].tolist() == [2.0, 0.0]
    assert math.isnan(totals[2]) and totals[3] == 1.5 and math.isnan(totals[4])
    assert failed.sum() == 1 and bool(failed[4, 1])
    assert torch.equal(totals_of(scores[:1], None)[2][:2], torch.tensor([1.0, 0.0]))


def test_a_run_goes_on_with_the_functions_it_began_with(tmp_path: Path) -> None:
    path = file(tmp_path, "def correct(completions):\n    return [1.0] * len(completions)\n")
    names = [f"{path}:correct", "exact_match"]
    folder = tmp_path / "rollouts"
    require_same(load_rewards(names, prompts()), folder)
    require_same(load_rewards(names, prompts()), folder)
    file(tmp_path, "def correct(completions):\n    return [2.0] * len(completions)\n")
    with pytest.raises(CheckpointError, match=r"rewards\.py:correct changed"):
        require_same(load_rewards(names, prompts()), folder)
