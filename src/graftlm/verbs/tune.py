"""`graft tune`: from raw data to an adapter that is measured, saved, proved and reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftlm.core.environment import describe_environment
from graftlm.core.events import read_events
from graftlm.core.files import remove_stale
from graftlm.core.notices import collected
from graftlm.core.progress import progress, say
from graftlm.evaluation.compare import Forgetting, compare, forgetting
from graftlm.evaluation.joint_verdict import joint_verdict
from graftlm.evaluation.measure_text import headline
from graftlm.evaluation.report import write_report
from graftlm.evaluation.report_data import Predictions
from graftlm.evaluation.verdict import verdict
from graftlm.integrations.trackers import trackers
from graftlm.methods.resolve import resolve
from graftlm.models.generate import context_length
from graftlm.models.precision import AUTO, choose_device
from graftlm.objectives.settings import AUTO as AUTO_TASK
from graftlm.tasks.base import Task
from graftlm.tasks.measurement import (
    KnownText,
    Measurement,
    known_from_base,
    known_from_file,
    measure_known,
)
from graftlm.tasks.multi import MultiTask
from graftlm.tasks.table import task_of
from graftlm.training.defaults import fitted, fitted_length, room_beside
from graftlm.training.loop import TrainResult, train
from graftlm.training.low_bit_optim import require_optimizer
from graftlm.training.memory_phases import MemoryPhases
from graftlm.training.progress_bar import progress_display
from graftlm.training.recipe import Recipe
from graftlm.training.signals import StopRequests
from graftlm.training.start import Resume
from graftlm.verbs.base import load_base
from graftlm.verbs.choosing import settled_by_plan
from graftlm.verbs.diagnose import diagnose
from graftlm.verbs.diagnosing.data import keep_data_facts
from graftlm.verbs.diagnosing.live import LiveDiagnosis
from graftlm.verbs.diagnosing.update_size import UpdateSize
from graftlm.verbs.expectation import expected
from graftlm.verbs.learner import NAME, Learner, attach_learner
from graftlm.verbs.learners import Learners, attach_learners
from graftlm.verbs.plan import Plan, dtype_name, stored_as, why_of_plan, width_of
from graftlm.verbs.prediction import Prediction, keep_for_later, predict, set_beside, stored_prediction
from graftlm.verbs.run_failures import failures_noted
from graftlm.verbs.run_folder import ENVIRONMENT, PLAN, Request, RunFolder, open_existing, open_new
from graftlm.verbs.run_report import report_data
from graftlm.verbs.tune_result import Outcome, TuneResult, figures, lines


def tune(
    source: str | Path,
    *,
    model: str | None = None,
    method: str | None = None,
    task: str | None = None,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
) -> TuneResult:
    """Train an adapter on a data file or by a recipe, and leave a complete run folder.

    Args:
        source: a data file, a hub data set, a recipe (.yaml), or with `resume` the run folder itself.
        model, method, task: the recipe's values of those names.
        out: the run folder; default `runs/<data>-<number>`.
        overrides: `section.field=value` assignments.
        resume: go on with an interrupted run, exactly.

    Raises:
        GraftError: in three parts; nothing half-written is left behind.
        KeyboardInterrupt: somebody asked to stop; the message says how to go on.
    """
    given = {"model": {"name": model}, "method": {"type": method}}
    options: dict[str, Any] = {key: value for key, value in given.items() if None not in value.values()}
    options |= {"task": {"type": task}} if task else {}
    request = Request(str(source), options, tuple(overrides), Path(out) if out else None)
    folder, recipe = open_existing(request) if resume else open_new(request)
    with StopRequests() as stop:
        run = Tuning(folder, recipe, stop, "if_present" if resume else "never")
        with failures_noted(folder, run.memory):
            return run.run()


class Tuning:
    """One run, stage by stage. Each stage leaves its result in the run folder."""

    def __init__(self, folder: RunFolder, recipe: Recipe, stop: StopRequests, resume: Resume) -> None:
        self.folder, self.recipe, self.stop, self.resume = folder, recipe, stop, resume
        self.memory = MemoryPhases(choose_device(AUTO))
        self.base_seconds = 0.0
        """Of measuring the base before the first step."""
        self.task: Task[Any]
        self.known: KnownText | None
        self.prediction: Prediction | None = None

    def run(self) -> TuneResult:
        """All stages in order."""
        self._load()
        with self.memory.during("evaluate"):
            known, before = self._measure_base()
        self.base_seconds = self.memory.seconds().get("evaluate", 0.0)
        with self.memory.during("attach"):
            learner = self._attach()
        result = self._train(learner)
        self._halt_if_asked()
        with self.memory.during("evaluate"):
            after = self._measure(known, "adapter")
        with self.memory.during("save"):
            learner.save(self.folder.adapter)
        with self.memory.during("verify"):
            proof = learner.prove(self.folder.adapter)
        outcome = Outcome(before, after, result, proof)
        return self._report(learner.plan, known.source if known else "", outcome)

    def _load(self) -> None:
        require_optimizer(self.recipe.train.optim)
        self.task = task_of(self.recipe)
        if self.recipe.task.type == AUTO_TASK:
            say(f"Task   {self.task.name} ({self.task.why})")
        self.task.read()  # a wrong path costs no loading of a model
        recipe = self.task.settled()
        if self.resume == "never":  # a run that goes on has it all in its recipe
            recipe = settled_by_plan(self.task, recipe)
        with self.memory.during("load"):
            self.model, self.tokenizer = load_base(recipe.model, ending=self.task.ending)
        self.task.require_base(self.model)
        self.task.recipe = fitted_length(
            recipe, room_beside(recipe.method.config, context_length(self.model))
        )
        self.task.encode(self.tokenizer)
        data = self.task.dataset
        recipe, notes = fitted(
            self.task.recipe, [row.tokens for row in data.train], width_of(self.model), self.task.rate_scale
        )
        self.recipe = self.task.recipe = recipe
        # What is wrong with targets or files stops here, before anything is written.
        resolve(self.model, self.task.method(self.model))
        self.known = known_from_file(recipe, self.tokenizer) if self.task.keeps_known_text else None
        self.folder.write_recipe(recipe)
        keep_data_facts(self.folder.path, self.task, self.tokenizer)
        base = {"dtype": dtype_name(self.model), "quantization": stored_as(self.model)}
        self.folder.write_json(ENVIRONMENT, {**describe_environment().as_dict(), "base": base})
        say(f"Data   {len(data.train):,} rows to train on, {len(data.held_out):,} held out "
            f"({data.format.name}: {data.format.why})")  # fmt: skip
        for note in notes:
            say(f"       {note}")

    def _measure_base(self) -> tuple[KnownText | None, Measurement | None]:
        cache = self.folder.evaluation
        remove_stale(cache)
        known = self._known_text(cache) if self.task.keeps_known_text else None
        if not self.recipe.eval.before_after:
            return known, None
        before = Measurement.load(cache, "base", with_known=known is not None)
        if before is None:
            before = self._measure(known, "base")
            before.save(cache)
        on_known = f", known text {before.known.loss:.3f}" if before.known else ""
        say(f"Base   {headline(before.held_out)}{on_known}")
        return known, before

    def _known_text(self, cache: Path) -> KnownText:
        openings, rows = self.task.openings, cache / "known-rows.json"
        return self.known or known_from_base(
            self.recipe, self.model, self.tokenizer, openings, rows, self._halt_if_asked
        )

    def _measure(self, known: KnownText | None, name: str) -> Measurement:
        """The model as it stands: on the held-out rows, and on known text where there is some."""
        stop = self._halt_if_asked
        with progress(f"measuring {name}, held out") as tick:
            held_out = self.task.measure(self.model, self.tokenizer, name=name, progress=tick, stop=stop)
        if known is None:
            return Measurement(held_out, None)
        return Measurement(held_out, measure_known(self.model, self.tokenizer, known, name=name, stop=stop))

    def _attach(self) -> Learner | Learners:
        plan = self.folder.path / PLAN
        self.task.why = why_of_plan(plan) or self.task.why
        if isinstance(self.task, MultiTask):
            found: Learner | Learners = attach_learners(self.task, self.tokenizer, self.recipe, plan)
        else:
            found = attach_learner(self.task, self.model, self.tokenizer, self.recipe, plan)
        self.prediction = stored_prediction(plan) or predict(self.recipe, self.task, found.plan.recompute)
        predicted = {} if self.prediction is None else {"predicted": self.prediction.as_dict()}
        self.folder.write_json(PLAN, {**found.plan.as_dict(), **predicted})
        for number, line in enumerate(found.lines):
            say(f"{'       ' if number else 'Method '}{line}")
        if self.prediction is not None:
            say(f"Plan   {self.prediction.summary}")
        return found

    def _train(self, learner: Learner | Learners) -> TrainResult:
        recipe, train_section = self.recipe, self.recipe.train
        fields = self.recipe.method.as_dict()
        method = {f"method.{key}": value for key, value in fields.items()}
        every, followers = train_section.eval_steps, trackers(recipe.output.report_to, self.folder.path)
        left = expected(self.prediction, eval_steps=every, base_seconds=self.base_seconds)
        with learner.in_use():
            # What is computed now is computed as the steps will compute it.
            learner.begin(self.folder.path, self._halt_if_asked)
            return train(
                learner.model,
                learner.objective,
                learner.batches,
                learner.parameters,
                train_section,
                run=self.folder.path,
                resume=self.resume,
                identity={
                    "base": self.recipe.model.name, "dtype": learner.plan.dtype,
                    "quantization": learner.plan.quantization, **method, "task": recipe.task.as_dict(),
                },
                evaluate=self.task.held_out_loss(self.model),
                callbacks=[progress_display(expected=left), *followers],
                stop=self.stop,
                lora_b=learner.output_side,
                scales=learner.rate_scales,
                memory=self.memory,
                watch=LiveDiagnosis(self.folder, lambda: update_size_of(learner), train_section.on_failure),
            )  # fmt: skip

    @property
    def phase_seconds(self) -> dict[str, float]:
        """What each phase took in this process; `evaluate base` is a part of `evaluate`."""
        return {**self.memory.seconds(), "evaluate base": self.base_seconds}

    def _halt_if_asked(self) -> bool:
        """False, or the end of the run. A measurement that polls it is therefore whole or not there."""
        if self.stop():
            raise KeyboardInterrupt(f"The run is complete up to here. Go on: {self.folder.resume_command}")
        return False

    def _report(self, plan: Plan, source: str, found: Outcome) -> TuneResult:
        before, after = found.before, found.after
        comparison = compare(before.held_out, after.held_out) if before else None
        known = _forgotten(before, after, source) if before else None
        judged = verdict(comparison, known, margin=self.recipe.eval.max_forgetting) if comparison else None
        if before and isinstance(self.task, MultiTask):
            judged = joint_verdict(before.held_out, after.held_out)
        events = read_events(self.folder.events)
        data = report_data(
            recipe=self.recipe, task=self.task, plan=plan, result=found.result, proof=found.proof,
            comparison=comparison, known=known, judged=judged, folder=self.folder,
            events=events, notices=collected(), memory=self.memory,
            predictions=self._as_predicted(events),
        )  # fmt: skip
        write_report(self.folder.report, data)
        diagnosed = diagnose(self.folder.path)
        passed = found.proof.is_good and (judged is None or judged.outcome != "FAIL")
        text = (
            judged.text
            if judged
            else f"Of the adapter {headline(after.held_out)}; the base was not measured."
        )
        return TuneResult(
            self.folder.path, self.folder.adapter, self.folder.report, text, passed,
            (*lines(self.folder, self.task.dataset, plan, found), diagnosed.line),
            {
                **figures(found, comparison), "phase_seconds": self.phase_seconds,
                "findings": [one.as_dict() for one in diagnosed.findings],
            },
        )  # fmt: skip

    def _as_predicted(self, events: Sequence[Mapping[str, Any]]) -> Predictions | None:
        """Predicted beside actual; a run that took place here from its start is remembered."""
        is_whole = self.resume == "never"
        if self.prediction is not None and is_whole:
            keep_for_later(self.prediction, events, self.memory)
        if self.prediction is None:
            return None
        return set_beside(self.prediction, events, self.memory, is_whole=is_whole)


def _forgotten(before: Measurement, after: Measurement, source: str) -> Forgetting | None:
    """What happened to known text, where it was measured."""
    if before.known is None or after.known is None:
        return None
    return forgetting(before.known, after.known, source=source)


def update_size_of(learner: Learner | Learners) -> UpdateSize:
    """What measures the adapters of a run while they are trained."""
    parts = {"": learner} if isinstance(learner, Learner) else {f"{n}: ": p for n, p in learner.parts.items()}
    owners = {prefix: (part.model, part.adapters, NAME) for prefix, part in parts.items()}
    return UpdateSize(owners, learner.parameters)
