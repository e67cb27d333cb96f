"""Properties of adapters on disk."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftlm.core.errors import FormatError
from graftlm.formats.layout import CONFIG, FOLDER, TENSORS
from graftlm.methods.attach import adapters_of, attach_folder
from graftlm.quant.convert import dequantise
from graftlm.testing.case import Adapted, Case
from graftlm.testing.expect import expect, expect_close, expect_equal, expect_refusal
from graftlm.testing.models import logits
from graftlm.testing.snapshot import snapshot


def saved(case: Case) -> None:
    """Saved under one name and loaded under another: equal outputs, and the same files to the byte."""
    with folder() as here:
        adapted = case.adapted("one")
        wanted = adapted.logits()
        adapted.adapters.save(here / "first", "one")
        adapted.adapters.save(here / "second", "one")
        expect(_files(here / "first") == _files(here / "second"), "saving twice gives different files")
        again = _loaded(case, here / "first", "an.other-name_2")
        if case.config.portable() == case.config:
            expect_equal(again.logits(), wanted, "logits after loading")
        else:
            expect_close(again.logits(), wanted, "logits after loading what was folded for the file")
        again.adapters.save(here / "third", "an.other-name_2")
        before, after = _files(here / "first"), _files(here / "third")
        differing = sorted(
            name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
        )
        expect(not differing, f"saved, loaded under another name and saved again, these differ: {differing}")


def refuses_damage(case: Case) -> None:
    """A folder that lacks a tensor, has one too many or one of another shape is refused by its name."""
    with folder() as here:
        case.adapted().adapters.save(here / "whole")
        tensors = load_file(here / "whole" / TENSORS)
        key = sorted(tensors)[0]
        ending = ".".join(key.split(".")[-2:])
        rest = {name: tensor for name, tensor in tensors.items() if name != key}
        damaged: dict[str, tuple[str, dict[str, Tensor]]] = {
            "missing": (ending, rest or {"nothing": torch.zeros(1)}),
            "unknown": ("nowhere", tensors | {"base_model.model.nowhere": torch.zeros(2)}),
            "misshapen": (ending, rest | {key: torch.zeros(3, 5, 7)}),
        }
        for what, (culprit, content) in damaged.items():
            target = here / what
            target.mkdir()
            (target / CONFIG).write_bytes((here / "whole" / CONFIG).read_bytes())
            save_file(content, target / TENSORS)
            model = case.base()
            unchanged = snapshot(model)
            error = expect_refusal(
                lambda model=model, target=target: attach_folder(model, target, storage=FOLDER),  # type: ignore[misc]
                FormatError,
                f"a folder with a tensor that is {what}",
            )
            expect(culprit in str(error), f"the refusal of a {what} tensor does not name {culprit}: {error}")
            unchanged()
            expect(adapters_of(model) is None, "a refused folder leaves an adapter")


def without_peft(case: Case) -> str:
    """Why PEFT cannot be asked, or nothing."""
    if importlib.util.find_spec("peft") is None:
        return "peft is not installed"
    import peft

    known = {kind.value for kind in peft.PeftType}
    kind = case.config.portable().peft_type
    return "" if kind in known else f"PEFT has no method of the type {kind}"


def to_peft(case: Case) -> None:
    """PEFT loads what is saved here and gives the same logits."""
    import peft

    with folder() as here, _quiet_peft():
        adapted = case.adapted()
        adapted.adapters.save(here / "ours")
        theirs = peft.PeftModel.from_pretrained(_for_peft(case), here / "ours").eval()
        expect_close(_logits(theirs, adapted.inputs), adapted.logits(), "PEFT's logits", rtol=0, atol=1e-5)
        theirs.save_pretrained(str(here / "again"))
        _same_tensors(here / "ours", here / "again", "what PEFT saves again")


def from_peft(case: Case) -> None:
    """What PEFT makes from the same config, and saves, loads here with the same logits and tensors."""
    import peft

    with folder() as here, _quiet_peft():
        case.adapted().adapters.save(here / "ours")
        config = peft.PeftConfig.from_pretrained(str(here / "ours"))
        config.inference_mode = False
        torch.manual_seed(2)
        theirs: Any = peft.get_peft_model(_for_peft(case), config).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        theirs.save_pretrained(str(here / "theirs"))
        again = _loaded(case, here / "theirs", "default")
        wanted = _logits(theirs, again.inputs)
        expect_close(again.logits(), wanted, "logits of PEFT's adapter", rtol=0, atol=1e-5)
        again.adapters.save(here / "again")
        _same_tensors(here / "theirs", here / "again", "what is saved here again")


def unknown_to_peft(case: Case) -> None:
    """A method that PEFT does not have says so in its file: PEFT refuses it instead of misreading it."""
    if importlib.util.find_spec("peft") is None:
        return
    import peft

    with folder() as here, _quiet_peft():
        case.adapted().adapters.save(here / "ours")
        try:
            peft.PeftModel.from_pretrained(_for_peft(case), here / "ours")
        except (KeyError, ValueError, TypeError):
            return
    raise AssertionError("PEFT loads the folder without complaint, although it does not have the method")


def _for_peft(case: Case) -> Any:
    """The base as PEFT can take it: with weights read out that are stored in few bits here."""
    model = case.base()
    dequantise(model, torch.float32)
    return model


@contextmanager
def folder() -> Iterator[Path]:
    """A place for files that is gone afterwards."""
    with TemporaryDirectory() as name:
        yield Path(name)


def _loaded(case: Case, source: Path, name: str) -> Adapted:
    model = case.base()
    return Adapted(model, attach_folder(model, source, name, storage=FOLDER), case.inputs())


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def _same_tensors(first: Path, second: Path, what: str) -> None:
    """PEFT writes the base's own embedding beside an adapted one; here that is done on demand only."""
    one, two = (
        {k: t for k, t in load_file(where / TENSORS).items() if not k.endswith("base_layer.weight")}
        for where in (first, second)
    )
    expect(one.keys() == two.keys(), f"{what} has other keys: {sorted(one.keys() ^ two.keys())[:4]}")
    for key, tensor in one.items():
        expect_equal(two[key], tensor, f"{key} in {what}")


def _logits(theirs: Any, inputs: dict[str, Tensor]) -> Tensor:
    """PEFT's logits for the real tokens: its prompt models answer for the virtual ones too."""
    found = logits(theirs, inputs)
    return found if found.dim() < 3 else found[:, -_length(inputs) :]


def _length(inputs: dict[str, Tensor]) -> int:
    labels = inputs["labels"]
    return labels.shape[1] if labels.dim() > 1 else inputs["input_ids"].shape[1]


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """PEFT and transformers have much to say about tiny models without a name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
