"""What decides whether a benchmark's figure counts: the gate, the arithmetic, the parts, the files."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import harness
import pytest
from harness import results
from harness.case import Case, parse_case
from harness.fit import fit
from harness.flops import step_flops
from harness.kept import KeptRow, latest_rows
from harness.machine import Rates
from harness.measurement import Run
from harness.parity import LOSS, judge
from harness.parts import ADAPTER, BASE, GAPS, HEAD, PARTS, Operator, floors, part_of
from harness.row import Outcome, Row
from harness.row_report import findings, records, table
from harness.sides.registry import GRAFT, PEFT

MODULES = [name for _, name, _ in pkgutil.walk_packages(harness.__path__, "harness.")]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def run(side: str, seconds: float, loss: float = 2.0, number: int = 0) -> Run:
    return Run(
        side, number, seconds=[9.0, seconds, seconds], processor=[seconds] * 3, tokens=[100] * 3,
        losses=[loss] * 3, norms=[0.5] * 3, warm_up=1, imports=10, weights=20, peak_training=130,
    )  # fmt: skip


def outcome(*runs: Run) -> Outcome:
    row = Row(Case("lora", shape="tiny"), peers=(PEFT, "PEFT, autocast"), speed=2, memory=0.5)
    return Outcome(row, [Rates(1e12, 1e10)], list(runs), flops=1e9)


def test_a_run_with_another_loss_is_void() -> None:
    reference = run(PEFT, 1.0)
    assert not judge(run(GRAFT, 1.0, 2.0 * (1 + LOSS / 2)), reference).is_void
    assert judge(run(GRAFT, 1.0, 2.0 * (1 + 2 * LOSS)), reference).is_void


def test_a_run_without_gradients_is_void() -> None:
    still = run(GRAFT, 1.0)
    still.norms = [0.5, 0.0, 0.5]
    assert judge(still, run(PEFT, 1.0)).is_void


def test_the_best_peer_counts_and_a_void_one_does_not() -> None:
    found = outcome(run(GRAFT, 1.0), run(PEFT, 3.0), run("PEFT, autocast", 2.0, loss=2.5))
    assert "Graft / PEFT: 3.00" in findings(found)
    assert "VOID" in table(found)


def test_utilisation_is_arithmetic_over_the_measured_rate() -> None:
    assert outcome().utilisation(run(GRAFT, 0.01)) == pytest.approx(0.1)


def test_memory_is_above_libraries_and_weights() -> None:
    assert run(GRAFT, 1.0).above_weights == 100


def test_unequal_steps_weigh_by_their_tokens() -> None:
    uneven = run(GRAFT, 1.0)
    uneven.tokens, uneven.seconds = [7, 100, 300], [9.0, 1.0, 1.0]
    assert uneven.tokens_per_second == 200


def test_a_case_survives_the_way_to_another_process() -> None:
    case = Case("a", without=("norms", "rotary"), adapters=3, on_device=True)
    assert parse_case(case.dumps()) == case


def test_masked_tokens_cost_no_head() -> None:
    case = Case("a", shape="0.17b")
    whole, half = step_flops(case, [512], 512), step_flops(case, [512], 256)
    assert whole - half == 4 * 256 * case.model.head


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (Operator("mm", ((2048, 1024), (1024, 2816))), BASE),
        (Operator("mm", ((2048, 1024), (1024, 48))), ADAPTER),
        (Operator("mm", ((2048, 1024), (1024, 32000))), HEAD),
        (Operator("copy_", ((8, 8),), ("graft::linear_cross_entropy",)), HEAD),
        (Operator("_AdaptedBackward", ((2048, 1024),)), GAPS),
    ],
)
def test_parts_are_told_by_name_and_shape(call: Operator, part: str) -> None:
    assert part_of(call, Case("a", shape="0.17b")) == part


def test_every_part_has_a_floor() -> None:
    assert set(floors(Case("a"), Rates(1e12, 1e10), [512], 511)) == set(PARTS)


def test_a_line_far_from_a_point_says_so() -> None:
    assert fit([(1.0, 1.0), (2.0, 2.0), (3.0, 4.0)]).deviation > 0.05


def test_results_only_grow_and_refuse_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    results.append(path, [{"a": 1, "b": 2.5}])
    results.append(path, [{"a": 2, "b": 3.5}])
    assert results.read(path) == [{"a": "1", "b": "2.5"}, {"a": "2", "b": "3.5"}]
    with pytest.raises(SystemExit, match="other columns: b, c"):
        results.append(path, [{"a": 1, "c": 2}])


def test_kept_rows_give_the_ratios_that_were_shown(tmp_path: Path) -> None:
    found = outcome(run(GRAFT, 1.0), run(PEFT, 3.0), Run("PEFT, autocast", failed="not installed: peft"))
    path = tmp_path / "tuning.csv"
    results.append(path, [line | {"command": "c", "date": "d"} for line in records(found)])
    kept = latest_rows(path)["lora"]
    assert isinstance(kept, KeptRow)
    assert kept.ratio_to_best("tokens_per_second", most=True) == pytest.approx(3.0, rel=0.01)
    assert kept.agreement("PEFT, autocast") == "not installed: peft"
