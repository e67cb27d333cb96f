"""What a policy wrote for one step, and what it was worth: kept in the run folder.

`rollouts/step-000012.jsonl` is for people: prompt, completion, rewards, advantage. The tensors file of the
same name holds the tokens and log-probabilities. A run that goes on reads both instead of writing anew, so
that rewards that are not the same twice do not change what it learns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from graftlm.core.errors import CheckpointError
from graftlm.core.files import write_atomic

FOLDER = "rollouts"


@dataclass(frozen=True)
class Rollouts:
    """The answers of one step: P prompts with G answers each, A = P * G answers of N tokens in all.

    rows: [P], of the data. answers: [A], token ids, prompt by prompt. ended: [A], whether each ended by
    itself. rewards: [A, F] of each reward, NaN where it says nothing; failed: [A, F], where it should have.
    totals: [A], the weighted sum; NaN where an answer teaches nothing. of_answers: further tensors [A],
    of_tokens: [N], by name: advantages, old_log_probs, reference_log_probs ...
    """

    rows: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    ended: Tensor
    rewards: Tensor
    failed: Tensor
    totals: Tensor
    of_answers: Mapping[str, Tensor] = field(default_factory=dict)
    of_tokens: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def group(self) -> int:
        """Answers to each prompt."""
        return len(self.answers) // len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each answer."""
        return [len(answer) for answer in self.answers]

    def taught(self, truncated_too: bool) -> Tensor:
        """The answers that something is learnt from: [A]."""
        judged = ~self.totals.isnan()
        return judged if truncated_too else judged & self.ended

    def tokens_of(self, chosen: Sequence[int]) -> Tensor:
        """Indices of the tokens of some answers, in their order."""
        starts = [0, *accumulate(self.lengths)]
        return torch.cat([torch.arange(starts[each], starts[each + 1]) for each in chosen])

    def facts(self, names: Sequence[str]) -> dict[str, float]:
        """Figures of the step for the log, by TRL's names."""
        judged = self.totals[~self.totals.isnan()]
        groups = self.totals.view(len(self.rows), -1)
        lengths = torch.tensor(self.lengths, dtype=torch.float64)
        found = {
            "reward": float(judged.mean()) if len(judged) else 0.0,
            "reward_std": float(judged.std()) if len(judged) > 1 else 0.0,
            "completions/mean_length": float(lengths.mean()),
            "completions/clipped_ratio": float((~self.ended).double().mean()),
            "completions/empty_ratio": float(((lengths == 1) & self.ended).double().mean()),
            "reward_failures": float(self.failed.any(dim=1).sum()),
        }
        if self.group > 1:
            even = [bool(len(set(values[~values.isnan()].tolist())) < 2) for values in groups]
            found["frac_reward_zero_std"] = sum(even) / len(even)
        if len(names) > 1:
            means = self.rewards.nanmean(dim=0).nan_to_num().tolist()
            found |= {f"rewards/{name}/mean": value for name, value in zip(names, means, strict=True)}
        return found


class RolloutFiles:
    """The rollouts of a run on disk.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / FOLDER

    def save(self, step: int, found: Rollouts, lines: Sequence[Mapping[str, object]]) -> None:
        """Keep the answers that step `step` learns from first; `lines`: the same for people.

        Raises:
            StorageError: the disk refuses.
        """
        tensors = {
            "rows": torch.tensor(found.rows),
            "tokens": torch.tensor([token for answer in found.answers for token in answer]),
            "lengths": torch.tensor(found.lengths),
            "ended": found.ended,
            "rewards": found.rewards,
            "failed": found.failed,
            "totals": found.totals,
            **{f"answer.{name}": value for name, value in found.of_answers.items()},
            **{f"token.{name}": value for name, value in found.of_tokens.items()},
        }
        write_atomic(self._tensors(step), save({name: value.contiguous() for name, value in tensors.items()}))
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomic(self._lines(step), text)  # last: without it the step was never finished

    def load(self, step: int, rows: Sequence[int]) -> Rollouts | None:
        """The inverse of `save`; None if that step was never finished.

        Raises:
            CheckpointError: the file is damaged, or belongs to other prompts.
        """
        if not self._lines(step).is_file():
            return None
        try:
            tensors = load(self._tensors(step).read_bytes())
            pieces = tensors["tokens"].split(tensors["lengths"].tolist())
            found = Rollouts(
                tuple(tensors["rows"].tolist()),
                tuple(tuple(piece.tolist()) for piece in pieces),
                **{name: tensors[name] for name in ("ended", "rewards", "failed", "totals")},
                of_answers=_named(tensors, "answer."),
                of_tokens=_named(tensors, "token."),
            )
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise self._damaged(step, f"{type(error).__name__}: {error}") from error
        if found.rows != tuple(rows):
            raise self._damaged(step, "it answers other prompts")
        return found

    def failures(self) -> int:
        """Answers of all steps so far that a reward failed on."""
        files = sorted(self.folder.glob("step-*.safetensors"))
        return sum(int(load(file.read_bytes())["failed"].any(dim=1).sum()) for file in files)

    def _tensors(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.safetensors"

    def _lines(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.jsonl"

    def _damaged(self, step: int, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self._tensors(step)} cannot be used: {why}.",
            meaning="The run wrote these answers before it was interrupted, and goes on from them.",
            fix=f"Remove {self._lines(step).name}: the answers are written anew, and rewarded anew.",
        )


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
