"""Before the first step: what must hold, what dead processes left, and where to begin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from graftlm.core.errors import CheckpointError, TrainingError
from graftlm.core.files import remove_stale
from graftlm.core.seeding import seed_everything
from graftlm.core.storage import free_bytes, require_space
from graftlm.training.checkpoint import FOLDER, estimate_bytes, latest, published, set_aside
from graftlm.training.interfaces import B, TrainSettings
from graftlm.training.restore import restore
from graftlm.training.session import Session

Resume = Literal["never", "if_present"]


def begin(session: Session[B], resume: Resume) -> None:
    """Clean up, then start afresh or from the newest good checkpoint, and say which.

    Raises:
        CheckpointError: checkpoints that must not be there, do not verify, or belong to another run.
        StorageError: not even one checkpoint would fit on the disk.
    """
    run, announce = session.run, session.announce
    for name in [*remove_stale(run), *remove_stale(run / FOLDER)]:
        announce("notice", text=f"Removed {name}, left behind by a process that was killed.")
    if resume == "never" and published(run):
        raise CheckpointError(
            f"{run} holds checkpoints of an earlier run.",
            meaning="Starting again here would mix two runs.",
            fix="Add --resume to go on with it, or choose another --out.",
        )
    _require_room(session)
    found = latest(run)
    for rejected in found.rejected:
        aside = set_aside(rejected)
        announce("notice", text=f"Rejected {rejected.path.name}: {rejected.why}. It is now {aside.name}.")
    if found.path is not None:
        restored = restore(
            found.path,
            parameters=session.parameters,
            optimizer=session.optimizer,
            identity=session.identity,
        )
        session.resumed(restored.progress)
        for note in restored.notes:
            announce("notice", text=note)
    else:
        seed_everything(session.settings.seed)
        if resume == "if_present":
            announce("notice", text="There is no checkpoint to resume from: starting at step 0.")
    announce(
        "start",
        run=run.resolve().name,
        total_steps=session.total,
        start_step=session.progress.step,
        trainable=sum(parameter.numel() for parameter in session.parameters.values()),
    )


def _require_room(session: Session[B]) -> None:
    needed = estimate_bytes(session.parameters)
    require_space(session.run, needed)
    wanted = needed * (session.settings.save_total_limit + 2)  # and the best, and the one being written
    free = free_bytes(session.run)
    if free < wanted:
        session.announce(
            "notice",
            text=f"Only {free:,} bytes are free; the checkpoints kept by this run may take {wanted:,}.",
        )


def run_identity(settings: TrainSettings, total_steps: int) -> dict[str, Any]:
    """The settings that decide the numbers; how often to save or evaluate may change on resume."""
    names = (
        "gradient_accumulation_steps",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_ratio",
        "weight_decay",
        "max_grad_norm",
        "loraplus_lr_ratio",
        "optim",
        "seed",
    )
    return {"total_steps": total_steps, **{name: getattr(settings, name) for name in names}}


def require_owned(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Every parameter that would get a gradient must belong to the optimizer, and the reverse.

    Raises:
        TrainingError: names those that do not.
    """
    given = {id(parameter) for parameter in parameters.values()}
    own = {id(parameter) for parameter in model.parameters()}
    problems = [
        f"{name}: trainable in the model, but not given to the optimizer"
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in given
    ]
    problems += [
        f"{name}: given to the optimizer, but not part of the model"
        for name, parameter in parameters.items()
        if id(parameter) not in own
    ]
    if problems:
        raise TrainingError(
            "The optimizer and the model do not hold the same trainable parameters.",
            problems=problems[:10],
            meaning="The model was copied or unfrozen after the parameters were collected.",
            fix="Collect the parameters from the model as it is trained.",
        )
