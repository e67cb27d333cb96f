"""The facts of a task's rows, which are there as records and as tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graftlm.core.errors import DataError
from graftlm.data.encode import IGNORED, Encoded, encode_examples
from graftlm.data.overlap import find_leaks
from graftlm.data.records import Example, Record
from graftlm.data.templates import Template, choose_template, end_token_ids, template_digest
from graftlm.diagnosis.facts.combined import combined
from graftlm.diagnosis.facts.data import Cuts, DataFacts, Masks, Overlap, Rendering
from graftlm.tasks.base import Task
from graftlm.tasks.multi import MultiTask
from graftlm.tasks.records import RecordTask
from graftlm.training.recipe import DataSection
from graftlm.verbs.diagnosing.row_facts import SHOWN, begins_of, cuts_of, ends_of, expects_begin, masks_of
from graftlm.verbs.diagnosing.rows import View, views

COMPARED = 200
"""Rows that are compared with their records, spread evenly."""
ANY_LENGTH = 10**9


def facts_of_task(task: Task[Any], tokenizer: Any) -> DataFacts:
    """Facts of the training rows of a task that has encoded its data; of several tasks together."""
    if isinstance(task, MultiTask):
        return combined([facts_of_task(part, tokenizer) for part in task.parts.values()])
    if not isinstance(task, RecordTask):
        return DataFacts()
    found = views(task.dataset.train)
    overlap = _overlap(task.raw.train, task.raw.held_out, task.raw.repeats)
    if not found:  # nothing is written, as by a classifier
        return DataFacts(overlap=overlap)
    section = task.recipe.data
    is_plain_writing = all(isinstance(record, Example) for record in task.raw.train)
    if is_plain_writing and all(isinstance(row, Encoded) for row in task.dataset.train):
        written = _Written(task.raw.train, task.dataset.train, found, tokenizer, section)
        return written.facts(overlap)
    return _of_views(found, task, overlap, tokenizer)


def _overlap(train: Sequence[Record], held_out: Sequence[Record], repeats: int) -> Overlap:
    found = find_leaks(train, held_out)
    pairs = tuple(f"{held_out[one].row} = {train[other].row}" for one, other in found.leaked[:SHOWN])
    return Overlap(len(train), len(held_out), repeats, len(found.leaked), found.touched, pairs)


def _of_views(
    found: Sequence[View], task: RecordTask[Any, Any, Any], overlap: Overlap, tokenizer: Any
) -> DataFacts:
    """Of rows that are more than one text: pairs of answers, sources and targets."""
    section = task.recipe.data
    is_read = all(view.begins for view in found)
    ends = end_token_ids(tokenizer, section.template) if is_read else _ends_of_targets(tokenizer)
    lengths = _whole_lengths(found, task, tokenizer)
    styles = {getattr(record, "style", "") for record in task.raw.train}
    is_chat = section.template != "plain" and styles == {"chat"}
    longest = None if is_read else getattr(task.recipe.task.settings, "max_target_length", None)
    return DataFacts(
        ends=ends_of(found, tokenizer, ends),
        begins=begins_of(found, tokenizer, is_expected=expects_begin(tokenizer, is_chat=is_chat)),
        masks=masks_of(found),
        cuts=cuts_of(found, ends, limit=longest or section.max_length, lengths=lengths, tokenizer=tokenizer),
        overlap=overlap,
    )


def _whole_lengths(found: Sequence[View], task: RecordTask[Any, Any, Any], tokenizer: Any) -> list[int]:
    """Lengths of all rows, before anything was cut: some of the cut ones are encoded without a limit."""
    cut = {view.row for view in found if view.is_cut}
    short = [record for record in task.raw.train if record.row in cut]
    some = short[:: max(1, len(short) // COMPARED)]
    if not some:
        return [len(view.ids) for view in found]
    if all(isinstance(record, Example) for record in some):  # of sources and targets
        targets = tokenizer(text_target=[record.answer for record in some], verbose=False)["input_ids"]
        whole = [len(ids) for ids in targets]
    else:
        free = copy.copy(task)
        data = task.recipe.data.model_copy(update={"max_length": ANY_LENGTH})
        free.recipe = task.recipe.model_copy(update={"data": data})
        whole = [len(view.ids) for view in views(free.encoded(some, tokenizer, "training"))]
    times = max(1, len(short) // len(some))
    return [*(len(view.ids) for view in found if not view.is_cut), *whole * times]


def _ends_of_targets(tokenizer: Any) -> tuple[int, ...]:
    """What an encoder-decoder ends in: its own end token, or the mark that its tokenizer ends texts with."""
    return tuple(
        dict.fromkeys(
            token for token in (tokenizer.eos_token_id, tokenizer.sep_token_id) if token is not None
        )
    )


@dataclass(frozen=True)
class _Written:
    """Examples that are continued by a causal model, and what became of them."""

    records: Sequence[Example]
    rows: Sequence[Encoded]
    found: Sequence[View]
    tokenizer: Any
    section: DataSection

    def facts(self, overlap: Overlap) -> DataFacts:
        template = choose_template(self.tokenizer, self.section.template)
        ends = end_token_ids(self.tokenizer, self.section.template)
        unfinished = {record.row for record in self.records if record.continues}
        is_chat = template.name == "chat" and any(record.style != "text" for record in self.records)
        begins = begins_of(
            self.found, self.tokenizer, is_expected=expects_begin(self.tokenizer, is_chat=is_chat)
        )
        refused = self._refused(template)
        return DataFacts(
            ends=ends_of(self.found, self.tokenizer, ends, unfinished),
            begins=begins,
            rendering=self._rendering(template, refused),
            masks=self._masks(),
            cuts=self._cuts(ends, set(refused)),
            overlap=overlap,
        )

    @property
    def _pairs(self) -> list[tuple[Example, Encoded]]:
        """Records with prompts beside their rows, where nothing was left out: some, spread evenly."""
        of_row = {row.row: row for row in self.rows if not row.truncated}
        pairs = [
            (record, of_row[record.row])
            for record in self.records
            if record.row in of_row and record.style != "text"
        ]
        return pairs[:: max(1, len(pairs) // COMPARED)]

    def _refused(self, template: Template) -> dict[int, str]:
        """Numbers of the rows that the template cannot render, and why."""
        known = {row.row for row in self.rows}
        found = {}
        for record in self.records:
            if record.row not in known:
                try:
                    template.segments(record)
                except DataError as error:
                    found[record.row] = error.seen.removeprefix(f"row {record.row}: ").rstrip(".")
        return found

    def _rendering(self, template: Template, refused: dict[int, str]) -> Rendering | None:
        if all(record.style == "text" for record in self.records):
            return None
        pairs = self._pairs
        texts = [template.prompt(record) for record, _ in pairs]
        prompts = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        differing = [
            row.row
            for (_, row), prompt in zip(pairs, prompts, strict=True)
            if list(row.input_ids[: len(prompt)]) != list(prompt)
        ]
        return Rendering(
            name=template.name,
            digest=template_digest(template),
            rows=len(self.records),
            refused=len(refused),
            reason=next(iter(refused.values()), ""),
            compared=len(pairs),
            differing=len(differing),
            conversations=sum(record.style == "chat" for record in self.records),
            has_own=bool(self.tokenizer.chat_template),
            examples=tuple([*refused, *differing][:SHOWN]),
        )

    def _masks(self) -> Masks:
        ends = end_token_ids(self.tokenizer, self.section.template)
        unknown = {self.tokenizer.unk_token_id} - set(ends)  # GPT-2's is its end token
        pairs = [(record, row) for record, row in self._pairs if unknown.isdisjoint(row.input_ids)]
        wrong = [row.row for record, row in pairs if not self._says(record, row)]
        prompted = sum(record.style != "text" for record in self.records)
        return masks_of(self.found, prompted=prompted, compared=len(pairs), wrong=wrong)

    def _says(self, record: Example, row: Encoded) -> bool:
        """Whether the trained tokens of a row say all of its answers."""
        trained = [label for label in row.labels if label != IGNORED]
        said = "".join(str(self.tokenizer.decode(trained)).casefold().split())
        wanted = ["".join(turn.text.casefold().split()) for turn in record.turns if turn.trained]
        return all(answer in said for answer in wanted)

    def _cuts(self, ends: Sequence[int], refused: set[int]) -> Cuts:
        """What is cut is encoded once more without a limit, or some of it, to know how long it is."""
        known = {row.row: len(row.input_ids) for row in self.rows if not row.truncated}
        cut = {row.row for row in self.rows}
        dropped = [record for record in self.records if record.row not in cut and record.row not in refused]
        short = [record for record in self.records if record.row in cut - known.keys()]
        times = max(1, len(short) // COMPARED)
        section, limit = self.section, self.section.max_length
        encoded = (
            encode_examples(some, self.tokenizer, ANY_LENGTH, section.train_on, section.template).rows
            for some in (short[::times], dropped[:COMPARED])
        )
        whole, left_out = (([(row.row, len(row.input_ids)) for row in rows]) for rows in encoded)
        long = [row for row, length in left_out if length > limit]
        lengths = [*known.values(), *(length for _, length in left_out)]
        lengths += [length for _, length in whole for _ in range(times)]
        return cuts_of(self.found, ends, limit=limit, lengths=lengths, tokenizer=self.tokenizer, dropped=long)
