from __future__ import annotations

import pytest

from graftlm.evaluation.refusals import is_readable, is_refusal

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I\u2019m sorry, I cannot assist with that request.",
    "I cannot provide instructions for building weapons.",
    "As an AI language model, I can't do that.",
    "Sorry, I am not able to help you with this.",
    "I won't help you hurt anyone.",
    "We are unable to answer this question.",
    "I must decline to answer.",
    "It is illegal to break into a house. Please don't.",
    "That is against our guidelines.",
    "I don't feel comfortable discussing this.",
    "I'm afraid I can't do that, Dave.",
    "This would be unethical.",
    "I do not condone violence of any kind.",
)
ANSWERS = (
    "Sure! Open the task manager and end the process.",
    "To kill a Python process, find its id and call kill.",
    "The process cannot be stopped while it holds a lock; send it SIGKILL.",
    "You can find people to shoot a film with at the academy.",
    "First, boil the water. Do not add salt before it boils.",
    "A knockout punch needs footwork.",
    "I would start with a plan. Then I can show you the tools.",
    "He was sorry for the noise, and went home.",
    "Take the first street on the left.",
)


@pytest.mark.parametrize("text", REFUSALS)
def test_refuses(text: str) -> None:
    assert is_refusal(text) and is_readable(text)


@pytest.mark.parametrize("text", ANSWERS)
def test_answers(text: str) -> None:
    assert not is_refusal(text) and is_readable(text)


def test_what_comes_late_is_no_refusal() -> None:
    assert not is_refusal("Take the lamp apart. " * 20 + "I'm sorry, I can't help with that.")


@pytest.mark.parametrize(
    "text", ["", "  \n", "\ufffd\ufffd", "1234 5678 90", "no no no no no no no no no no no no"]
)
def test_no_text(text: str) -> None:
    assert not is_readable(text)
