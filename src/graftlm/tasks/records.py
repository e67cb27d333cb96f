"""What nearly all tasks share: records are read from a file, held out, and become rows one by one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from graftlm.data.batches import Batch
from graftlm.data.records import Record
from graftlm.tasks.base import Task, say_unpacked
from graftlm.tasks.dataset import Converted, Dataset, RawDataset, Row, held_out_records, read_split
from graftlm.training.recipe import Recipe

X = TypeVar("X", bound=Record)
R = TypeVar("R", bound=Row)
B = TypeVar("B", bound=Batch)


class RecordTask(Task[B], Generic[X, R, B]):
    """A task of records X that become rows R and batches B."""

    unpacked: ClassVar[str] = ""
    """Why rows are not packed; nothing where they can be."""

    def prepare(self) -> None:
        """Before data are read: what the settings alone say."""

    @abstractmethod
    def convert(
        self, rows: Sequence[Mapping[str, Any]], format: str, numbers: Sequence[int], source: str
    ) -> Converted[X]:
        """Records of raw rows (see `tasks.dataset.Convert`)."""

    def look(self) -> None:
        """At the records to train on: refuse what makes no sense, say what is doubtful.

        Raises:
            DataError: nothing can be learnt from them.
        """

    @abstractmethod
    def encoded(self, records: Sequence[X], tokenizer: Any, part: str) -> tuple[R, ...]:
        """The rows of records; what is dropped or cut is said. `part`: "training" or "held-out".

        Raises:
            DataError: nothing is left.
        """

    def read(self) -> None:
        self.prepare()
        self.raw: RawDataset[X] = read_split(self.recipe.data, self.recipe.train.seed, self.convert)
        self.look()

    def read_held_out(self, limit: int | None = None) -> None:
        self.prepare()
        data = self.recipe.data
        records, found = held_out_records(data.path, data, self.convert)
        self.raw = RawDataset(found, (), tuple(records[:limit]))

    def settled(self) -> Recipe:
        if not self.unpacked:
            return self.recipe
        say_unpacked(self.recipe, self.unpacked)
        return self.recipe.model_copy(update={"data": self.recipe.data.model_copy(update={"packing": False})})

    def encode(self, tokenizer: Any) -> None:
        raw = self.raw
        train = self.encoded(raw.train, tokenizer, "training") if raw.train else ()
        held_out = self.encoded(raw.held_out, tokenizer, "held-out")
        self.dataset: Dataset[R] = Dataset(self.recipe.data.path, raw.format, train, held_out, raw.repeats)
