"""The calibration that is kept for the user: measured once, and never in the way."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from graftlm.core.environment import Environment, describe_environment
from graftlm.planning import kept_rates
from graftlm.planning.calibration import measure_rates
from graftlm.planning.kept_rates import Calibration, kept_or_measured
from graftlm.planning.machine import Rates

RATES = Rates({"bfloat16": 1e12, "float32": 1e11}, 1e10, 1e-5, 1e9, True, {"bfloat16": 5e11}, 1e9)


class Counted:
    """Stands in for the measurement."""

    def __init__(self) -> None:
        self.times = 0
        self.rates = RATES

    def __call__(self, device: torch.device, folder: Path | None) -> Rates:
        self.times += 1
        return self.rates


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counted:
    found = Counted()
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_rates, "measure_rates", found)
    monkeypatch.setattr(kept_rates, "_fresh_process", lambda: (300 * 2**20, 4.0))
    monkeypatch.setattr(kept_rates, "_others", lambda cores: 0.0)
    return found


@pytest.fixture(scope="module")
def here() -> Environment:
    return describe_environment()


def _file(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "cache" / "machines").glob("*.json")
    return found


def test_measured_once_and_read_back_exactly(here: Environment, measured: Counted, tmp_path: Path) -> None:
    assert kept_or_measured(here, measure_now=False) is None
    first = kept_or_measured(here, measure_now=True)
    again = kept_or_measured(here, measure_now=True)
    assert measured.times == 1
    assert first == again == kept_or_measured(here, measure_now=False)
    assert first is not None
    assert first.rates == RATES
    assert "measured here on 20" in first.source


@pytest.mark.parametrize(
    "change",
    [
        {"cores": 77},
        {"cpu": "another"},
        {"graft": "9.9"},
        {"packages": {"torch": "9.9"}},
        {"memory_bytes": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_machine_or_version_is_measured_anew(
    here: Environment, measured: Counted, change: dict[str, object]
) -> None:
    kept_or_measured(here, measure_now=True)
    kept_or_measured(replace(here, **change), measure_now=True)  # type: ignore[arg-type]
    assert measured.times == 2


def test_another_number_of_threads_is_measured_anew(here: Environment, measured: Counted) -> None:
    kept_or_measured(here, measure_now=True)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        kept_or_measured(here, measure_now=True)
    finally:
        torch.set_num_threads(before)
    assert measured.times == 2


def _broken(text: str) -> list[str]:
    content = json.loads(text)
    rates = content["rates"]
    return [
        "", "{", "[]", "null", "7", text[:-20],
        json.dumps({**content, "rates": {**rates, "bandwidth": 0}}),
        json.dumps({**content, "rates": {**rates, "bandwidth": "fast"}}),
        json.dumps({**content, "rates": {**rates, "matrix": {}}}),
        json.dumps({**content, "rates": {**rates, "matrix": {"bfloat16": float("nan")}}}),
        json.dumps({**content, "rates": {**rates, "colour": 1}}),
        json.dumps({**content, "start_seconds": -1}),
        json.dumps({key: value for key, value in content.items() if key != "idle_bytes"}),
    ]  # fmt: skip


def test_a_damaged_file_is_measured_over(here: Environment, measured: Counted, tmp_path: Path) -> None:
    good = kept_or_measured(here, measure_now=True)
    path = _file(tmp_path)
    text = path.read_text(encoding="utf-8")
    for number, broken in enumerate(_broken(text), start=1):
        path.write_text(broken, encoding="utf-8")
        assert kept_or_measured(here, measure_now=True) == good, broken
        assert measured.times == 1 + number
        assert path.read_text(encoding="utf-8") == text
    path.write_bytes(b"\xff\xfe\x00")
    assert kept_or_measured(here, measure_now=True) == good


def test_a_folder_that_cannot_be_made_is_no_error(
    here: Environment, measured: Counted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file stands where the folder would be")
    assert kept_or_measured(here, measure_now=True) is not None
    assert kept_or_measured(here, measure_now=True) is not None
    assert measured.times == 2
    assert "measured anew next time" in capsys.readouterr().err


def test_a_busy_machine_is_measured_again_when_it_is_quieter(
    here: Environment, measured: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_rates, "_others", lambda cores: 3.0)
    busy = kept_or_measured(here, measure_now=True)
    assert busy is not None
    assert "other programs" in busy.source
    assert kept_or_measured(here, measure_now=True) == busy, "not while it is as busy"
    monkeypatch.setattr(kept_rates, "_others", lambda cores: 0.2)
    assert kept_or_measured(here, measure_now=False) == busy, "not without being asked"
    measured.rates = replace(RATES, bandwidth=2e10)
    quiet = kept_or_measured(here, measure_now=True)
    assert quiet is not None
    assert quiet.rates.bandwidth == 2e10
    assert "other programs" not in quiet.source
    assert measured.times == 2


def test_a_real_measurement(tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    rates = measure_rates(torch.device("cpu"), tmp_path)
    assert torch.equal(state, torch.get_rng_state()), "random numbers of the caller are its own"
    assert rates.is_measured
    assert 1e9 < rates.matrix["float32"] < 1e14
    assert 1e8 < rates.bandwidth < 1e13
    assert 1e-7 < rates.operation_seconds < 1e-2
    assert min(rates.disk_read, rates.decoding, *rates.attention.values()) > 0
    assert not list(tmp_path.iterdir()), "the file that was read is gone"
    assert Calibration(**{**asdict(Calibration(rates, 1, 1.0, "")), "rates": rates}).rates == rates


@pytest.mark.slow
def test_a_fresh_process_tells_what_it_takes() -> None:
    idle, seconds = kept_rates._fresh_process()
    assert 50 * 2**20 < idle < 4 * 2**30
    assert seconds > 0.1
