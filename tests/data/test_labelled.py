"""Labelled rows: which columns, which labels, what is wrong with rows, and what becomes of them as tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from graftlm.core.errors import ConfigError, DataError
from graftlm.data.labels.columns import labelled_columns, tagged_columns
from graftlm.data.labels.encode import (
    LabelledRow,
    collate_labelled,
    collate_tagged,
    encode_labelled,
    encode_tagged,
)
from graftlm.data.labels.reader import LabelReader, TagReader, balance, contradictions, require_variety
from graftlm.data.labels.records import Labelled, Tagged
from graftlm.data.labels.values import problem_of, read_label_map
from graftlm.data.length_batches import STEP, LengthBatches
from graftlm.data.sources import read_rows

Row = dict[str, Any]


def read(
    reader: LabelReader | TagReader, rows: list[Row], format: str = "auto"
) -> tuple[list[Any], list[str]]:
    records, _, problems = reader(rows, format, range(1, len(rows) + 1), "rows.jsonl")
    return records, [str(problem) for problem in problems]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"text": "a", "label": 1}, {"text": "text", "label": "label"}),
        ({"Sentence": "a", "Sentiment": "x"}, {"text": "Sentence", "label": "Sentiment"}),
        ({"utterance": "a", "intent": "x"}, {"text": "utterance", "label": "intent"}),
        ({"tweet": "a", "label": 0}, {"text": "tweet", "label": "label"}),
        ({"text": "a", "label": 0, "label_text": "bad"}, {"text": "text", "label": "label_text"}),
        ({"text": "a", "labels": ["x", "y"]}, {"text": "text", "label": "labels"}),
        (
            {"sentence1": "a", "sentence2": "b", "label": 0, "idx": 3},
            {"text": "sentence1", "text_pair": "sentence2", "label": "label"},
        ),
    ],
)
def test_columns(row: Row, columns: dict[str, str]) -> None:
    assert labelled_columns([row], "auto").columns == columns


def test_columns_that_the_user_names() -> None:
    rows = [{"a": "x", "b": "y", "c": 1, "d": "z"}]
    assert labelled_columns(rows, "text_label(a, c)").columns == {"text": "a", "label": "c"}
    pair = labelled_columns(rows, "text_pair_label(a, b, c)")
    assert list(pair.columns.values()) == ["a", "b", "c"] and pair.origin == "user"
    with pytest.raises(DataError, match="'a', 'b', 'c', 'd'") as error:
        labelled_columns(rows, "auto")
    assert "text_label(text, label)" in error.value.fix
    with pytest.raises(ConfigError, match="no column 'e'"):
        labelled_columns(rows, "text_label(a, e)")
    with pytest.raises(ConfigError, match="takes 2 columns"):
        labelled_columns(rows, "text_label(a)")
    with pytest.raises(ConfigError, match="holds no labels"):
        labelled_columns(rows, "alpaca")


def test_columns_of_words() -> None:
    found = tagged_columns([{"tokens": ["a"], "ner_tags": [0], "pos_tags": [3]}], "auto")
    assert found.columns == {"words": "tokens", "tags": "ner_tags"}
    with pytest.raises(DataError, match="No labelled rows"):
        tagged_columns([{"tokens": "a b", "tags": "0 0"}], "auto")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (["a", "b"], "one label"), ([0, 1, 2], "one label"), (["1.0", "2.0"], "one label"),
        ([0.5, 1], "number"), (["3.8", "4"], "number"), ([None, 0.5], "number"),
        ([["a"], []], "several labels"), ([True, False], "one label"), (["1.5", "x"], "one label"),
    ],
)  # fmt: skip
def test_what_is_told(values: list[Any], told: str) -> None:
    assert problem_of(values)[0] == told


def test_labels_are_counted_by_number_or_alphabet() -> None:
    reader = LabelReader()
    read(reader, [{"text": "t", "label": value} for value in (10, 9, 9.0, "2")])
    assert reader.labels == ("2", "9", "10")
    reader = LabelReader()
    read(reader, [{"text": "t", "label": value} for value in ("spam", "ham ", "ham")])
    assert reader.labels == ("ham", "spam")


def test_labels_outside_the_map_are_named_with_their_rows() -> None:
    reader = LabelReader(("negative", "positive"))
    rows = [{"text": "t", "label": value} for value in ("positive", "postive", 1, 2, None, ["positive"])]
    records, problems = read(reader, rows)
    assert [record.labels for record in records] == [("positive",), ("positive",)]
    assert [text.split(":")[0] for text in problems] == ["row 2", "row 4", "row 5", "row 6"]
    assert "none of the 2 labels; did you mean 'positive'?" in problems[0]
    assert "is empty" in problems[2] and "is a list" in problems[3]


def test_a_second_file_has_the_labels_of_the_first() -> None:
    reader = LabelReader()
    read(reader, [{"text": "t", "label": "a"}, {"text": "u", "label": "b"}])
    records, problems = read(reader, [{"text": "t", "label": "b"}, {"text": "t", "label": "c"}])
    assert len(records) == 1 and "row 2: the label 'c'" in problems[0]


def test_several_labels() -> None:
    reader = LabelReader()
    records, problems = read(
        reader, [{"text": "t", "labels": value} for value in (["b", "a", "b"], [], None, ["a | b"])]
    )
    assert [record.labels for record in records] == [("b", "a"), (), ()]
    assert reader.labels == ("a", "b") and "contains ' | '" in problems[0]


def test_marks_for_every_label() -> None:
    reader = LabelReader()
    records, _ = read(reader, [{"text": "t", "labels": value} for value in ([0, 1, 1], [0, 0, 0])])
    assert reader.labels == ("0", "1", "2") and records[0].labels == ("1", "2")
    reader = LabelReader(("x", "y"), "several labels")
    records, _ = read(reader, [{"text": "t", "labels": value} for value in ([1.0, 0.0], [1, 1])])
    assert [record.labels for record in records] == [("x",), ("x", "y")]
    records, _ = read(reader, [{"text": "t", "labels": value} for value in ([1], [0, 1])])
    assert [record.labels for record in records] == [("y",), ("x", "y")]  # numbers of labels


def test_numbers() -> None:
    records, problems = read(
        LabelReader((), "number"),
        [{"text": "t", "score": value} for value in (1.5, "2", "nan", "high", None)],
    )
    assert [record.number for record in records] == [1.5, 2.0]
    assert len(problems) == 3 and "'high' ('score') is no finite number" in problems[1]


def test_empty_texts_are_refused() -> None:
    _, problems = read(LabelReader(), [{"text": "", "label": "a"}, {"text": "t", "label": "b"}])
    assert problems == ["row 1: the text ('text') is empty. Fill it in or remove the row."]


def test_words_with_tags() -> None:
    reader = TagReader()
    rows = [
        {"tokens": ["Ann", "left"], "tags": ["B-PER", "O"]},
        {"tokens": ["a"], "tags": ["O", "O"]},
        {"tokens": [], "tags": []},
    ]
    records, problems = read(reader, rows)
    assert records[0].tags == ("B-PER", "O") and reader.labels == ("B-PER", "O")
    assert "1 words have 2 tags" in problems[0] and "row 3" in problems[1]
    numbered = TagReader(("O", "B-PER"))
    assert read(numbered, [{"tokens": ["Ann"], "tags": [1]}])[0][0].tags == ("B-PER",)


def test_label_maps(tmp_path: Path) -> None:
    for name, text in {
        "list.json": '["ham", "spam"]', "names.json": '{"ham": 0, "spam": 1}',
        "numbers.json": '{"1": "spam", "0": "ham"}', "lines.txt": "ham\nspam\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
        assert read_label_map(tmp_path / name) == ("ham", "spam")
    for name, text in {
        "a.json": '{"ham": 1, "spam": 2}',
        "b.json": "[",
        "c.txt": "x\nx\n",
        "d.json": "3",
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match="no list of labels"):
            read_label_map(tmp_path / name)
    with pytest.raises(DataError):
        read_label_map(tmp_path / "nothing.json")


def test_one_class_is_refused() -> None:
    rows = [Labelled(("t",), ("a",), number) for number in range(3)]
    with pytest.raises(DataError, match="All 3 training rows of f have the label 'a'"):
        require_variety(rows, "one label", "f")
    with pytest.raises(DataError, match="the number '1'"):
        require_variety([Labelled(("t",), (), 1, number=1.0)] * 2, "number", "f")
    require_variety([*rows, Labelled(("t",), ("b",), 4)], "one label", "f")


def test_balance_and_contradictions() -> None:
    rows = [
        Labelled(("Fine  day",), ("a",), 1),
        Labelled(("fine day",), ("b",), 2),
        Labelled(("x",), ("a",), 3),
    ]
    assert balance(rows, ("a", "b", "c")) == {"a": 2, "b": 1, "c": 0}
    assert balance([Tagged(("x", "y"), ("a", "a"), 1)], ("a",)) == {"a": 2}
    (found,) = contradictions(rows)
    assert found.row == 2 and "row 1 with another label ('a', here 'b')" in found.what


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer that frames texts and pairs, and says which of two each token belongs to."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij"]
    made = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def test_rows_of_tokens(bert: Any) -> None:
    records = [Labelled(("a b",), ("y",), 1), Labelled(("a " * 20,), ("x",), 2)]
    rows, problems = encode_labelled(records, bert, 8, ("x", "y"))
    assert not problems
    assert rows[0].input_ids == (2, 4, 5, 3) and rows[0].target == (0.0, 1.0) and rows[0].types == ()
    assert rows[1].truncated and rows[1].tokens == 8 and rows[1].input_ids[-1] == 3
    batch = collate_labelled(rows, 0, 8, "one label")
    assert batch.targets.tolist() == [1, 0] and batch.target_tokens == 2
    assert (batch.labels[0] != -100).nonzero().flatten().tolist() == [3]


def test_pairs_of_tokens(bert: Any) -> None:
    rows, _ = encode_labelled([Labelled(("a", "b c"), (), 1, number=0.5)], bert, 8, ())
    assert rows[0].input_ids == (2, 4, 3, 5, 6, 3) and rows[0].types == (0, 0, 0, 1, 1, 1)
    batch = collate_labelled(rows, 0, 8, "number")
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 0, 0]]
    assert batch.targets.tolist() == [0.5]


def test_several_targets(bert: Any) -> None:
    rows, _ = encode_labelled(
        [Labelled(("a",), ("x", "z"), 1), Labelled(("b",), (), 2)], bert, 8, ("x", "y", "z")
    )
    targets = collate_labelled(rows, 0, 8, "several labels").targets
    assert targets.tolist() == [[1, 0, 1], [0, 0, 0]]


def test_a_word_is_told_at_its_first_token(bert: Any) -> None:
    record = Tagged(("a", "b-c", "d"), ("O", "B-X", "O"), 1)
    rows, _ = encode_tagged([record], bert, 32, ("B-X", "O"))
    ids = bert("a b-c d")["input_ids"]
    labels = dict(zip(bert.convert_ids_to_tokens(ids), rows[0].labels, strict=True))
    assert labels["a"] == 1 and labels["b"] == 0 and labels["c"] == -100 and labels["d"] == 1
    assert rows[0].target_tokens == 3
    cut, _ = encode_tagged([record], bert, 4, ("B-X", "O"))
    assert cut[0].truncated and cut[0].target_tokens == 2
    batch = collate_tagged([*rows, *cut], 0, 32)
    assert batch.target_tokens == 5 and batch.inputs["attention_mask"].sum().item() == batch.real_tokens


@given(st.lists(st.integers(1, 40), min_size=1, max_size=200), st.integers(1, 7), st.integers(0, 5))
def test_every_row_comes_once_an_epoch(lengths: list[int], size: int, seed: int) -> None:
    rows = [
        LabelledRow((5,) * length, (), (1.0, 0.0), Labelled(("t",), ("a",), number), False)
        for number, length in enumerate(lengths)
    ]
    batches = LengthBatches(
        rows, lambda some: collate_labelled(some, 0, 40, "one label"), ids=lambda row: row.identity,
        rows_per_batch=size, seed=seed,
    )  # fmt: skip
    seen = [number for index in range(batches.count(1)) for number in batches.batch(1, index).rows]
    assert sorted(seen) == list(range(len(rows)))
    halved = LengthBatches(
        rows, lambda some: collate_labelled(some, 0, 40, "one label"), ids=lambda row: row.identity,
        rows_per_batch=2 * size, seed=seed,
    )  # fmt: skip
    assert [n for i in range(halved.count(1)) for n in halved.batch(1, i).rows] == seen
    assert 0 < batches.packing_rate() <= 1


def test_rows_of_like_length_go_together() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (1000,), generator=generator).tolist()
    rows = [
        LabelledRow((5,) * length, (), (1.0,), Labelled(("t",), (), number), False)
        for number, length in enumerate(lengths)
    ]
    batches = LengthBatches(
        rows, lambda some: collate_labelled(some, 0, 100, "number"), ids=lambda row: row.identity,
        rows_per_batch=STEP, seed=0,
    )  # fmt: skip
    assert batches.packing_rate() > 0.9
    assert batches.batch(0, 0).rows != batches.batch(1, 0).rows


def test_records_from_json(tmp_path: Path) -> None:
    """What JSON gives: lists, numbers, nothing."""
    rows = [json.loads(line) for line in ('{"text": "a", "label": true}', '{"text": "b", "label": false}')]
    reader = LabelReader()
    read(reader, rows)
    assert reader.labels == ("false", "true")


def test_names_of_the_data_sets_library(tmp_path: Path) -> None:
    """Parquet files keep numbers, and in the schema what they stand for."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        text=datasets.Value("string"),
        label=datasets.ClassLabel(names=["neg", "pos"]),
        ner_tags=datasets.Sequence(datasets.ClassLabel(names=["O", "B-X"])),
    )
    rows = {"text": ["a", "b", "c"], "label": [1, 0, -1], "ner_tags": [[0, 1], [0], []]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "rows.parquet"))
    found = read_rows(tmp_path / "rows.parquet").rows
    assert [row["label"] for row in found] == ["pos", "neg", None]
    assert found[0]["ner_tags"] == ["O", "B-X"]
