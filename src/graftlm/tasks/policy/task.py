"""What all policies have in common that learn from rewards of what they write themselves."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from torch import nn

from graftlm.core.errors import ConfigError
from graftlm.core.notices import notice
from graftlm.data.branches import BranchBatch
from graftlm.data.prompts import EncodedPrompt, Prompt, encode_prompts, to_prompts
from graftlm.data.templates import end_token_ids
from graftlm.evaluation.rows import TokenRow
from graftlm.evaluation.runner import Evaluation
from graftlm.evaluation.text_scores import require_packages, with_scores
from graftlm.methods.adapter_set import AdapterSet
from graftlm.models.generate import Progress, StopFlag, stop_token_ids
from graftlm.models.generate_groups import GroupWriter
from graftlm.objectives.policy_settings import SamplingSettings
from graftlm.objectives.sft import require_causal
from graftlm.tasks.base import spread
from graftlm.tasks.dataset import Converted, kept
from graftlm.tasks.measurement import scores_wanted
from graftlm.tasks.policy.batches import Layout, RolloutBatches
from graftlm.tasks.policy.measure import DURING_TRAINING, MOST, PolicyMeasure, spread_over
from graftlm.tasks.policy.rollouts import RolloutFiles, Rollouts
from graftlm.tasks.policy.writer import Passes, RolloutWriter
from graftlm.tasks.records import RecordTask
from graftlm.tasks.rewards.adapter import adapter_reward
from graftlm.tasks.rewards.record import require_same
from graftlm.tasks.rewards.rewards import ADAPTER, Reward, load_rewards
from graftlm.training.interfaces import Evaluate, HeldOut, StopAsked
from graftlm.training.recipe import Recipe

B = TypeVar("B", bound=BranchBatch)
ROWS_PER_STEP, TOKENS_PER_PASS = 16, 8192
"""Prompts in a step, and tokens in a forward pass, where nobody wrote them."""


class PolicyTask(RecordTask[Prompt, EncodedPrompt, B], Generic[B]):
    """A policy that writes, is rewarded, and learns; the kinds differ in what they make of the rewards."""

    unpacked = "the answers of a policy are not known beforehand"
    rate_scale: ClassVar[float] = 0.3
    """Rewards want smaller steps than imitation: what is learnt from was written a step ago."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._tokenizer: Any = None
        self._files: RolloutFiles | None = None

    @property
    def sampling(self) -> SamplingSettings:
        """The settings that all kinds have."""
        settings = self.recipe.task.settings
        assert isinstance(settings, SamplingSettings)
        return settings

    @property
    @abstractmethod
    def group(self) -> int:
        """Answers to each prompt."""

    @property
    @abstractmethod
    def iterations(self) -> int:
        """Optimizer steps on the same answers."""

    @abstractmethod
    def judge(self, found: Rollouts) -> Rollouts:
        """The rollouts with advantages."""

    @abstractmethod
    def passes(self, model: nn.Module) -> Passes:
        """What has to be known of the answers before the first step on them."""

    @abstractmethod
    def form(self, plain: BranchBatch, tensors: Mapping[str, Any]) -> B:
        """A batch of the objective; without `tensors`, any of that shape."""

    def convert(
        self, rows: Sequence[Mapping[str, Any]], format: str, numbers: Sequence[int], source: str
    ) -> Converted[Prompt]:
        return Converted(*to_prompts(rows, format, numbers, source))

    def look(self) -> None:
        self._rewards = self._load([*self.raw.train, *self.raw.held_out])

    def read_held_out(self, limit: int | None = None) -> None:
        super().read_held_out(limit)
        self._rewards = self._load(self.raw.held_out)

    def _load(self, prompts: Sequence[Prompt]) -> tuple[Reward, ...]:
        require_packages(scores_wanted(self.recipe))
        named = self.sampling.rewards
        plain = load_rewards([name for name in named if not name.startswith(ADAPTER)], prompts)
        by_name = {reward.name: reward for reward in plain}
        return tuple(
            by_name.get(name) or adapter_reward(name, Path(name.removeprefix(ADAPTER)).expanduser())
            for name in named
        )

    def settled(self) -> Recipe:
        recipe, train = super().settled(), self.recipe.train
        written = train.model_fields_set
        if not written & {"per_device_train_batch_size", "gradient_accumulation_steps"}:
            # Rows are prompts, and each has as many answers as its group: far more tokens than the data show.
            most = self.group * self.sampling.max_completion_length
            passes = -(-ROWS_PER_STEP // max(1, min(ROWS_PER_STEP, TOKENS_PER_PASS // most)))
            size = {"per_device_train_batch_size": -(-ROWS_PER_STEP // passes)}
            train = train.model_copy(update={**size, "gradient_accumulation_steps": passes})
        return recipe.model_copy(update={"train": train})

    def require_base(self, model: nn.Module) -> None:
        require_causal(model)

    def encode(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.recipe = self._with_room()
        super().encode(tokenizer)

    def encoded(self, records: Sequence[Prompt], tokenizer: Any, part: str) -> tuple[EncodedPrompt, ...]:
        data = self.recipe.data
        longest = data.max_length - self.sampling.max_completion_length
        return kept(*encode_prompts(records, tokenizer, longest, data.template), data, part)

    def _with_room(self) -> Recipe:
        """The recipe with answers of at most half of `max_length`, unless a length was written that fits."""
        settings, length = self.sampling, self.recipe.data.max_length
        if settings.max_completion_length <= length // 2:
            return self.recipe
        if "max_completion_length" in settings.model_fields_set:
            if settings.max_completion_length < length:
                return self.recipe
            raise ConfigError(
                f"task.max_completion_length is {settings.max_completion_length}, data.max_length {length}.",
                meaning="Prompt and answer together have to fit into data.max_length, and into the context.",
                fix="Set task.max_completion_length to less, or data.max_length to more.",
            )
        notice(f"Answers have at most {length // 2} tokens: half of data.max_length.")
        fitted = settings.model_copy(update={"max_completion_length": length // 2})
        return self.recipe.model_copy(update={"task": replace(self.recipe.task, settings=fitted)})

    def batches(self, tokenizer: Any) -> RolloutBatches[B]:
        train, settings = self.recipe.train, self.sampling
        layout = Layout(
            prompts_per_batch=train.per_device_train_batch_size,
            batches_per_step=train.gradient_accumulation_steps,
            iterations=self.iterations,
            most_new=self.group * settings.max_completion_length,
            takes_truncated=not settings.mask_truncated_completions,
            seed=train.seed,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
        names = [reward.name for reward in self._rewards]
        self._batches = RolloutBatches[B](self.dataset.train, layout, self.form, names)
        return self._batches

    def begin(self, model: nn.Module, adapters: AdapterSet, run: Path, stop: StopFlag) -> None:
        self._files = RolloutFiles(run)
        require_same(self._rewards, self._files.folder)
        draw = GroupWriter(model)
        if draw.why:
            notice(f"Answers are written by transformers' own loop, prompt by prompt: {draw.why}.")
        writer = RolloutWriter(
            model=model,
            draw=draw,
            adapters=adapters,
            tokenizer=self._tokenizer,
            settings=self.sampling,
            rewards=self._rewards,
            files=self._files,
            passes=self.passes(model),
            judge=self.judge,
            ends=self._ends(model),
            group=self.group,
            prompts_per_batch=self.recipe.train.per_device_train_batch_size,
            seed=self.recipe.train.seed,
            stop=stop,
        )
        self._batches.begin(writer)

    def held_out_loss(self, model: nn.Module) -> Evaluate:
        prompts = spread_over(self.dataset.held_out, DURING_TRAINING)
        measure = self._measure(model)

        def evaluate(stop: StopAsked) -> HeldOut | None:
            try:
                rows = measure.rewarded(model, prompts, stop)
            except KeyboardInterrupt:
                if stop():
                    return None
                raise
            tokens = sum(row.figures["answer_tokens"] for row in rows) / len(rows)
            loss = sum(row.loss_sum for row in rows) / len(rows)
            return HeldOut(loss, len(rows), len(rows), {"reward": -loss, "answer_tokens": tokens})

        return evaluate

    def measure(
        self, model: nn.Module, tokenizer: Any, *, name: str, progress: Progress, stop: StopFlag
    ) -> Evaluation:
        asked = self.recipe.eval.metrics
        prompts = spread_over(self.dataset.held_out, MOST if asked == "auto" else len(self.dataset.held_out))
        path, measure = "answers written and judged", self._measure(model)
        found = measure.measure(model, prompts, name=name, path=path, progress=progress, stop=stop)
        return with_scores(found, scores_wanted(self.recipe))

    def _measure(self, model: nn.Module) -> PolicyMeasure:
        seed = self.recipe.train.seed
        return PolicyMeasure(self._tokenizer, self.sampling, self._rewards, self._ends(model), seed)

    def _ends(self, model: nn.Module) -> tuple[int, ...]:
        ends = {*stop_token_ids(model, self._tokenizer)}
        return tuple(sorted(ends | {*end_token_ids(self._tokenizer, self.recipe.data.template)}))

    def probes(self, count: int) -> list[list[int]]:
        return [list(row.input_ids) for row in spread(self.dataset.held_out, count)]

    @property
    def openings(self) -> Sequence[TokenRow]:
        return self.dataset.held_out

    @property
    def facts(self) -> Sequence[tuple[str, str]]:
        found = [("Rewards", ", ".join(self.sampling.rewards)), ("Answers to each prompt", str(self.group))]
        failed = self._files.failures() if self._files is not None else 0
        return [*found, ("Answers that no reward could judge", f"{failed:,}")] if failed else found
