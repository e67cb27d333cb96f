"""What a merge keeps of an adapter: dense, requantised, and as PEFT merges into layers of bitsandbytes.

    python benchmarks/merge_study.py            changes of fixed size on real and random weights
    python benchmarks/merge_study.py --trained  an adapter that QLoRA trained, and what its merges say
    python benchmarks/merge_study.py --table    the tables of what was measured so far

The base is quantised first, so that W is what its layers compute with. A change dW of rank 8 has a given size
|dW| / |W| in every layer. For the weights S that a merge stores,

    kept  = <S - Q(W), dW> / <dW, dW>       1: all of the change; 0: none
    error = |S - (W + dW)| / |dW|           0: exactly W + dW; 1: as far off as the base without the adapter

over all layers together. `dense` rounds W + dW to bfloat16 once, which is what `graft merge` does.
`requantised` encodes W + dW (`--requantize`). `peft` is PEFT's own `merge_adapter` on bitsandbytes' layers,
read back with bitsandbytes, and `peft, used` the same after one forward pass in eval mode on a CPU, which
makes bitsandbytes rearrange the weight in place (and fails on weights that are not of whole blocks, as those
of stories260K). Rows go to `benchmarks/results/merge_study.csv`. Models and data are found in `../shared`, or
where GRAFT_SHARED says.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import bitsandbytes.nn
import peft
import torch
from harness import results
from harness.tuned_run import tuned
from harness.writer import SHARED
from torch import Tensor, nn

from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach_folder
from graftlm.methods.low_rank import LoraLinear
from graftlm.models.load import load_model
from graftlm.quant.convert import dense_weight, quantisable, quantised_layers
from graftlm.quant.packed import encode
from graftlm.quant.scheme import Scheme
from graftlm.verbs.merge import merge

RESULTS = results.FOLDER / "merge_study.csv"

KINDS = ("nf4", "fp4", "int8", "fp8")
OF_PEERS = ("nf4", "fp4", "int8")
"""What bitsandbytes has, and PEFT merges into."""
SIZES = (0.005, 0.01, 0.02, 0.05, 0.10, 0.20)
RANK = 8
GAUSSIAN = "gaussian 1024 x 1024"
MODELS = (GAUSSIAN, "stories260K", "gpt2-tiny-en")
TASK, TRAINED_ON = "e2e-nlg", "gpt2-tiny-en"
TRAINED = f"{TRAINED_ON}, QLoRA on {TASK}"
bnb: Any = bitsandbytes
"""Untyped for the most part."""
PATHS = ("dense", "requantised", "peft", "peft, used")

PACKAGES = ("torch", "peft", "bitsandbytes", "graftlm")

Weights = Mapping[str, Tensor]
Factors = Mapping[str, tuple[Tensor, Tensor]]
"""(A, B) of the change B A of each layer."""


@dataclass(frozen=True)
class Row:
    """One merge. KL (nats per token) and growth of the loss are on text of the adapter itself."""

    weights: str
    kind: str
    path: str
    size: float
    kept: float
    error: float
    mean_kl: float | None = None
    top1: float | None = None
    nll_change: float | None = None
    machine: str = results.machine()
    versions: str = results.versions(*PACKAGES)
    date: str = results.today()


def weights_of(name: str) -> dict[str, Tensor]:
    """The weights [out, in] that quantisation touches, in float32."""
    if name == GAUSSIAN:
        return {"weight": torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)) * 0.02}
    model, _ = load_model(SHARED / "models" / name, dtype="float32")
    return {path: dense_weight(module).float() for path, module in quantisable(model).items()}


def changes(weights: Weights, size: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors (A, B) of a random change of rank 8 and of this relative size, for every layer."""
    torch.manual_seed(1)
    found = {}
    for path, weight in weights.items():
        a, b = torch.randn(RANK, weight.shape[1]), torch.randn(weight.shape[0], RANK)
        found[path] = (a, b * (size * weight.norm() / (b @ a).norm()))
    return found


