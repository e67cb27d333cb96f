"""`graft tune`: from raw data to an adapter that is measured, saved, proved and reported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graftlm.core.environment import describe_environment
from graftlm.core.events import read_events
from graftlm.core.files import remove_stale
from graftlm.core.notices import collected
from graftlm.core.progress import progress, say
from graftlm.core.seeding import seed_everything
from graftlm.evaluation.compare import Forgetting, compare, forgetting
from graftlm.evaluation.report import write_report
from graftlm.evaluation.rows import TokenRow
from graftlm.evaluation.verdict import verdict
from graftlm.formats.layout import CONFIG
from graftlm.integrations.trackers import trackers
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.resolve import resolve
from graftlm.models.generate import context_length
from graftlm.models.precision import AUTO, choose_device
from graftlm.tasks.base import Task
from graftlm.tasks.measurement import (
    KnownText,
    Measurement,
    known_from_base,
    known_from_file,
    measure_known,
)
from graftlm.tasks.table import task_of
from graftlm.training.defaults import fitted, fitted_length, room_beside
from graftlm.training.loop import TrainResult, train
from graftlm.training.low_bit_optim import require_optimizer
from graftlm.training.memory_phases import MemoryPhases
from graftlm.training.progress_bar import progress_display
from graftlm.training.recipe import Recipe
from graftlm.training.signals import StopRequests
from graftlm.training.start import Resume
from graftlm.verbs.acceleration import accelerated
from graftlm.verbs.base import load_base
from graftlm.verbs.plan import dtype_name, make_plan, stored_as
from graftlm.verbs.proof import prove
from graftlm.verbs.recompute import policy_of_plan
from graftlm.verbs.run_folder import ENVIRONMENT, PLAN, Request, RunFolder, open_existing, open_new
from graftlm.verbs.run_report import report_data
from graftlm.verbs.start import attach_started
from graftlm.verbs.step_setup import step_setup
from graftlm.verbs.tune_result import Outcome, TuneResult, figures, lines

NAME = "default"
PROBES = 8


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
    options |= {"task": task} if task else {}
    request = Request(str(source), options, tuple(overrides), Path(out) if out else None)
    folder, recipe = open_existing(request) if resume else open_new(request)
    with StopRequests() as stop:
        return Tuning(folder, recipe, stop, "if_present" if resume else "never").run()


class Tuning:
    """One run, stage by stage. Each stage leaves its result in the run folder."""

    def __init__(self, folder: RunFolder, recipe: Recipe, stop: StopRequests, resume: Resume) -> None:
        self.folder, self.recipe, self.stop, self.resume = folder, recipe, stop, resume
        self.memory = MemoryPhases(choose_device(AUTO))
        self.task: Task[Any]
        self.known: KnownText | None

    def run(self) -> TuneResult:
        """All stages in order."""
        self._load()
        with self.memory.during("evaluate"):
            known, before = self._measure_base()
        with self.memory.during("attach"):
            adapters = self._attach()
        result = self._train(adapters)
        self._halt_if_asked()
        with self.memory.during("evaluate"):
            after = self._measure(known, "adapter")
        with self.memory.during("save"):
            self._save(adapters)
        with self.memory.during("verify"):
            proof = prove(self.model, adapters, self.folder.adapter, self.task.probes(PROBES))
        return self._report(known.source if known else "", Outcome(before, after, result, proof))

    def _load(self) -> None:
        require_optimizer(self.recipe.train.optim)
        self.task = task_of(self.recipe)
        self.task.read()  # a wrong path costs no loading of a model
        recipe = self.task.settled()
        with self.memory.during("load"):
            self.model, self.tokenizer = load_base(recipe.model, ending=self.task.ending)
        self.task.require_base(self.model)
        self.task.recipe = fitted_length(
            recipe, room_beside(recipe.method.config, context_length(self.model))
        )
        self.task.encode(self.tokenizer)
        width = int(getattr(self.model.config.get_text_config(), "hidden_size", 4096))
        data = self.task.dataset
        recipe, notes = fitted(self.task.recipe, [row.tokens for row in data.train], width)
        self.recipe = self.task.recipe = recipe
        # What is wrong with targets or files stops here, before anything is written.
        resolve(self.model, self.task.method(self.model))
        self.known = known_from_file(recipe, self.tokenizer) if self.task.keeps_known_text else None
        self.folder.write_recipe(recipe)
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
        say(f"Base   held-out loss {before.held_out.loss:.3f}{on_known}")
        return known, before

    def _known_text(self, cache: Path) -> KnownText:
        openings: Sequence[TokenRow] = self.task.dataset.held_out
        return self.known or known_from_base(
            self.recipe, self.model, self.tokenizer, openings, cache / "known-rows.json", self._halt_if_asked
        )

    def _measure(self, known: KnownText | None, name: str) -> Measurement:
        """The model as it stands: on the held-out rows, and on known text where there is some."""
        stop = self._halt_if_asked
        with progress(f"measuring {name}, held out") as tick:
            held_out = self.task.measure(self.model, self.tokenizer, name=name, progress=tick, stop=stop)
        if known is None:
            return Measurement(held_out, None)
        return Measurement(held_out, measure_known(self.model, self.tokenizer, known, name=name, stop=stop))

    def _attach(self) -> AdapterSet:
        recipe = self.recipe
        seed_everything(recipe.train.seed)  # the adapter's start is random, and belongs to the recipe
        self.batches = self.task.batches(self.tokenizer)
        adapters = attach_started(self.model, self.task.method(self.model), NAME, self.batches)
        begun = policy_of_plan(self.folder.path / PLAN)
        objective = self.task.objective(self.model)
        self.setup = step_setup(
            self.model, objective, recipe, tokens=self.batches.most_tokens, started_with=begun
        )
        trained, (_, total) = adapters.named_parameters(NAME), adapters.count_parameters()
        self.setup, acceleration = accelerated(self.setup, recipe, self.batches, trained, total)
        self.plan = make_plan(
            recipe,
            self.model,
            adapters,
            self.task.dataset,
            self.batches,
            objective,
            self.setup.recompute,
            self.setup.fusable,
            acceleration,
        )
        self.folder.write_json(PLAN, self.plan.as_dict())
        say(f"Method {self.plan.summary}")
        say(f"       recomputed in backward: {self.setup.recompute.policy} ({self.setup.recompute.why})")
        say(f"       layers {acceleration.compile.text}")
        return adapters

    def _train(self, adapters: AdapterSet) -> TrainResult:
        recipe, train_section = self.recipe, self.recipe.train
        fields = self.recipe.method.as_dict()
        method = {f"method.{key}": value for key, value in fields.items()}
        parameters = adapters.named_parameters(NAME)
        self.task.begin(self.model, adapters, self.folder.path, self._halt_if_asked)
        with self.setup.in_use():
            return train(
                self.model,
                self.setup.objective,
                self.batches,
                parameters,
                train_section,
                run=self.folder.path,
                resume=self.resume,
                identity={
                    "base": self.recipe.model.name, "dtype": self.plan.dtype,
                    "quantization": self.plan.quantization, **method, "task": recipe.task.as_dict(),
                },
                evaluate=self.task.held_out_loss(self.model),
                callbacks=[progress_display(), *trackers(self.recipe.output.report_to, self.folder.path)],
                stop=self.stop,
                lora_b=[
                    f"{path}.{key}" for path, part in adapters.parts(NAME).items() for key in part.output_side
                ],
                memory=self.memory,
            )  # fmt: skip

    def _save(self, adapters: AdapterSet) -> None:
        """The config is written last: an adapter without it was cut short by a kill, and is written again."""
        remove_stale(self.folder.adapter)
        if not (self.folder.adapter / CONFIG).is_file():
            adapters.save(self.folder.adapter, NAME)

    def _halt_if_asked(self) -> bool:
        """False, or the end of the run. A measurement that polls it is therefore whole or not there."""
        if self.stop():
            raise KeyboardInterrupt(f"The run is complete up to here. Go on: {self.folder.resume_command}")
        return False

    def _report(self, source: str, found: Outcome) -> TuneResult:
        before, after = found.before, found.after
        comparison = compare(before.held_out, after.held_out) if before else None
        known = _forgotten(before, after, source) if before else None
        judged = verdict(comparison, known, margin=self.recipe.eval.max_forgetting) if comparison else None
        data = report_data(
            recipe=self.recipe, task=self.task, plan=self.plan, result=found.result, proof=found.proof,
            comparison=comparison, known=known, judged=judged, folder=self.folder,
            events=read_events(self.folder.events), notices=collected(), memory=self.memory,
        )  # fmt: skip
        write_report(self.folder.report, data)
        passed = found.proof.is_good and (judged is None or judged.outcome != "FAIL")
        text = (
            judged.text if judged else f"Held-out loss {after.held_out.loss:.3f}; the base was not measured."
        )
        return TuneResult(
            self.folder.path, self.folder.adapter, self.folder.report, text, passed,
            lines(self.folder, self.task.dataset, self.plan, found), figures(found),
        )  # fmt: skip


def _forgotten(before: Measurement, after: Measurement, source: str) -> Forgetting | None:
    """What happened to known text, where it was measured."""
    if before.known is None or after.known is None:
        return None
    return forgetting(before.known, after.known, source=source)
