"""Properties of folding adapters into the base's weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from graftlm.core.errors import MergeError
from graftlm.testing.case import Case, stir
from graftlm.testing.expect import expect, expect_close, expect_equal, expect_refusal
from graftlm.testing.models import logits
from graftlm.testing.snapshot import snapshot


def merge(case: Case) -> None:
    """Merged outputs are the unmerged ones, for one adapter and for two; an unmerge is exact to the byte."""
    adapted = case.adapted("a", "b")
    adapters = adapted.adapters
    for names in (["a"], ["a", "b"]):
        adapters.activate(names)
        wanted, unchanged = adapted.logits(), snapshot(adapted.model)
        with quiet_ties():
            adapters.merge()
            expect(adapters.merged == tuple(names), f"merged are {adapters.merged}, not {names}")
            expect_close(adapted.logits(), wanted, f"merged logits of {' and '.join(names)}")
            with adapters.disabled():
                expect_close(adapted.logits(), wanted, "merged logits while the unmerged are disabled")
            adapters.unmerge()
        unchanged()
        expect_equal(adapted.logits(), wanted, "logits after unmerge()")
    with quiet_ties():
        plain = adapters.merge_and_unload()
    expect_close(logits(plain, adapted.inputs), wanted, "logits after merge_and_unload()")


def merged_beside(case: Case) -> None:
    """An active adapter keeps working beside a merged one, and switching it off leaves the merge alone."""
    adapted = case.adapted("a", "b")
    adapters = adapted.adapters
    alone = adapted.logits()
    adapters.activate(["a", "b"])
    wanted = adapted.logits()
    with quiet_ties():
        adapters.merge("a")
        expect_close(adapted.logits(), wanted, "logits of b active beside a merged")
        with adapters.disabled():
            expect_close(adapted.logits(), alone, "logits of a merged while b is disabled")
        adapters.unmerge()
    expect_equal(adapted.logits(), wanted, "logits after unmerge()")


def unmerge_exact(case: Case) -> None:
    """In bfloat16, cycles of merge and unmerge with a changing adapter leave the base its bytes."""
    model = case.base().to(torch.bfloat16)
    unchanged = snapshot(model)
    adapted = case.untrained(model=model)
    for cycle in range(3):
        stir(adapted.adapters, seed=cycle)
        with quiet_ties():
            adapted.adapters.merge()
            adapted.adapters.unmerge()
    adapted.adapters.detach()
    unchanged()


def merge_refused(case: Case) -> None:
    """A method that cannot be merged refuses in words, and nothing changes."""
    adapted = case.adapted("a", "b")
    before, unchanged = adapted.logits(), snapshot(adapted.model)
    error = expect_refusal(adapted.adapters.merge, MergeError, "merge()")
    expect(bool(error.meaning), "the refusal to merge gives no reason")
    expect_refusal(adapted.adapters.merge_and_unload, MergeError, "merge_and_unload()")
    expect(adapted.adapters.merged == (), "a refused merge is recorded as done")
    unchanged()
    expect_equal(adapted.logits(), before, "logits after a refused merge")


def not_mergeable(case: Case) -> str:
    """Why the adapter cannot be merged, in the method's own words, or nothing."""
    try:
        with quiet_ties():
            case.untrained().adapters.merge()
    except MergeError as error:
        return " ".join((error.seen, error.meaning))
    return ""


@contextmanager
def quiet_ties() -> Iterator[None]:
    """Merging into one of two tied weights says so; here that is expected."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Merging unties")
        yield
