"""Column names people use, and the finders that recognise a format by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graftlm.data.records import Format, Problem

#: Field of a format -> the column names it goes by, best first.
ALIASES: dict[str, dict[str, tuple[str, ...]]] = {
    "alpaca": {
        "instruction": ("instruction", "instructions"),
        "output": ("output", "response", "answer", "completion", "target"),
    },
    "prompt_completion": {
        "prompt": ("prompt", "query"),
        "completion": ("completion", "response", "answer", "output", "canonical_solution", "target"),
    },
    "question_answer": {"question": ("question",), "answer": ("answer", "response")},
    "text_label": {
        "text": ("text", "sentence", "utterance", "review", "content", "prompt", "query", "input"),
        "label": ("label", "category", "intent", "class", "sentiment", "label_text"),
    },
    "text": {"text": ("text", "content", "document", "body", "story")},
}

#: Pairs of columns that mean "from this, to that".
_PAIRS: tuple[tuple[str, str], ...] = (
    ("source", "target"),
    ("input", "target"),
    ("input", "output"),
    ("document", "summary"),
    ("article", "highlights"),
    ("article", "summary"),
    ("text", "summary"),
    ("dialogue", "summary"),
    ("question", "sql"),
    ("question", "query"),
    ("text", "target"),
    ("input", "references"),
    ("src", "tgt"),
)

_EXCHANGE = ("prompt", "completion")
_JUDGED: dict[str, tuple[str, ...]] = {
    "chosen_score": ("chosen_score", "score_chosen", "chosen_rating", "rating_chosen"),
    "rejected_score": ("rejected_score", "score_rejected", "rejected_rating", "rating_rejected"),
    "margin": ("margin",),
    "system": ("system",),
    "tools": ("tools",),
}
_CONVERSATION = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")
#: Format -> its fields, in the order in which a user names their columns.
FIELDS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
    "text_label": ("text", "label"),
    "source_target": ("source", "target"),
    "preference": ("chosen", "rejected"),
    "text": ("text",),
}
NAMES = tuple(FIELDS)


class ColumnNames:
    """The columns that at least half of the rows have, found whatever their letter case.

    Empty text counts as having the column: an answer that is missing everywhere has to be said, not
    taken for a file without answers. None does not: Parquet and hub data fill absent cells with it.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        counts: dict[str, int] = {}
        self._sample: dict[str, Any] = {}
        for row in rows:
            for key, value in row.items():
                if value is not None:
                    counts[str(key)] = counts.get(str(key), 0) + 1
                    if not self._sample.get(str(key)):
                        self._sample[str(key)] = value
        self.all = tuple(dict.fromkeys(str(key) for row in rows[:1000] for key in row))
        self._by_name: dict[str, str] = {}
        for name, count in counts.items():
            if 2 * count >= len(rows):
                self._by_name.setdefault(name.strip().lower(), name)

    def find(self, *aliases: str) -> str | None:
        return next((self._by_name[alias] for alias in aliases if alias in self._by_name), None)

    def sample(self, column: str) -> Any:
        """The first value of the column that is not empty."""
        return self._sample.get(column)

    def texts(self) -> list[str]:
        return [name for name in self._by_name.values() if isinstance(self._sample[name], str)]


def has(columns: Mapping[str, str]) -> str:
    return "the rows have " + " and ".join(f"{name!r}" for name in columns.values())


def _preference(columns: ColumnNames) -> Format | None:
    chosen, rejected = columns.find("chosen"), columns.find("rejected")
    if chosen and rejected:
        found = {"chosen": chosen, "rejected": rejected}
        prompt = columns.find("prompt", "question", "instruction", *_CONVERSATION)
        if prompt:
            found["prompt"] = prompt
        return Format("preference", found | _beside(columns), has(found))
    label = columns.find("label")
    if not label or not isinstance(columns.sample(label), bool):
        return None
    messages = columns.find(*_CONVERSATION)
    prompt, completion = (columns.find(*ALIASES["prompt_completion"][field]) for field in _EXCHANGE)
    if messages:
        found = {"messages": messages, "mark": label}
    elif prompt and completion:
        found = {"prompt": prompt, "completion": completion, "mark": label}
    else:
        return None
    return Format("preference", found | _beside(columns), f"{has(found)}, which is true or false")


