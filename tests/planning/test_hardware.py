"""This machine and described ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from graftlm.core.environment import Environment, Gpu, describe_environment
from graftlm.core.errors import ConfigError
from graftlm.planning import hardware
from graftlm.planning.calibration import assumed_rates
from graftlm.planning.gpus import GPUS
from graftlm.planning.hardware import described, read_machine, this_machine


def test_a_named_card_and_a_named_size_go_together() -> None:
    card = described(gpu="rtx3090", memory=None)
    assert card == GPUS["rtx3090"].machine
    assert described(gpu="rtx3090", memory="20GB") == replace(card, memory_bytes=20 * 10**9)


@pytest.mark.parametrize(
    ("size", "card"),
    [("8GB", "RTX 4060"), ("12GB", "RTX 3060"), ("24GB", "A10G"), ("48GB", "A6000"), ("80GB", "A100 SXM 80"),
     ("500GB", "B200")],
)  # fmt: skip
def test_a_size_alone_gets_the_rates_of_a_modest_card(size: str, card: str) -> None:
    machine = described(gpu=None, memory=size)
    assert machine.memory_bytes == int(size[:-2]) * 10**9
    assert card in machine.source
    assert "not measured here" in machine.source


def test_a_description_needs_something() -> None:
    with pytest.raises(ConfigError, match="Neither a GPU nor its memory"):
        described(gpu=None, memory=None)


def test_this_machine_without_a_calibration_is_assumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    machine = this_machine(calibrate=False)
    assert not machine.rates.is_measured
    assert "assumed" in machine.source
    assert machine.device == "cuda" or machine.memory_bytes == machine.host_memory_bytes > 0
    assert not (tmp_path / "cache").exists(), "looking leaves nothing behind"


def _environment(**changes: object) -> Environment:
    return replace(describe_environment(), gpus=(), **changes)  # type: ignore[arg-type]


def test_assumed_rates_follow_the_processor() -> None:
    plain = assumed_rates(_environment(cores=4, instruction_sets=("AVX2",)))
    wide = assumed_rates(_environment(cores=4, instruction_sets=("AVX2", "AVX-512")))
    amx = assumed_rates(_environment(cores=4, instruction_sets=("AVX-512", "AMX BF16")))
    assert plain.matrix["bfloat16"] < plain.matrix["float32"], "emulated"
    assert wide.matrix["float32"] > plain.matrix["float32"]
    assert amx.matrix["bfloat16"] > 10 * amx.matrix["float32"]
    more = assumed_rates(_environment(cores=8, instruction_sets=("AVX-512", "AMX BF16")))
    assert more.matrix["bfloat16"] == 2 * amx.matrix["bfloat16"]


def test_a_gpu_of_this_machine_is_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    found = replace(describe_environment(), gpus=(Gpu("NVIDIA L4", 23 * 10**9, "8.9"),))
    monkeypatch.setattr(hardware, "describe_environment", lambda: found)
    machine = this_machine(calibrate=False)
    assert (machine.device, machine.name, machine.memory_bytes) == ("cuda", "NVIDIA L4", 23 * 10**9)
    assert machine.rates == GPUS["l4"].rates
    unknown = replace(found, gpus=(Gpu("NVIDIA X1", 23 * 10**9, "9.9"),))
    assert assumed_rates(unknown).matrix, "a card that is not in the table has figures too"


def _file(folder: Path, **content: object) -> Path:
    path = folder / "box.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_a_file_describes_a_processor(tmp_path: Path) -> None:
    rates = {"matrix": {"float32": 2e11, "bfloat16": 3e12}, "bandwidth": 4e10}
    path = _file(
        tmp_path, name="laptop", memory="16GiB", cores=8, rates=rates, price_per_hour=0.1,
        instruction_sets=["AVX-512", "AVX-512 BF16"],
    )  # fmt: skip
    machine = read_machine(path)
    assert (machine.name, machine.device, machine.cores) == ("laptop", "cpu", 8)
    assert machine.memory_bytes == machine.host_memory_bytes == 16 * 2**30
    assert machine.rates.matrix == {"float32": 2e11, "bfloat16": 3e12}
    assert machine.price_per_hour == 0.1
    assert machine.source == "the file box.yaml"


def test_a_file_may_start_from_a_card(tmp_path: Path) -> None:
    path = _file(tmp_path, gpu="h100", host_memory="1TB", rates={"bandwidth": 3e12})
    machine = read_machine(path)
    card = GPUS["h100"].machine
    assert machine.memory_bytes == card.memory_bytes
    assert machine.host_memory_bytes == 10**12
    assert machine.rates == replace(card.rates, bandwidth=3e12)


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        ({"memory": "16GB"}, "without gpu these are needed: rates.matrix, rates.bandwidth"),
        ({"gpu": "l4", "vram": "24GB"}, "vram: unknown key; did you mean 'memory'?"),
        ({"gpu": "l4", "device": "cpu"}, "contradict each other"),
        ({"gpu": "l4", "rates": {"matrix": {"bfloat16": -1.0}}}, "must be above 0"),
        ({"gpu": "l4", "price_per_hour": -2}, "price_per_hour"),
        ({"gpu": "l5"}, "No GPU 'l5'"),
        ({"gpu": "l4", "memory": "lots"}, "no size of memory"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, content: dict[str, object], seen: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_machine(_file(tmp_path, **content))
    assert seen in str(refused.value)


def test_all_problems_of_a_file_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        read_machine(_file(tmp_path, gpu="l4", cores=-1, price_per_hour=-1, colour="blue"))
    assert len(refused.value.problems) == 3