def fixed_sizes(name: str, kind: str) -> Iterable[Row]:
    """Every merge of every size."""
    original = weights_of(name)
    packed = {path: encode(weight, Scheme(kind)) for path, weight in original.items()}
    base = {path: one.decode() for path, one in packed.items()}
    for size in SIZES:
        factors = changes(base, size)
        stored = ours(base, factors, kind)
        if kind in OF_PEERS:
            stored["peft"] = theirs(original, factors, kind)
            if all(weight.shape[0] % 32 == 0 and weight.shape[1] % 64 == 0 for weight in base.values()):
                stored["peft, used"] = theirs(original, factors, kind, is_used=True)
        for path in PATHS:
            if path in stored:
                yield Row(name, kind, path, size, *figures(base, factors, stored[path]))


def merged(base: Weights, factors: Factors) -> Weights:
    return {path: weight + factors[path][1] @ factors[path][0] for path, weight in base.items()}


def ours(base: Weights, factors: Factors, kind: str) -> dict[str, Weights]:
    exact = merged(base, factors)
    return {
        "dense": {path: weight.bfloat16().float() for path, weight in exact.items()},
        "requantised": {path: encode(weight, Scheme(kind)).decode() for path, weight in exact.items()},
    }


class Layers(nn.Module):
    """Layers of bitsandbytes by number, for PEFT to find."""

    def __init__(self, weights: Weights, kind: str) -> None:
        super().__init__()
        self.is_loaded_in_8bit, self.is_loaded_in_4bit = kind == "int8", kind != "int8"
        self.layers = nn.ModuleList(quantised_by_bitsandbytes(weight, kind) for weight in weights.values())

    def forward(self, x: Tensor) -> None:
        layer: Any
        for layer in self.layers:
            layer(x.new_ones(1, layer.in_features))


def quantised_by_bitsandbytes(weight: Tensor, kind: str) -> Any:
    rows, columns = weight.shape
    layer: Any
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type=kind, compute_dtype=torch.float32)
        layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type=kind, module=layer)
    return layer.to("cpu")


def theirs(original: Weights, factors: Factors, kind: str, *, is_used: bool = False) -> Weights:
    """What PEFT leaves in the layers when it merges this change."""
    model: Any = Layers(original, kind)
    names = [f"layers.{number}" for number in range(len(original))]
    rank = len(next(iter(factors.values()))[0])
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
    wrapped = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for layer, (a, b) in zip(model.layers, factors.values(), strict=True):
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
        if is_used:
            wrapped(torch.ones(1))
        wrapped.merge_adapter()
        return {path: read(layer.base_layer) for path, layer in zip(original, model.layers, strict=True)}


def read(layer: Any) -> Tensor:
    """The dense weight of a layer, by bitsandbytes' own functions."""
    found: Tensor
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        found = layer.weight.data.float() * (scales.float() / 127).unsqueeze(1)
    else:
        found = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return found


def figures(base: Weights, factors: Factors, stored: Weights) -> tuple[float, float]:
    """(kept, error) over all layers."""
    along = missed = whole = 0.0
    for path, weight in base.items():
        change = (factors[path][1] @ factors[path][0]).double()
        along += float(((stored[path] - weight).double() * change).sum())
        missed += float((stored[path].double() - weight.double() - change).square().sum())
        whole += float(change.square().sum())
    return along / whole, (missed / whole) ** 0.5


