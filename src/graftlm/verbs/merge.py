"""`graft merge`: base and adapter as one dense model, verified in memory and again in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from graftlm.core.errors import MergeError
from graftlm.core.files import staged_directory, write_atomic
from graftlm.core.storage import require_space
from graftlm.evaluation.known_text import sample_known_text
from graftlm.formats.layout import FOLDER
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.attach import attach_folder
from graftlm.models.agreement import Agreement, agreement, logits_on
from graftlm.models.load import load_model
from graftlm.models.reload import PROBES
from graftlm.models.save import save_model
from graftlm.verbs.outputs import require_new_output
from graftlm.verbs.references import Reference, adapter_reference, recipe_model

PROBE_ROWS, PROBE_TOKENS = 32, 48


@dataclass(frozen=True)
class MergeResult:
    """A merged model and what proves it."""

    out: Path
    in_memory: Agreement
    reloaded: Agreement
    dtype: str
    passed: bool = True

    @property
    def verdict(self) -> str:
        return f"Merged and verified: {self.reloaded}."

    @property
    def lines(self) -> tuple[str, ...]:
        return (
            f"Merge: {self.dtype}, {self.in_memory} -> {self.out}",
            f"Reload: in a fresh process, {self.reloaded}",
        )

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "out": str(self.out),
            "dtype": self.dtype,
            "in_memory": self.in_memory.as_dict(),
            "reloaded": self.reloaded.as_dict(),
            "passed": self.passed,
            "verdict": self.verdict,
        }


def merge(
    adapter: str | Path, out: str | Path, *, base: str | None = None, dtype: str | None = None
) -> MergeResult:
    """Write base and adapter as one dense model into `out`, a new folder.

    The merged model is compared with base + adapter on text that the adapter itself writes: once in
    memory, and once more read back by a fresh process. Only a model that passes both gets its name.

    Raises:
        MergeError: the merged model says something else than base + adapter; nothing is written.
        UsageError: `out` exists.
    """
    reference = adapter_reference(str(adapter), base)
    target = Path(out)
    require_new_output(target)
    with staged_directory(target) as staging:
        model, tokenizer = load_model(reference.base, dtype=dtype or _trained_dtype(reference))
        adapters = attach_folder(model, reference.adapter, storage=FOLDER)
        probes = _probes(model, tokenizer)
        expected = logits_on(model, probes)
        in_memory = _merge(adapters, probes, expected)
        save_model(model, tokenizer, staging)
        reloaded = _in_fresh_process(staging, probes, expected)
        name = str(next(model.parameters()).dtype).removeprefix("torch.")
        proof = {"base": reference.base, "dtype": name, "in_memory": in_memory.as_dict(),
                 "reloaded": reloaded.as_dict()}  # fmt: skip
        write_atomic(staging / "graft-merge.json", json.dumps(proof, indent=2) + "\n")
    return MergeResult(target, in_memory, reloaded, name)


def _trained_dtype(reference: Reference) -> str:
    """The base's dtype of the run, so that the merge is made where the adapter was trained."""
    recipe = recipe_model(reference.run) if reference.run else {}
    return str(recipe.get("dtype", "auto"))


def _probes(model: Any, tokenizer: Any) -> list[Sequence[int]]:
    try:
        rows = sample_known_text(model, tokenizer, rows=PROBE_ROWS, tokens=PROBE_TOKENS)
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        name = str(next(model.parameters()).dtype).removeprefix("torch.")
        raise MergeError(
            f"Base + adapter give numbers that are not finite in {name}.",
            meaning="The numbers are too large for this format, or the adapter diverged.",
            fix="Merge in a wider dtype: --dtype float32. Nothing was written.",
        ) from error
    return [row.input_ids for row in rows]


def _merge(adapters: AdapterSet, probes: Sequence[Sequence[int]], expected: Sequence[Tensor]) -> Agreement:
    model = adapters.merge_and_unload()
    found = agreement(expected, logits_on(model, probes))
    _require(found, "The merged model")
    return found


def _in_fresh_process(folder: Path, probes: Sequence[Sequence[int]], expected: Sequence[Tensor]) -> Agreement:
    """Load the folder in a new interpreter and compare; the probes travel in a file beside it."""
    dtype = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("dtype", "auto")
    probe_file = folder / PROBES
    tensors = {f"logits.{number}": logits for number, logits in enumerate(expected)}
    require_space(folder, sum(logits.numel() * logits.element_size() for logits in expected))
    save_file(tensors, probe_file, metadata={"probes": json.dumps([list(probe) for probe in probes])})
    # -P: a file of the current folder must not stand in for a module of the same name.
    command = [sys.executable, "-P", "-m", "graftlm.models.reload", str(folder), str(dtype)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    probe_file.unlink()
    if done.returncode != 0:
        raise MergeError(
            "The merged model cannot be loaded again.",
            problems=done.stderr.strip().splitlines()[-3:],
            meaning="What was written to disk is not a model that a fresh process can read.",
            fix="Report this together with `graft env`. Nothing was written.",
        )
    content = json.loads(done.stdout.strip().splitlines()[-1])
    content.pop("is_same_model")
    found = Agreement(**content)
    _require(found, "The merged model, read back from disk,")
    return found


def _require(found: Agreement, what: str) -> None:
    if not found.is_same_model:
        raise MergeError(
            f"{what} differs from base + adapter: {found}.",
            meaning="Rounding to the base's dtype, or a weight that two modules share, changed what it says.",
            fix="Merge in a wider dtype: --dtype float32. Nothing was written.",
        )
