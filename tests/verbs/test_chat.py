"""`graft chat`: the answer of the adapter, in the template it was trained with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graftlm.core.errors import GraftError, ModelError, UsageError
from graftlm.data.encode import encode_prompt
from graftlm.data.records import Example, Turn
from graftlm.models.generate import generate_text
from graftlm.verbs.chat import ChatSession, chat
from graftlm.verbs.tune_result import TuneResult

QUESTION = "What is twice 21?"


@pytest.fixture(scope="module")
def session(tuned: TuneResult) -> ChatSession:
    return chat(tuned.run, max_new_tokens=12)


def test_the_answer_is_that_of_generate(session: ChatSession) -> None:
    session.reset()
    asked = Example((Turn("user", QUESTION, trained=False), Turn("assistant", "", trained=True)), row=1,
                    style=session.style)  # fmt: skip
    ids = encode_prompt(asked, session.tokenizer)
    expected = generate_text(session.model, session.tokenizer, [ids], max_new_tokens=12)[0]
    assert session.reply(QUESTION) == expected
    assert expected.startswith("It is"), "six steps are enough for the form of the answer"


def test_pieces_make_the_answer_and_toggling_the_base(session: ChatSession) -> None:
    session.reset()
    whole = session.reply(QUESTION)
    session.reset()
    assert "".join(session.stream(QUESTION)) == whole
    session.reset()
    assert session.toggle_adapter() is False
    assert session.reply(QUESTION) != whole
    assert session.toggle_adapter() is True
    session.reset()
    assert session.reply(QUESTION) == whole


def test_a_conversation_beyond_the_context(session: ChatSession) -> None:
    session.reset()
    with pytest.raises(ModelError, match="the context of this base is"):
        session.reply("word " * 5000)
    assert session.reply(QUESTION), "the failed turn was not remembered"


def test_a_base_alone() -> None:
    session = chat("sprout", max_new_tokens=3)
    assert isinstance(session.reply("Hello"), str)
    with pytest.raises(GraftError, match="without an adapter"):
        session.toggle_adapter()


def test_an_adapter_folder(tuned: TuneResult, session: ChatSession) -> None:
    session.reset()
    assert chat(tuned.adapter, max_new_tokens=12).reply(QUESTION)


def test_an_encoder_decoder_answers_a_source(shared: Path) -> None:
    session = chat(shared / "models" / "g2p-bart-gb")
    first = session.reply("shart")
    assert (session.style, first) == ("completion", "ʃˈɑːt"), "as its description says"
    assert session.reply("shart") == first, "there is no conversation"


def test_what_cannot_talk(shared: Path) -> None:
    with pytest.raises(ModelError, match="does not write text"):
        chat(shared / "models" / "roberta-tiny-en")


def test_names_of_the_registry() -> None:
    with pytest.raises(UsageError, match="registry"):
        chat("support@3")


def test_a_run_without_an_adapter_yet(tuned: TuneResult, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes((tuned.run / "recipe.yaml").read_bytes())
    with pytest.raises(GraftError) as refused:
        chat(tmp_path)
    assert "no adapter yet" in refused.value.seen
    assert refused.value.fix == f"graft tune {tmp_path} --resume"
    assert json.dumps(refused.value.as_dict())
