"""The machine and the installed versions: facts for `graft env` and `environment.json`."""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path

from graftlm.core import compiling
from graftlm.core.version import __version__

PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "datasets",
    "numpy",
    "pydantic",
    "typer",
    "rich",
)
"""Packages whose version can change a result or an output."""

EXTRAS = {
    "quant": ("bitsandbytes",),
    "gpu": ("liger-kernel", "triton"),
    "search": ("optuna",),
    "serve": ("fastapi", "uvicorn", "prometheus-client"),
    "track": ("tensorboard", "wandb", "mlflow"),
    "peft": ("peft",),
    "metrics": ("sacrebleu", "rouge-score"),
    "pictures": ("pillow",),
}
"""The optional parts of the package; a test holds them equal to `pyproject.toml`."""

_INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "amx_bf16": "AMX BF16",
    "amx_int8": "AMX INT8",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "ARM BF16",
}
_BFLOAT16_SETS = ("AVX-512 BF16", "AMX BF16", "ARM BF16")


@dataclass(frozen=True)
class Gpu:
    """One CUDA device."""

    name: str
    memory_bytes: int
    capability: str


@dataclass(frozen=True)
class Extra:
    """An optional part: `versions` maps each of its packages to its version, or None if absent."""

    name: str
    versions: dict[str, str | None]

    @property
    def installed(self) -> bool:
        return None not in self.versions.values()


@dataclass(frozen=True)
class FastPath:
    """Something that makes runs faster: whether it is on here, and why (not)."""

    name: str
    on: bool
    why: str


@dataclass(frozen=True)
class Environment:
    """Everything about this machine that can explain a figure."""

    graft: str
    python: str
    platform: str
    cpu: str
    cores: int
    instruction_sets: tuple[str, ...]
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    packages: dict[str, str | None]
    extras: tuple[Extra, ...]
    fast_paths: tuple[FastPath, ...]

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        facts = asdict(self)
        facts["extras"] = {
            extra.name: {"installed": extra.installed, "versions": extra.versions} for extra in self.extras
        }
        return facts


def describe_environment() -> Environment:
    """Look at this machine. Imports torch, if it is installed, to ask for GPUs."""
    flags = _processor_flags()
    sets = tuple(label for flag, label in _INSTRUCTION_SETS.items() if flag in flags)
    gpus, gpu_reason = _gpus()
    return Environment(
        graft=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=_processor_name(),
        cores=usable_cores(),
        instruction_sets=sets,
        memory_bytes=memory_bytes(),
        gpus=gpus,
        packages={name: _version(name) for name in PACKAGES},
        extras=tuple(
            Extra(name, {package: _version(package) for package in packages})
            for name, packages in EXTRAS.items()
        ),
        fast_paths=_fast_paths(sets, gpus, gpu_reason),
    )


def cpu_computes_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware; without, 16 bits are slower than 32.

    >>> isinstance(cpu_computes_bfloat16(), bool)
    True
    """
    flags = _processor_flags()
    return any(label in _BFLOAT16_SETS for flag, label in _INSTRUCTION_SETS.items() if flag in flags)


def usable_cores() -> int:
    """Cores this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Main memory this process may use: the machine's, or the container's limit if lower. 0 = unknown."""
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return 0
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(machine, int(limit)) if limit.isdigit() else machine


def _fast_paths(sets: tuple[str, ...], gpus: tuple[Gpu, ...], gpu_reason: str) -> tuple[FastPath, ...]:
    hardware = [label for label in sets if label in _BFLOAT16_SETS]
    compiles, compiler = compiling.state()
    triton = _version("triton")
    reason = f"triton {triton}" if triton else "triton is not installed (extra gpu)"
    return (
        FastPath("GPU", bool(gpus), gpu_reason),
        FastPath(
            "bfloat16 on CPU",
            bool(hardware),
            ", ".join(hardware) or "this processor has no bfloat16 arithmetic; 16-bit bases run in float32",
        ),
        FastPath("fused low-rank add", True, "plain torch, every device"),
        FastPath("chunked cross-entropy", True, "plain torch, every device"),
        FastPath("packed weights on CPU", compiles, compiler),
        FastPath("packed weights on GPU", bool(gpus) and triton is not None, reason if gpus else "no GPU"),
    )


def _gpus() -> tuple[tuple[Gpu, ...], str]:
    if util.find_spec("torch") is None:
        return (), "torch is not installed"
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return (), f"torch {torch.__version__} is a build without CUDA"
    if not torch.cuda.is_available():
        return (), "torch has CUDA, but found no device or no driver"
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(Gpu(facts.name, facts.total_memory, f"{facts.major}.{facts.minor}"))
    return tuple(found), f"CUDA {torch.version.cuda}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor_flags() -> frozenset[str]:
    """Feature words of the first processor, as Linux spells them; empty where /proc is missing."""
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return frozenset(match.group(1).split()) if match else frozenset()


def _processor_name() -> str:
    match = re.search(r"^model name\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
