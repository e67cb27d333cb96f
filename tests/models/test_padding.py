from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from graftlm.models.padding import ensure_padding


def tokenizer(specials: list[str], **roles: str) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.add_special_tokens([AddedToken(word, special=True) for word in specials])
    return PreTrainedTokenizerFast(tokenizer_object=words, **roles)


@pytest.mark.parametrize(
    ("specials", "roles", "chosen"),
    [
        (["</s>", "<pad>"], {"eos_token": "</s>", "pad_token": "<pad>"}, "<pad>"),
        (["</s>", "<unk>", "<|pad|>"], {"eos_token": "</s>", "unk_token": "<unk>"}, "<|pad|>"),
        (["</s>", "<|finetune_right_pad_id|>"], {"eos_token": "</s>"}, "<|finetune_right_pad_id|>"),
        (["</s>", "<|reserved_special_token_0|>"], {"eos_token": "</s>"}, "<|reserved_special_token_0|>"),
        (["</s>", "<unk>"], {"eos_token": "</s>", "unk_token": "<unk>"}, "<unk>"),
        (["<end>"], {"eos_token": "<end>", "bos_token": "<end>", "unk_token": "<end>"}, "<end>"),
        ([], {}, "a"),
    ],
)
def test_the_least_harmful_token_pads(specials: list[str], roles: dict[str, str], chosen: str) -> None:
    subject = tokenizer(specials, **roles)
    before = len(subject)
    ensure_padding(subject, before, "test")
    assert subject.pad_token == chosen
    assert len(subject) == before


def test_a_token_beyond_the_embedding_is_no_choice() -> None:
    subject = tokenizer(["</s>", "<unk>", "<|pad|>"], eos_token="</s>", unk_token="<unk>")
    ensure_padding(subject, 4, "test")
    assert subject.pad_token == "<unk>"
