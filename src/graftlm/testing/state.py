"""Properties of an adapted model's state: what is on, what is off, and what is left behind."""

from __future__ import annotations

import copy

import torch

from graftlm.core.errors import AdapterError
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import adapters_of, attach
from graftlm.methods.resolve import resolve
from graftlm.testing.case import Adapted, Case, stir
from graftlm.testing.expect import expect, expect_close, expect_equal, expect_refusal
from graftlm.testing.merging import quiet_ties
from graftlm.testing.models import logits
from graftlm.testing.snapshot import snapshot


def acts(case: Case) -> None:
    """A trained adapter changes the logits, so that no other property holds for want of any effect."""
    found = case.adapted().logits()
    expect(found.shape == case.base_logits().shape, "the adapter changes the shape of the logits")
    expect(bool(torch.isfinite(found).all()), "the adapted logits are not finite")
    change = float((found - case.base_logits()).abs().max())
    expect(change > 1e-3, f"a trained adapter changes the logits by {change:.1e} only")


def identity(case: Case) -> None:
    """A new adapter changes nothing yet."""
    expect_close(
        case.untrained().logits(), case.base_logits(), "a new adapter changes the outputs", atol=1e-5
    )


def no_identity(case: Case) -> None:
    """A method that does not start as the base says so rightly."""
    change = float((case.untrained().logits() - case.base_logits()).abs().max())
    expect(change > 1e-5, "a new adapter changes nothing: declare identity at the start")


def planned(case: Case) -> None:
    """What resolving announces, before anything is changed, is what attaching adds: places and numbers."""
    model = case.base()
    unchanged = snapshot(model)
    plan = resolve(model, case.config)
    unchanged()
    adapters = case.untrained(model=model).adapters
    expect(set(plan.paths) == set(adapters.parts("default")), "the places differ from those announced")
    count = sum({id(p): p.numel() for p in adapters.parameters("default")}.values())
    expect(plan.parameters == count, f"{plan.parameters} parameters were announced, {count} added")


def starts_from_base(case: Case) -> None:
    """A seed fixes how an adapter starts, also beside one that is merged into the base."""
    wanted = case.untrained().adapters.named_parameters("default")
    model = case.base()
    adapters = attach(model, case.other, "other", storage=FOLDER)
    stir(adapters, "other")
    with quiet_ties():
        adapters.merge()
    again = case.untrained(model=model).adapters.named_parameters("default")
    expect(again.keys() == wanted.keys(), "the parameters have other names beside a merged adapter")
    for name, parameter in wanted.items():
        expect_equal(again[name], parameter, f"the start of {name} beside a merged adapter")


def disabled(case: Case) -> None:
    """With adapters disabled, or none active, the model is the base to the bit."""
    adapted = case.adapted("a", "b")
    adapted.adapters.activate(["a", "b"])
    changed = adapted.logits()
    with adapted.adapters.disabled():
        expect_equal(adapted.logits(), case.base_logits(), "logits while disabled")
    expect_equal(adapted.logits(), changed, "logits after a disabled() block")
    adapted.adapters.activate([])
    expect_equal(adapted.logits(), case.base_logits(), "logits while none is active")


def contexts(case: Case) -> None:
    """An exception inside disabled(), activated() or routed() leaves state, modules and hooks as before."""
    adapted = case.adapted("a", "b")
    adapters = adapted.adapters
    adapters.train_only("b")
    before, changed, unchanged = _state(adapted), adapted.logits(), snapshot(adapted.model)
    blocks = {
        "disabled": adapters.disabled(),
        "activated": adapters.activated(["b", "a"]),
    }
    if not case.exception("routed"):
        blocks["routed"] = adapters.routed(["b", None, "a"])
    for name, block in blocks.items():
        try:
            with block:
                if name != "routed":  # what a routed batch gives has a property of its own
                    adapted.logits()
                raise _Interruption
        except _Interruption:
            pass
        expect(_state(adapted) == before, f"an exception inside {name}() changes the state")
        unchanged()
        expect_equal(adapted.logits(), changed, f"logits after an exception inside {name}()")


