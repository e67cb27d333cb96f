"""Ours: the step of `graft tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.case import Case
from harness.measurement import Recorder
from harness.on_device import graft_model, start_alike
from harness.writer import ADAPTER, BASE, Example, method_config, per_step


def train(case: Case, ways: frozenset[str], folder: Path, recorder: Recorder) -> None:
    """Load, attach, and take all steps. The ways are those of `sides/registry.py`."""
    import torch  # noqa: F401 (what all of this needs, before the clock starts)

    from graftlm.models.fusing.fused import KINDS, Fusable
    from graftlm.objectives.sft import SftObjective
    from graftlm.training.optim import make_optimizer
    from graftlm.training.step import optimizer_step
    from graftlm.verbs.acceleration import accelerated
    from graftlm.verbs.step_setup import step_setup

    recorder.imported()
    case = as_asked(case, ways)
    model, adapters = adapted(case, ways, folder, recorder)
    recipe = recipe_of(case, ways)
    parameters = adapters.named_parameters("default")
    optimizer = make_optimizer(parameters, recipe.train)
    steps = per_step(case, folder)
    everything = batches_of(case, [example for step in steps for example in step])
    kinds = [] if "eager" in ways else [kind for kind in KINDS if kind_name(kind) not in case.without]
    setup = step_setup(
        model, SftObjective(model), recipe, tokens=everything.most_tokens,
        find=lambda model: Fusable(tuple(kind(model) for kind in kinds)),
    )  # fmt: skip
    _, total = adapters.count_parameters()
    setup, acceleration = accelerated(setup, recipe, everything, parameters, total)
    model.train()
    recorder.run.note = (
        f"{setup.fusable.summary or 'nothing fused'}; recompute: {setup.recompute.policy}; "
        f"layers {acceleration.compile.text}{', recorded' if acceleration.recorded.records else ''}"
    )
    windows = [micro_batches(batches_of(case, examples)) for examples in steps]
    with setup.in_use():
        recorder.begin()
        for window in windows:
            stats = optimizer_step(
                model, setup.objective, window, parameters, optimizer,
                max_grad_norm=recipe.train.max_grad_norm, stop_asked=lambda: False,
            )  # fmt: skip
            if stats.outcome != "applied":
                raise RuntimeError(f"the step was not applied: {stats.outcome}")
            recorder.step(stats.loss, stats.grad_norm, stats.real_tokens)


def as_asked(case: Case, ways: frozenset[str]) -> Case:
    """The case as the side's ways change it."""
    for way in ways:
        if way.startswith("base "):
            case = case.but(quantization=way.removeprefix("base "))
    return case.but(method="lora") if "lora" in ways else case


def recipe_of(case: Case, ways: frozenset[str]) -> Any:
    """The recipe that says the same as the case."""
    from graftlm.training.recipe import Recipe

    stored, _, products = case.quantization.partition("-")
    return Recipe.model_validate({
        "model": {"name": "any", "quantization": stored, **({"products": "fp8"} if products else {})},
        "data": {"path": "any", "max_length": case.length},
        "train": {
            "learning_rate": case.rate,
            "per_device_train_batch_size": case.rows,
            "gradient_accumulation_steps": 1,
            "max_steps": case.steps,
            "recompute": case.recompute,
            "compile": "on" if "compiled" in ways else "auto",
            # On another device a recording is refused, so that the tiny model of --smoke goes without.
            "recorded_steps": "on" if "recorded" in ways and case.device == "cuda" else "auto",
        },
    })  # fmt: skip


def adapted(case: Case, ways: frozenset[str], folder: Path, recorder: Recorder) -> tuple[Any, Any]:
    """The model with its adapters, of which `default` is trained."""
    import torch

    from graftlm.formats.layout import FOLDER
    from graftlm.methods.attach import attach, attach_folder
    from graftlm.models.load import load_model

    if case.on_device:
        model = graft_model(case)
    else:
        stored = case.quantization.partition("-")[0]
        options: dict[str, Any] = {"quantization": stored, "device": case.device}
        model, _ = load_model(folder / BASE, dtype=torch.bfloat16, **options)
    recorder.base(model)
    if case.on_device or "lora" in ways:
        adapters = attach(model, method_config(case), storage=FOLDER)
        named = adapters.named_parameters("default")
        start_alike((name, each) for name, each in named.items() if name.endswith("lora_A"))
    else:
        adapters = attach_folder(model, folder / ADAPTER, storage=FOLDER)
    others = [f"other{number}" for number in range(1, case.adapters)]
    for name in others:
        attach(model, method_config(case), name, storage=FOLDER)
    adapters.activate(["default", *others[: case.active - 1]])
    adapters.train_only("default")
    return model, adapters


def batches_of(case: Case, examples: list[Example]) -> Any:
    """Examples as `graft tune` packs them."""
    from graftlm.data.batches import Batches
    from graftlm.data.encode import Encoded

    rows = [Encoded(tuple(ids), tuple(labels), at, False) for at, (ids, labels) in enumerate(examples)]
    return Batches(
        rows, rows_per_batch=case.rows, max_length=case.length, packing=True, seed=0, pad_token_id=0
    )


def micro_batches(batches: Any) -> list[Any]:
    """All of an epoch: one step's examples, with nothing from other steps in between."""
    return [batches.batch(0, index) for index in range(batches.count(0))]


def kind_name(kind: object) -> str:
    """How `--without` calls a kind of faster part: its file's name."""
    return str(getattr(kind, "__module__", "")).rpartition(".")[2]
