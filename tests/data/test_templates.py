"""The mask is right: on real tokenizers, and on the kinds of chat templates found in the wild."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from graftlm.core.errors import ConfigError, DataError
from graftlm.data.encode import IGNORED, encode_example, encode_examples, encode_prompt
from graftlm.data.records import Example, Turn
from graftlm.data.templates import choose_template, end_token_ids, render

TOKENIZERS = ("gpt2-tiny-en", "stories260K", "roberta-tiny-en")


def talk(*texts: str, system: str = "") -> Example:
    """user, assistant, user, assistant, ..."""
    turns = [Turn("system", system, trained=False)] if system else []
    for index, text in enumerate(texts):
        turns.append(Turn("assistant", text, True) if index % 2 else Turn("user", text, False))
    return Example(tuple(turns), row=1)


def trained_texts(example: Example, tokenizer: Any) -> list[str]:
    return [segment.text for segment in render(example, tokenizer) if segment.trained]


def trained_runs(example: Example, tokenizer: Any) -> list[str]:
    """What the labels say is learnt, decoded, one text per answer."""
    encoded = encode_example(example, tokenizer, 512)
    runs: list[list[int]] = [[]]
    for label in encoded.labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    assert all(
        label in (IGNORED, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True)
    )
    return [tokenizer.decode(run).strip() for run in runs if run]


CASES = {
    "chatml": ("<|im_end|>", ""),
    "llama3": ("<|eot_id|>", ""),
    "trims": ("<|im_end|>", ""),
    "default system": ("<|im_end|>", ""),
    "no system": ("<|im_end|>", ""),
    "thinking": ("<|im_end|>", ""),
    "no generation prompt": ("<|im_end|>", "<|im_start|>assistant\n"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", CASES)
def test_every_answer_and_its_end_token_is_trained_and_nothing_else(
    tokenizer_of: Callable[..., Any], name: str, template: str
) -> None:
    end, header = CASES[template]
    tokenizer = tokenizer_of(name, template)
    example = talk("What is two?", "It is 2.", "And three?", "It is 3, I think.", system="Be brief.")
    assert trained_texts(example, tokenizer) == [f"{header}It is 2.{end}", f"{header}It is 3, I think.{end}"]
    runs = trained_runs(example, tokenizer)
    assert [run.replace(" ", "") for run in runs] == [
        text.replace(" ", "").strip() for text in trained_texts(example, tokenizer)
    ]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_white_space_that_a_template_trims_does_not_shift_the_mask(
    tokenizer_of: Callable[..., Any], name: str
) -> None:
    tokenizer = tokenizer_of(name, "trims")
    assert trained_texts(talk("  What?\n", "\n Two. \n"), tokenizer) == ["Two.<|im_end|>"]


def test_what_precedes_an_answer_is_what_the_model_gets_at_inference(
    tokenizer_of: Callable[..., Any],
) -> None:
    for name in TOKENIZERS:
        for template in ("chatml", "llama3", "default system", "no generation prompt"):
            tokenizer = tokenizer_of(name, template)
            # GPT-2's rules join two line breaks only at the end of a text: exact for one answer.
            several = ("What is two?", "It is 2.") if template != "llama3" else ()
            example = talk(*several, "Sure?", "Yes.")
            encoded = encode_example(example, tokenizer, 512)
            prompt = tokenizer.apply_chat_template(
                [{"role": turn.role, "content": turn.text} for turn in example.turns[:-1]],
                add_generation_prompt=True,
                return_dict=False,
            )
            assert encode_prompt(example, tokenizer) == prompt
            assert list(encoded.input_ids[: len(prompt)]) == prompt
            assert encoded.labels[len(prompt)] == encoded.input_ids[len(prompt)]


def test_a_template_that_closes_the_conversation(tokenizer_of: Callable[..., Any]) -> None:
    tokenizer = tokenizer_of("stories260K", "closes")
    texts = trained_texts(talk("a", "one", "b", "two"), tokenizer)
    assert texts == ["one<|im_end|>", "two<|im_end|>\n</s>"]


def test_thoughts_that_the_history_forgets(tokenizer_of: Callable[..., Any]) -> None:
    tokenizer = tokenizer_of("stories260K", "forgets thoughts")
    texts = trained_texts(talk("a", "<think>x</think>one", "b", "<think>y</think>two"), tokenizer)
    assert texts == ["one<|im_end|>", "<think>y</think>two<|im_end|>"]


def test_brackets(tokenizer_of: Callable[..., Any]) -> None:
    tokenizer = tokenizer_of("stories260K", "brackets")
    assert trained_texts(talk("a", "one", "b", "two"), tokenizer) == [" one</s>", " two</s>"]
    wrong = Example((Turn("user", "a", False), Turn("user", "b", False), Turn("assistant", "c", True)), row=5)
    encodings = encode_examples([wrong], tokenizer, 64)
    assert "roles must alternate" in encodings.problems[0].what and encodings.problems[0].row == 5


def test_a_template_without_end_token_gets_the_tokenizers(tokenizer_of: Callable[..., Any]) -> None:
    tokenizer = tokenizer_of("stories260K", "endless")
    texts = trained_texts(talk("a", "one", "b", "two"), tokenizer)
    assert texts[-1] == "two\n</s>"
    assert texts[0].strip() == "one"


def test_a_template_that_hides_the_answer_is_refused_by_row(tokenizer_of: Callable[..., Any]) -> None:
    tokenizer = tokenizer_of("stories260K", "rewrites")
    with pytest.raises(DataError, match="chat template"):
        render(talk("a", "one", "b", "two"), tokenizer)
    encodings = encode_examples([talk("a", "one", "b", "two")], tokenizer, 64)
    assert not encodings.rows
    assert [problem.code for problem in encodings.problems] == ["template"]


def test_a_system_turn_the_template_refuses_goes_into_the_first_question(
    tokenizer_of: Callable[..., Any],
) -> None:
    tokenizer = tokenizer_of("stories260K", "no system")
    text = "".join(segment.text for segment in render(talk("Hi", "Yo", system="Be kind."), tokenizer))
    assert "<|im_start|>user\nBe kind.\n\nHi<|im_end|>" in text


def test_tools_are_handed_to_templates_that_know_them(tokenizer_of: Callable[..., Any]) -> None:
    tools = json.dumps([{"name": "add", "parameters": {}}])
    call = json.dumps({"name": "add", "arguments": {"a": 1}})
    turns = (
        Turn("user", "1+1?", False),
        Turn("tool_call", call, True),
        Turn("tool", "2", False),
        Turn("assistant", "Two.", True),
    )
    example = Example(turns, row=1, tools=tools)
    known = tokenizer_of("stories260K", "tools")
    texts = trained_texts(example, known)
    assert texts[0].startswith("<call>") and texts[0].endswith("</call><|im_end|>")
    assert texts[1] == "Two.<|im_end|>"
    unknown = tokenizer_of("stories260K", "chatml")
    assert trained_texts(example, unknown) == [f"{call}<|im_end|>", "Two.<|im_end|>"]
    assert '"add"' in "".join(segment.text for segment in render(example, unknown) if not segment.trained)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_base_models_get_prompt_answer_and_end_token(tokenizer_of: Callable[..., Any], name: str) -> None:
    tokenizer = tokenizer_of(name)
    pair = Example((Turn("user", "2+2=", False), Turn("assistant", "4", True)), row=1, style="completion")
    encoded = encode_example(pair, tokenizer, 64)
    assert encoded.labels[-1] == tokenizer.eos_token_id
    starts_with_begin = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert (encoded.input_ids[0] == tokenizer.bos_token_id) == starts_with_begin
    assert trained_runs(pair, tokenizer)[0].replace(tokenizer.eos_token, "").strip() == "4"
    both = trained_texts(talk("One?", "1", "Two?", "2"), tokenizer)
    assert both == [f"1{tokenizer.eos_token}", f"2{tokenizer.eos_token}"]


def test_all_trains_everything_but_the_first_token(tokenizer_of: Callable[..., Any]) -> None:
    tokenizer = tokenizer_of("stories260K", "chatml")
    encoded = encode_example(talk("a", "b"), tokenizer, 64, train_on="all")
    assert encoded.labels == (IGNORED, *encoded.input_ids[1:])


def test_a_border_that_the_tokenizer_would_join_is_tokenised_as_at_inference(
    tokenizer_of: Callable[..., Any],
) -> None:
    tokenizer = tokenizer_of("gpt2-tiny-en")
    pair = Example(
        (Turn("user", "Say ", False), Turn("assistant", "the end", True)), row=3, style="completion"
    )
    encodings = encode_examples([pair], tokenizer, 64)
    assert not encodings.problems
    prompt = tokenizer("Say ")["input_ids"]
    assert list(encodings.rows[0].input_ids[: len(prompt)]) == prompt
    learnt = [label for label in encodings.rows[0].labels if label != IGNORED]
    assert tokenizer.decode(learnt) == "the end<|endoftext|>"


def test_a_border_that_cannot_be_split_is_trained_and_reported(tokenizer_of: Callable[..., Any]) -> None:
    tokenizer = tokenizer_of("stories260K")  # would put another space before a text of its own
    pair = Example(
        (Turn("user", "Say ", False), Turn("assistant", "the end", True)), row=3, style="completion"
    )
    encodings = encode_examples([pair], tokenizer, 64)
    assert [problem.code for problem in encodings.problems] == ["merged_boundary"]
    learnt = [label for label in encodings.rows[0].labels if label != IGNORED]
    assert tokenizer.decode(learnt).strip() == "the end</s>"


def test_stop_tokens_are_the_end_token_and_the_end_of_turn(tokenizer_of: Callable[..., Any]) -> None:
    tokenizer = tokenizer_of("stories260K", "chatml")
    assert end_token_ids(tokenizer) == (
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )
    assert end_token_ids(tokenizer_of("stories260K")) == (2,)


def test_a_named_chat_template_must_exist(tokenizer_of: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="chatml"):
        render(talk("a", "b"), tokenizer_of("stories260K"), "chatml")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no chat template"):
        choose_template(tokenizer_of("stories260K"), "chat")