def detach(case: Case) -> None:
    """Detaching puts back the very same modules, parameters, bytes, flags, hooks and attributes."""
    model = case.base()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
    unchanged = snapshot(model)
    adapted = case.untrained("a", "b", model=model)
    for seed, name in enumerate(("a", "b")):
        stir(adapted.adapters, name, seed=seed)
    adapted.adapters.activate(["a", "b"])
    model(**adapted.inputs).loss.backward()
    adapted.adapters.delete("b")
    adapted.logits()
    expect(adapted.adapters.detach() is model, "detach() gives another model")
    model.zero_grad()
    unchanged()
    expect(adapters_of(model) is None, "a detached model still names its adapters")
    expect_equal(logits(model, adapted.inputs), case.base_logits(), "logits after detach()")
    expect_refusal(lambda: adapted.adapters.add("c", case.config), AdapterError, "adding after detach()")


def deepcopy(case: Case) -> None:
    """A deep copy has adapters of its own: neither model feels what happens to the other."""
    adapted = case.adapted("a", "b")
    before = adapted.logits()
    twin = copy.deepcopy(adapted.model)
    found = adapters_of(twin)
    if found is None or found.model is not twin or found is adapted.adapters:
        raise AssertionError("the copy has no adapters of its own")
    theirs = Adapted(twin, found, adapted.inputs)
    expect(_state(theirs) == _state(adapted), "the copy's state differs")
    expect_equal(theirs.logits(), before, "logits of the copy")
    expect_equal(adapted.logits(), before, "logits of the original after it was copied")
    stir(found, "a", seed=7)
    found.activate("b")
    expect_equal(adapted.logits(), before, "logits of the original after the copy changed")
    adapted.adapters.activate("b")
    expect_equal(theirs.logits(), adapted.logits(), "logits of the same adapter on both")
    found.detach()
    expect_equal(logits(twin, adapted.inputs), case.base_logits(), "logits of the copy after detach()")
    adapted.logits()


def to_dtype(case: Case) -> None:
    """`.to(dtype)` moves adapters and base together; afterwards the base is what it would be without."""
    adapted = case.adapted()
    adapted.model.to(torch.bfloat16)
    kinds = {p.dtype for p in adapted.adapters.parameters("default")}
    expect(kinds == {torch.bfloat16}, f"parameters after .to(bfloat16): {kinds}")
    found = adapted.logits()
    expect(found.dtype == torch.bfloat16, f"logits after .to(bfloat16): {found.dtype}")
    expect(bool(torch.isfinite(found).all()), "logits after .to(bfloat16) are not finite")
    plain = adapted.adapters.detach()
    wanted = logits(case.base().to(torch.bfloat16), adapted.inputs)
    expect_equal(logits(plain, adapted.inputs), wanted, "logits of the base after .to(bfloat16) and detach()")


def master_weights(case: Case) -> None:
    """On a bfloat16 base the parameters and their gradients are float32, unless the base's dtype is asked."""
    for asked, wanted in (("float32", torch.float32), ("base", torch.bfloat16)):
        model = case.base().to(torch.bfloat16)
        adapted = case.untrained(model=model, dtype="base" if asked == "base" else "float32")
        stir(adapted.adapters)
        parameters = adapted.adapters.named_parameters("default")
        expect({p.dtype for p in parameters.values()} == {wanted}, f"parameters are not {wanted}")
        output = model(**adapted.inputs)
        expect(output.logits.dtype == torch.bfloat16, f"logits are {output.logits.dtype}, the base bfloat16")
        output.loss.backward()
        for name, parameter in parameters.items():
            expect(parameter.grad is not None, f"{name} gets no gradient")
            assert parameter.grad is not None
            expect(bool(torch.isfinite(parameter.grad).all()), f"the gradient of {name} is not finite")


def _state(adapted: Adapted) -> tuple[tuple[str, ...], ...]:
    adapters = adapted.adapters
    return adapters.names, adapters.active, adapters.trainable, adapters.merged


class _Interruption(Exception):
    """What a caller's own code may raise inside a block."""
