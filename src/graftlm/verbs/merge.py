"""`graft merge`: base and adapter as one model, verified in memory and again in a fresh process.

An adapter of a quantised base was trained against what the quantised weights decode to, so that is what it is
merged into by default: dense, in 16 bits. The original weights, and weights in few bits, are asked for.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.core.config import suggest
from graftlm.core.errors import ConfigError, UsageError
from graftlm.core.files import MANIFEST, staged_directory, write_atomic
from graftlm.formats.ending import KINDS
from graftlm.formats.fingerprint import scheme_of
from graftlm.formats.layout import FOLDER
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.attach import attach_folder
from graftlm.methods.requantise import MIN_KEPT, KeptChange, requantised
from graftlm.methods.virtual.stacks import task_of
from graftlm.models.agreement import Agreement, agreement, logits_on
from graftlm.models.ending import TEXT
from graftlm.models.heads import ending_of_adapter
from graftlm.models.load import load_model
from graftlm.models.precision import AUTO, DTYPES, check_dtype
from graftlm.models.save import save_model
from graftlm.models.save_quantised import save_base
from graftlm.quant.scheme import Scheme
from graftlm.verbs.base import base_dtype, section_of
from graftlm.verbs.merge_proof import (
    Envelope,
    Logits,
    Probes,
    in_fresh_process,
    percent,
    probes_of,
    require_near,
    require_same,
)
from graftlm.verbs.outputs import require_new_output
from graftlm.verbs.references import Reference, adapter_reference

PROOF = "graft-merge.json"
"""In a merged model: what was merged, and what proved it."""
INTO = ("trained", "original")
"""Which weights of a quantised base: those that the adapter was trained on, or those before quantising."""


@dataclass(frozen=True)
class Requantised:
    """A merge that is stored in few bits: what is left of the adapter, and how far it is from it."""

    kind: str
    kept: KeptChange
    envelope: Envelope
    is_forced: bool

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "kind": self.kind,
            **self.kept.as_dict(),
            "mean_kl": self.envelope.agreement.mean_kl,
            "top1": self.envelope.agreement.top1,
            "nll_change": self.envelope.nll_change,
            "forced": self.is_forced,
        }


@dataclass(frozen=True)
class MergeResult:
    """A merged model and what proves it."""

    out: Path
    in_memory: Agreement
    """The merge against base + adapter, or against the adapter on its own base where it is requantised."""
    reloaded: Agreement
    dtype: str
    base_quantization: str = "none"
    """What the base was stored in while the adapter was trained."""
    from_trained: dict[str, Agreement] | None = None
    """Where the original weights were asked for: what merges into either say, against the adapter on the base
    that it was trained on."""
    requantized: Requantised | None = None
    passed: bool = True

    @property
    def verdict(self) -> str:
        if self.requantized:
            how = "by force" if self.requantized.is_forced else "and verified"
            return f"Merged into {self.requantized.kind} {how}: {self.requantized.envelope}."
        return f"Merged and verified: {self.reloaded}."

    @property
    def lines(self) -> tuple[str, ...]:
        stored = self.requantized.kind if self.requantized else self.dtype
        lines = [f"Merge: {stored}, {self.in_memory} -> {self.out}"]
        if self.from_trained:
            lines += [
                f"Base: against the adapter on its {self.base_quantization} base, merged into {name}: {found}"
                for name, found in self.from_trained.items()
            ]
        elif self.base_quantization != "none":
            lines.append(f"Base: {self.base_quantization} as it was trained on, decoded")
        if self.requantized:
            change = percent(self.requantized.envelope.nll_change)
            lines.append(f"Requantised: {self.requantized.kept}; loss {change}")
        return (*lines, f"Reload: in a fresh process, {self.reloaded}")

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "out": str(self.out),
            "passed": self.passed,
            "verdict": self.verdict,
            **self.proof(),
        }

    def proof(self) -> dict[str, Any]:
        """The figures, as they are kept beside the model."""
        found: dict[str, Any] = {
            "dtype": self.dtype,
            "base_quantization": self.base_quantization,
            "in_memory": self.in_memory.as_dict(),
            "reloaded": self.reloaded.as_dict(),
        }
        if self.from_trained:
            found["from_trained"] = {name: one.as_dict() for name, one in self.from_trained.items()}
        return found | ({"requantized": self.requantized.as_dict()} if self.requantized else {})


def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    into: str = "trained",
    requantize: str | None = None,
    force: bool = False,
) -> MergeResult:
    """Write base and adapter as one model into `out`, a new folder.

    The merged model is compared with base + adapter on text that the adapter itself writes: once in
    memory, and once more read back by a fresh process. Only a model that passes both gets its name.

    Args:
        base: another place of the base than the one that the adapter names.
        dtype: number format of the merge; that of the run by default.
        into: for adapters of a quantised base: the weights it was `trained` on, dequantised, or the
            `original` ones. The figures of both are reported then.
        requantize: store the merged model as `nf4`, `fp4`, `int8` or `fp8`; refused where that loses more
            than a tenth of the adapter's change, or says something else.
        force: requantise all the same.

    Raises:
        MergeError: the merged model says something else than base + adapter; nothing is written.
        UsageError: `out` exists, or options that contradict each other.
    """
    reference = adapter_reference(str(adapter), base)
    target = Path(out)
    require_new_output(target)
    scheme = Scheme.parse(requantize) if requantize is not None else None
    if force and scheme is None:
        raise UsageError("force is about requantising, and nothing is requantised.", fix="Add --requantize.")
    if into not in INTO:
        hint = suggest(into, INTO) or "."
        raise ConfigError(f"Unknown into {into!r}{hint}", fix=f"Use {' or '.join(INTO)}.")
    with staged_directory(target) as staging:
        work = _Work(reference, dtype)
        if into == "original":
            work.go_to_the_original()
        if scheme is None:
            result = work.dense(staging, target)
        else:
            result = work.packed(staging, target, scheme, is_forced=force)
        # From here to there: whoever moves run and merge together still finds the adapter.
        adapter_from_here = Path(os.path.relpath(reference.adapter, target)).as_posix()
        content = {"base": reference.base, "adapter": adapter_from_here, **result.proof()}
        write_atomic(staging / PROOF, json.dumps(content, indent=2) + "\n")
    return result


class _Work:
    """Base and adapter in memory, and what they say on the probes."""

    def __init__(self, reference: Reference, dtype: str | None) -> None:
        self._reference, section = reference, section_of(reference)
        check_dtype(dtype or AUTO)
        self._dtype, self._trained_in = dtype, base_dtype(section)
        self._load(section.quantization, double_quant=section.double_quant)
        stored = scheme_of(self._model)
        self._quantization = stored.kind if stored else "none"
        self._probes: Probes = probes_of(self._model, self._tokenizer)
        self._expected: Logits = logits_on(self._model, self._probes)
        self._trained: Logits = self._expected
        self._from_trained: dict[str, Agreement] = {}

    def _load(self, quantization: str, *, double_quant: bool = True) -> None:
        """A quantised base is loaded in the dtype of training, on which its codes depend, and then widened or
        narrowed: that leaves what its layers decode as it was."""
        is_dense = quantization == "none"
        self._model, self._tokenizer = load_model(
            self._reference.base,
            dtype=(self._dtype if is_dense else None) or self._trained_in,
            quantization=quantization,
            double_quant=double_quant,
            ending=ending_of_adapter(self._reference.adapter) or TEXT,
        )
        if self._dtype not in (None, AUTO) and not is_dense:
            self._model.to(DTYPES[self._dtype])
        self._adapters: AdapterSet = attach_folder(self._model, self._reference.adapter, storage=FOLDER)

    def go_to_the_original(self) -> None:
        """Take the base as it was before it was quantised; the quantised one is merged for its figures."""
        if self._quantization == "none":
            raise UsageError(
                "The adapter was trained on a base that is not quantised.",
                meaning="There is only one base to merge it into.",
                fix="Leave out --into.",
            )
        merged = logits_on(self._adapters.merge_and_unload(), self._probes)
        self._from_trained["the dequantised base"] = agreement(self._trained, merged)
        del self._model, self._adapters
        self._load("none")
        if scheme_of(self._model) is not None:
            raise UsageError(
                f"{self._reference.base} is stored quantised; the original weights are not in it.",
                fix="Name the 16-bit model that it was made from: --base MODEL.",
            )
        self._expected = logits_on(self._model, self._probes)

    def dense(self, staging: Path, target: Path) -> MergeResult:
        """Merge and save in 16 or 32 bits."""
        model: Any = self._adapters.merge_and_unload()
        found = logits_on(model, self._probes)
        in_memory = require_same(self._expected, found, "The merged model")
        if self._from_trained:
            self._from_trained["the original base"] = agreement(self._trained, found)
        save_model(model, self._tokenizer, staging)
        dtype = json.loads((staging / "config.json").read_text(encoding="utf-8")).get("dtype", "auto")
        reloaded = in_fresh_process(staging, str(dtype), self._probes, self._expected)
        name = str(next(model.parameters()).dtype).removeprefix("torch.")
        return MergeResult(target, in_memory, reloaded, name, self._quantization, self._from_trained or None)

    def packed(self, staging: Path, target: Path, scheme: Scheme, *, is_forced: bool) -> MergeResult:
        """Merge and save in few bits."""
        at_least = float("-inf") if is_forced else MIN_KEPT
        kept = requantised(self._adapters, scheme, at_least=at_least)
        found = logits_on(self._model, self._probes)
        writes = task_of(self._model) not in KINDS
        envelope = require_near(self._trained, found, self._probes, writes=writes, is_forced=is_forced)
        if self._from_trained:
            self._from_trained["the original base"] = envelope.agreement
        name = str(next(self._model.parameters()).dtype).removeprefix("torch.")
        inner = staging / "base"
        save_base(self._model, self._tokenizer, inner)
        (inner / MANIFEST).unlink()  # the folder as a whole gets its own
        for path in inner.iterdir():
            path.rename(staging / path.name)
        inner.rmdir()
        reloaded = in_fresh_process(staging, name, self._probes, found)
        is_forced = is_forced and not (envelope.is_inside and kept.kept >= MIN_KEPT)
        return MergeResult(
            target, envelope.agreement, reloaded, name, self._quantization, self._from_trained or None,
            Requantised(scheme.kind, kept, envelope, is_forced),
        )  # fmt: skip
