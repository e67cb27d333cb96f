"""Properties of training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.core.errors import GraftError
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach_folder
from graftlm.testing.case import Adapted, Case
from graftlm.testing.expect import expect, expect_close, expect_refusal

STEPS = 4
LEARNING_RATE = 1e-2


def trains_alone(case: Case) -> None:
    """Training changes every parameter of the trained adapter and nothing else in the model."""
    adapted = case.untrained("a", "b")
    adapters = adapted.adapters
    adapters.add("other", case.other)
    adapters.activate(["a", "other"])
    own = adapters.named_parameters("a")
    mine = {id(p) for p in own.values()}
    rest = {n: t for n, t in adapted.model.state_dict(keep_vars=True).items() if id(t) not in mine}
    before = {name: tensor.detach().clone() for name, tensor in rest.items()}
    start = {name: parameter.detach().clone() for name, parameter in own.items()}
    flags = [n for n, p in adapted.model.named_parameters() if p.requires_grad and id(p) not in mine]
    expect(not flags, f"these require gradients too: {flags[:3]}")
    train(adapted, adapters.parameters("a"))
    for name, tensor in rest.items():
        expect(torch.equal(tensor, before[name]), f"training the adapter changed {name}")
        expect(tensor.grad is None, f"{name} gets a gradient")
    for name, parameter in own.items():
        expect(not torch.equal(parameter, start[name]), f"training does not change {name}")


def checkpointing(case: Case) -> None:
    """Activation checkpointing gives the same loss and gradients."""
    _same_gradients(case, reentrant=False)


def checkpointing_reentrant(case: Case) -> None:
    """The same for PyTorch's older, re-entrant form of it."""
    _same_gradients(case, reentrant=True)


def reentrant_refused(case: Case) -> None:
    """A method that re-entrant checkpoints would rob of its gradients refuses in words."""
    adapted = case.adapted()
    before = adapted.logits()
    checkpoint_activations(adapted.model.train(), reentrant=True)
    error = expect_refusal(
        lambda: adapted.model(**adapted.inputs), GraftError, "training with re-entrant checkpoints"
    )
    expect(bool(error.fix), "the refusal does not say what to do instead")
    adapted.model.eval()
    expect_close(adapted.logits(), before, "logits after refused training")


def _same_gradients(case: Case, *, reentrant: bool) -> None:
    wanted_loss, wanted = _gradients(case, None)
    loss, found = _gradients(case, reentrant)
    expect_close(loss, wanted_loss, "the loss with checkpointing")
    for name, gradient in wanted.items():
        expect_close(found[name], gradient, f"the gradient of {name} with checkpointing", rtol=1e-3)


def _gradients(case: Case, reentrant: bool | None) -> tuple[Tensor, dict[str, Tensor]]:
    adapted = case.adapted()
    model = adapted.model.train()
    if reentrant is not None:
        checkpoint_activations(model, reentrant=reentrant)
    loss = model(**adapted.inputs).loss
    loss.backward()
    return loss.detach(), gradients(adapted.adapters.named_parameters("default"))


def checkpoint_activations(model: Any, *, reentrant: bool) -> None:
    """As trainers switch it on, whatever the name of the switch in this version of transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*will be removed in v6", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()


def resumes(case: Case) -> None:
    """Training goes on from a saved folder: the loss is where it was, and falls; all parameters learn."""
    adapted = case.untrained()
    first = train(adapted, adapted.adapters.parameters("default"))
    left = _loss(adapted)
    expect(left < first[0], f"training raises the loss: {first[0]:.4f} to {left:.4f}")
    with TemporaryDirectory() as folder:
        adapted.adapters.save(Path(folder) / "saved")
        model = case.base()
        adapters = attach_folder(model, Path(folder) / "saved", "again", storage=FOLDER)
    again = Adapted(model, adapters, adapted.inputs)
    expect(adapters.trainable == ("again",), "the loaded adapter is not trainable")
    taken_up = _loss(again)
    expect(abs(taken_up - left) < 1e-4, f"the loss was {left:.5f}, after loading {taken_up:.5f}")
    losses = train(again, adapters.parameters("again"))
    gradients(adapters.named_parameters("again"))
    end = _loss(again)
    expect(end < taken_up, f"training after loading raises the loss: {losses} to {end:.4f}")


def train(adapted: Adapted, parameters: Iterable[nn.Parameter], *, steps: int = STEPS) -> list[float]:
    """Some AdamW steps on one batch; the losses before each."""
    optimizer = torch.optim.AdamW(dict.fromkeys(parameters), lr=LEARNING_RATE, weight_decay=0.0)
    model: Any = adapted.model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**adapted.inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    expect(all(map(_is_finite, losses)), f"losses are not finite: {losses}")
    return losses


def gradients(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies of all gradients; each must be there, finite and not zero throughout."""
    found = {}
    for name, parameter in parameters.items():
        if parameter.grad is None:
            raise AssertionError(f"no gradient reaches {name}")
        expect(bool(torch.isfinite(parameter.grad).all()), f"the gradient of {name} is not finite")
        found[name] = parameter.grad.clone()
    silent = [name for name, gradient in found.items() if not gradient.any()]
    expect(not silent, f"the gradient is zero throughout in {silent[:3]}")
    return found


def _loss(adapted: Adapted) -> float:
    with torch.no_grad():
        return float(adapted.model(**adapted.inputs).loss)


def _is_finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