def _beside(columns: ColumnNames) -> dict[str, str]:
    """What rows may say of their answers besides."""
    return {field: name for field, names in _JUDGED.items() if (name := _optional(columns, names))}


def _conversation(columns: ColumnNames) -> Format | None:
    name = columns.find(*_CONVERSATION)
    turns = columns.sample(name) if name else None
    if not name or not isinstance(turns, list) or not turns or not isinstance(turns[0], Mapping):
        return None
    extra = {field: found for field in ("system", "tools") if (found := columns.find(field))}
    if "from" in turns[0]:
        return Format(
            "sharegpt", {"conversations": name, **extra}, f"{name!r} holds turns with 'from' and 'value'"
        )
    if "role" in turns[0]:
        return Format(
            "messages", {"messages": name, **extra}, f"{name!r} holds turns with 'role' and 'content'"
        )
    return None


def _instruction(columns: ColumnNames) -> Format | None:
    instruction = columns.find(*ALIASES["alpaca"]["instruction"])
    if not instruction:
        return None
    instances = columns.find("instances")
    if instances and isinstance(columns.sample(instances), list):
        found = {"instruction": instruction, "instances": instances}
        return Format("alpaca", found, f"{has(found)} (self-instruct: every instance becomes an example)")
    output = columns.find(*ALIASES["alpaca"]["output"])
    if not output:
        return None
    extra = {"input": ("input", "context"), "system": ("system",), "history": ("history",)}
    found = {"instruction": instruction, "output": output}
    found |= {field: name for field, names in extra.items() if (name := _optional(columns, names))}
    return Format("alpaca", found, has({key: found[key] for key in ("instruction", "output")}))


def _optional(columns: ColumnNames, names: tuple[str, ...]) -> str | None:
    """A column that may be empty in most rows."""
    return next((name for name in columns.all if name.strip().lower() in names), None)


def _pairs(columns: ColumnNames) -> Format | None:
    for source, target in _PAIRS:
        first, second = columns.find(source), columns.find(target)
        if first and second:
            found = {"source": first, "target": second}
            return Format("source_target", found, has(found))
    return None


def _fields(columns: ColumnNames) -> Format | None:
    for name in ("question_answer", "prompt_completion", "text_label"):
        wanted = ALIASES[name]
        found = {field: column for field, names in wanted.items() if (column := columns.find(*names))}
        if len(found) == len(wanted):
            return Format(name, found, has(found))
    return None


def _word(columns: ColumnNames) -> Format | None:
    word = columns.find("word")
    others = [name for name in columns.texts() if name != word]
    if not word or not others:
        return None
    found = {"source": word, "target": others[0]}
    if len(others) == 1:
        return Format("source_target", found, has(found))
    names = ", ".join(map(repr, others))
    doubt = Problem(
        None,
        "warning",
        "several_targets",
        f"{names} could each be the target; {others[0]!r} is used because it comes first",
        f"Choose with format: source_target({word}, {others[1]})",
    )
    return Format("source_target", found, f"{has(found)}, the first of {names}", problems=(doubt,))


def _text(columns: ColumnNames) -> Format | None:
    text = columns.find(*ALIASES["text"]["text"])
    if not text or not isinstance(columns.sample(text), str):
        return None
    return Format("text", {"text": text}, f"the rows have {text!r} and nothing to answer")


#: Tried in this order; the first that recognises the columns wins.
FINDERS: tuple[Callable[[ColumnNames], Format | None], ...] = (
    _preference,
    _conversation,
    _instruction,
    _pairs,
    _fields,
    _word,
    _text,
)
