from __future__ import annotations

from graftlm.data.encode import Encoded
from graftlm.evaluation.rows import IGNORED, TokenRow, Tokens, digest, prompt_and_reference, target_count


def test_encoded_examples_are_rows() -> None:
    row: TokenRow = Encoded((0, 5, 6, 7), (IGNORED, IGNORED, 6, 7), row=3, truncated=False)
    assert prompt_and_reference(row) == ([0, 5], [6, 7])
    assert target_count(row) == 2
    assert digest(row) == digest(Tokens((0, 5, 6, 7), (IGNORED, IGNORED, 6, 7), row=9))


def test_only_the_first_answer_of_a_conversation_is_asked_for() -> None:
    row = Tokens((0, 5, 6, 7, 8, 9), (IGNORED, IGNORED, 6, IGNORED, IGNORED, 9), row=1)
    assert prompt_and_reference(row) == ([0, 5], [6])


def test_running_text_has_no_prompt() -> None:
    assert prompt_and_reference(Tokens((0, 5, 6), (IGNORED, 5, 6), row=1)) is None
    assert prompt_and_reference(Tokens((5, 6), (5, 6), row=1)) is None
    assert prompt_and_reference(Tokens((5, 6), (IGNORED, IGNORED), row=1)) is None


def test_digest_tells_labels_apart() -> None:
    assert digest(Tokens((0, 5), (IGNORED, 5), row=1)) != digest(Tokens((0, 5), (0, 5), row=1))
