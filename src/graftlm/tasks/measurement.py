"""Held-out rows and known text, measured on the base before a run and on the adapter after it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from graftlm.core.errors import DataError
from graftlm.core.files import write_atomic
from graftlm.core.progress import progress
from graftlm.data.sources import read_rows
from graftlm.evaluation.known_text import known_from_texts, sample_known_text
from graftlm.evaluation.rows import TokenRow, Tokens, prompt_and_reference
from graftlm.evaluation.runner import Evaluation, evaluate
from graftlm.models.generate import StopFlag
from graftlm.models.sprout import SPROUT, known_text_path
from graftlm.training.recipe import Recipe

SHORT_ANSWER = 64
"""Median length in tokens up to which exact match says something."""
MOST_ANSWERS = 256
"""Answers generated when nobody asked for exact match by name."""


@dataclass(frozen=True)
class KnownText:
    """Rows that the base already knew, and where they come from."""

    rows: tuple[TokenRow, ...]
    source: str


@dataclass(frozen=True)
class Measurement:
    """One state of a model on the held-out rows and on known text."""

    held_out: Evaluation
    known: Evaluation | None
    """None where the task does not write text."""

    def save(self, folder: Path) -> None:
        """Keep it in a run folder, so that a resumed run need not measure the base again."""
        write_atomic(folder / f"{self.held_out.name}-held-out.json", self.held_out.to_json())
        if self.known is not None:
            write_atomic(folder / f"{self.known.name}-known.json", self.known.to_json())

    @classmethod
    def load(cls, folder: Path, name: str, *, with_known: bool) -> Measurement | None:
        """The inverse of `save`; None if it was never finished."""
        paths = [folder / f"{name}-held-out.json", folder / f"{name}-known.json"][: 1 + with_known]
        if not all(path.is_file() for path in paths):
            return None
        found = [Evaluation.from_json(path.read_text(encoding="utf-8")) for path in paths]
        return cls(found[0], found[1] if with_known else None)


def measure_known(
    model: nn.Module, tokenizer: Any, known: KnownText, *, name: str, stop: StopFlag
) -> Evaluation:
    """The loss of the model as it stands on text that the base knew."""
    with progress(f"measuring {name}, known text") as tick:
        return evaluate(
            model, tokenizer, known.rows, name=name, most_answers=0, progress=tick, should_stop=stop
        )


def answers_wanted(recipe: Recipe, rows: Sequence[TokenRow]) -> int | None:
    """How many rows are answered by generation: none, some, or all (None)."""
    if recipe.eval.metrics != "auto":
        return None if scores_wanted(recipe) or "exact_match" in recipe.eval.metrics else 0
    lengths = [len(pair[1]) for row in rows if (pair := prompt_and_reference(row)) is not None]
    return MOST_ANSWERS if lengths and statistics.median(lengths) <= SHORT_ANSWER else 0


def scores_wanted(recipe: Recipe) -> tuple[str, ...]:
    """What answers are judged by, as the recipe names it, besides loss and exact match."""
    named = () if recipe.eval.metrics == "auto" else recipe.eval.metrics
    return tuple(name for name in named if name not in ("loss", "exact_match"))


def known_from_file(recipe: Recipe, tokenizer: Any) -> KnownText | None:
    """Text to measure forgetting on: the recipe's, or the embedded base's own; None where there is neither.

    Raises:
        DataError: the file is missing or holds no text.
    """
    path = recipe.eval.known_path or (known_text_path() if recipe.model.name == SPROUT else None)
    if path is None:
        return None
    texts = [str(row.get("text") or "") for row in read_rows(path).rows]
    if not any(texts):
        raise DataError(
            f"{path} has no column 'text'.",
            meaning="Forgetting is measured on running text that the base should still know.",
            fix="Give a .txt file or rows with 'text' as eval.known_path; without it the base writes text.",
        )
    rows = known_from_texts([text for text in texts if text], tokenizer, max_length=recipe.data.max_length)
    source = Path(path).name if recipe.eval.known_path else "text like its training text"
    return KnownText(tuple(rows), source)


def known_from_base(
    recipe: Recipe, base: nn.Module, tokenizer: Any, openings: Sequence[TokenRow], cache: Path, stop: StopFlag
) -> KnownText:
    """Text to measure forgetting on that the base itself writes, kept in `cache`."""
    if not cache.is_file():
        starts = () if tokenizer.bos_token_id is not None else openings[:64]
        with progress("sampling what the base knows") as tick:
            sampled = sample_known_text(
                base, tokenizer, seed=recipe.train.seed, openings=starts, progress=tick, should_stop=stop
            )
        write_atomic(cache, json.dumps([[row.input_ids, row.labels, row.row] for row in sampled]))
    rows = [Tokens(tuple(ids), tuple(labels), row) for ids, labels, row in json.loads(cache.read_text())]
    return KnownText(tuple(rows), "text sampled from the base itself")