def trained(scratch: Path) -> Iterable[Row]:
    """An adapter of `graft tune --method qlora` on nf4, merged in every way, and what the merges then say."""
    run = scratch / "run"
    tune(run)
    model, _ = load_model(SHARED / "models" / TRAINED_ON, quantization="nf4")
    base = {path: layer.packed.decode() for path, layer in quantised_layers(model).items()}
    factors = factors_of(model, run / "adapter")
    change = sum(float((b @ a).square().sum()) for a, b in factors.values())
    size = (change / sum(float(base[path].square().sum()) for path in factors)) ** 0.5
    dense = merge(run, scratch / "dense").in_memory
    rounded = {path: one.bfloat16().float() for path, one in merged(base, factors).items()}
    yield Row(TRAINED, "nf4", "dense", size, *figures(base, factors, rounded), dense.mean_kl, dense.top1)
    peers = theirs(weights_of(TRAINED_ON), factors, "nf4")
    yield Row(TRAINED, "nf4", "peft", size, *figures(base, factors, peers))
    for kind in KINDS:
        found = merge(run, scratch / kind, requantize=kind, force=True).requantized
        assert found is not None
        says = (found.envelope.agreement.mean_kl, found.envelope.agreement.top1, found.envelope.nll_change)
        yield Row(TRAINED, kind, "requantised", size, found.kept.kept, found.kept.error, *says)


def tune(out: Path) -> None:
    settings = ("method.type=qlora", "model.quantization=nf4", "train.max_steps=50", "eval.metrics=[loss]")
    tuned(TASK, TRAINED_ON, settings, out)


def factors_of(model: Any, adapter: Path) -> dict[str, tuple[Tensor, Tensor]]:
    adapters = attach_folder(model, adapter, storage=FOLDER)
    found = {}
    for path, part in adapters.parts("default").items():
        assert isinstance(part, LoraLinear)
        a, b = (factor.detach().float() for factor in part.factors())
        found[path] = (a, b * part.scaling)
    adapters.detach()
    return found


def measured() -> list[Row]:
    """Every row so far."""
    return results.read_as(Row, RESULTS)


def keep(rows: Iterable[Row]) -> None:
    """Add these rows; what was measured of the same merge goes."""
    fresh = list(rows)
    same = {(row.weights, row.kind) for row in fresh}
    known = [row for row in measured() if (row.weights, row.kind) not in same]
    RESULTS.unlink(missing_ok=True)
    results.append(RESULTS, [asdict(row) for row in (*known, *fresh)])


def table(rows: list[Row]) -> str:
    """Markdown: a line for each way to merge, a column for each size; then what was trained."""
    lines = []
    for name in MODELS:
        lines += [f"\n{name}: part of dW kept, and the error as part of |dW|\n"]
        lines += ["| kind | merge | " + " | ".join(f"{100 * size:g} %" for size in SIZES) + " |"]
        lines += ["|---|---|" + "---:|" * len(SIZES)]
        own = {(row.kind, row.path, row.size): row for row in rows if row.weights == name}
        for kind, path in itertools.product(KINDS, PATHS):
            found = [own[kind, path, size] for size in SIZES if (kind, path, size) in own]
            if found:
                cells = (f"{100 * row.kept:.0f} % ({row.error:.2f})" for row in found)
                lines.append(f"| {kind} | {path} | {' | '.join(cells)} |")
    trained_rows = [row for row in rows if row.weights not in MODELS]
    lines += [f"\n{TRAINED}, nf4, 50 steps: what was kept, and what the merged model then says\n"]
    lines += ["| stored as | merge | size of dW | kept | error | KL | top-1 | loss |"]
    lines += ["|---|---|" + "---:|" * 6]
    return "\n".join([*lines, *map(_line, trained_rows)])


def _line(row: Row) -> str:
    says = [
        "" if row.mean_kl is None else f"{row.mean_kl:.1e}",
        "" if row.top1 is None else f"{100 * row.top1:.1f} %",
        "" if row.nll_change is None else f"{100 * row.nll_change:+.1f} %",
    ]
    kind = "bfloat16" if row.path == "dense" else row.kind
    cells = (f"{100 * row.size:.1f} %", f"{100 * row.kept:.1f} %", f"{row.error:.2f}", *says)
    return f"| {kind} | {row.path} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trained", action="store_true", help="an adapter that QLoRA trains")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*Merge lora module to.*")
    if given.trained:
        with tempfile.TemporaryDirectory() as scratch:
            keep(trained(Path(scratch)))
    elif not given.table:
        for name, kind in itertools.product(MODELS, KINDS):
            keep(fixed_sizes(name, kind))
    print(table(measured()))


if __name__ == "__main__":
    main()
