from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from graftlm.evaluation.metrics import exact_match
from graftlm.evaluation.rows import IGNORED, Tokens
from graftlm.evaluation.tasks import LONGEST, MARGIN, answerable, answers


def asking(prompt: list[int], answer: list[int], number: int) -> Tokens:
    return Tokens((*prompt, *answer), (*[IGNORED] * len(prompt), *answer), row=number)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_matches_what_it_writes_itself(
    kind: str, make_model: Callable[..., Any], make_rows: Callable[..., list[Tokens]], letters: Any
) -> None:
    model = make_model(kind).eval()
    prompts = [list(row.input_ids[: row.labels.count(IGNORED)]) for row in make_rows(6)]
    rows = []
    for number, prompt in enumerate(prompts, start=1):
        ids = list(prompt)
        for _ in range(5):  # greedy by hand, without a cache
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        written = ids[len(prompt) :]
        rows.append(asking(prompt, [*written, 1], number))
    found = answers(model, letters, rows, range(6))
    assert found.complete
    for answer in found.rows:
        # The model may go on after five letters: it was never taught to end there.
        assert answer.prediction.startswith(answer.reference.split("</s>")[0])
    wrong = [asking(prompt, [3, 3, 3, 1], number) for number, prompt in enumerate(prompts)]
    assert not all(
        exact_match(a.prediction, a.reference) for a in answers(model, letters, wrong, range(6)).rows
    )


def test_a_prediction_ends_at_the_special_token_that_ends_references(
    make_model: Callable[..., Any], letters: Any
) -> None:
    model = make_model()
    free = answers(model, letters, [asking([0, 5, 6], [7, 8, 9], 1)], [0]).rows[0].prediction
    assert len(free.replace(" ", "")) > 0
    ending = asking([0, 5, 6], [7, 2, 9], 1)  # <unk> is special here and ends the reference
    answer = answers(model, letters, [ending], [0]).rows[0]
    assert answer.reference == letters.decode([7])


def test_predictions_are_as_long_as_references_need(make_model: Callable[..., Any], letters: Any) -> None:
    model = make_model()
    lengths: list[int] = []
    real = model.generate

    def watched(**inputs: Any) -> Any:
        lengths.append(inputs["generation_config"].max_new_tokens)
        return real(**inputs)

    model.generate = watched
    rows = [asking([0, 5], [7] * 3, 1), asking([0, 5, 6], [7] * 9, 2)]
    answers(model, letters, rows, [0, 1])
    assert lengths == [9 + MARGIN]
    assert 9 + MARGIN < LONGEST


def test_the_rows_asked_are_spread_evenly_and_have_prompts(make_rows: Callable[..., list[Tokens]]) -> None:
    text = Tokens((0, 5, 6), (IGNORED, 5, 6), row=0)
    rows = [text, *make_rows(10)]
    assert answerable(rows) == list(range(1, 11))
    assert answerable(rows, 5) == [1, 3, 5, 7, 9]
    assert answerable(rows, 0) == []
    assert answerable(rows, 50) == list(range(1, 11))
