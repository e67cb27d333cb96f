"""`graft search`: real searches on the embedded base, from three parts of the data to the final figure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from runs import KNOWN, files_of, write_rows
from safetensors.torch import load_file

from graftlm.core.errors import CheckpointError, ConfigError, GraftError, MissingDependency, UsageError
from graftlm.core.events import read_events
from graftlm.verbs.evaluate import evaluate
from graftlm.verbs.search import search
from graftlm.verbs.searching.result import SearchResult
from graftlm.verbs.tune import tune

SETTINGS = (
    "model.dtype=float32",
    "data.max_length=64",
    "train.max_steps=30",
    "output.report_to=none",
    f"eval.known_path={KNOWN}",
)
SPACE = {"method.r": [2, 4, 8], "train.learning_rate": {"low": 2e-4, "high": 2e-2, "log": True}}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = [{"prompt": f"What is twice {n}?", "completion": f"It is {2 * n}."} for n in range(160)]
    content += content[:3]  # equal rows must not lie in two parts
    return write_rows(tmp_path_factory.mktemp("data") / "sums.jsonl", content)


@pytest.fixture(scope="module")
def searched(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """A finished search. Nobody may change its folder."""
    out = tmp_path_factory.mktemp("searches") / "one"
    return search(rows, model="sprout", space=SPACE, budget="4", out=out, overrides=SETTINGS)


def test_rows_lie_in_one_part_and_none_is_lost(searched: SearchResult, rows: Path) -> None:
    parts = {
        name: (searched.folder / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        for name in ("train", "selection", "final")
    }
    assert sum(map(len, parts.values())) == 163
    assert sorted(json.dumps(json.loads(line)) for part in parts.values() for line in part) == sorted(
        rows.read_text(encoding="utf-8").splitlines()
    )
    sets = [set(part) for part in parts.values()]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert len(parts["selection"]) >= 30 and len(parts["final"]) >= 30


def test_the_search_says_what_it_found(searched: SearchResult) -> None:
    kept = json.loads((searched.folder / "result.json").read_text(encoding="utf-8"))
    assert kept == json.loads(json.dumps(searched.as_dict()))
    assert [trial["number"] for trial in kept["trials"]] == [0, 1, 2, 3]
    assert {trial["state"] for trial in kept["trials"]} == {"whole", "stopped"}
    whole = {trial["number"] for trial in kept["trials"] if trial["state"] == "whole"}
    assert {*kept["front"], kept["best"], kept["chosen"]} <= whole
    best = min(whole, key=lambda number: kept["trials"][number]["rungs"][-1]["loss"])
    assert kept["best"] == best
    assert searched.passed and "rows that nothing was chosen by" in searched.verdict


def test_a_trial_is_the_run_that_tune_makes_of_its_recipe(searched: SearchResult, tmp_path: Path) -> None:
    number = json.loads((searched.folder / "result.json").read_text(encoding="utf-8"))["chosen"]
    trial = searched.folder / "trials" / f"{number:03d}"
    alone = tune(trial / "recipe.yaml", out=tmp_path / "alone")
    assert files_of(alone.adapter) == files_of(trial / "adapter") == files_of(searched.adapter)


def test_the_final_figure_is_what_eval_measures(searched: SearchResult) -> None:
    found = evaluate(searched.folder, data=searched.folder / "data" / "final.jsonl")
    final = searched.figures["final"][str(searched.figures["chosen"])]
    assert found.comparison.loss.after.value == pytest.approx(final["adapter"][0], abs=1e-6)
    assert found.comparison.loss.before.value == pytest.approx(final["base"][0], abs=1e-6)


def test_the_report_draws_what_was_found_and_opens_offline(searched: SearchResult) -> None:
    page = searched.report.read_text(encoding="utf-8")
    for part in ("against parameters trained", "where they were stopped", "Settings of every trial"):
        assert part in page
    assert "://" not in page and "<script" not in page


def test_rungs_measure_all_trials_after_the_same_share(searched: SearchResult) -> None:
    steps = [[rung["step"] for rung in trial["rungs"]] for trial in searched.figures["trials"]]
    assert all(one in ([10], [10, 30]) for one in steps)
    starts = [
        event
        for trial in (searched.folder / "trials").iterdir()
        for event in read_events(trial / "events.jsonl")
        if event["kind"] == "start"
    ]
    assert len(starts) == sum(map(len, steps)), "no step is taken twice"


def test_a_finished_search_says_the_same_again(searched: SearchResult) -> None:
    before = files_of(searched.folder / "trials")
    again = search(searched.folder, resume=True)
    assert again.figures == searched.figures
    assert files_of(searched.folder / "trials") == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"budget": "soon"}, "Cannot read the budget"),
        ({"budget": "0"}, "allows nothing"),
        ({"space": {}}, "leaves nothing to choose"),
        ({"space": {"method.r": [8]}}, "leaves nothing to choose"),
        ({"space": {"method.rank": [4, 8]}}, "unknown key"),
        ({"space": {"methd.r": [4, 8]}}, "did you mean 'method'"),
        ({"space": {"method.r": [4, "many"]}}, "(got 'many')"),
        ({"space": {"method.num_virtual_tokens": [4, 8]}}, "unknown key"),
        ({"space": {"train.seed": [1, 2]}}, "the luckiest seed"),
        ({"space": {"data.max_length": [64, 128]}}, "would change with it"),
        ({"space": {"model.name": ["a", "b"]}}, "cannot be compared"),
        ({"metric": "acuracy"}, "did you mean 'accuracy'"),
        ({"sampler": "best"}, "sampler"),
        ({"costs": ("money",)}, "costs"),
        ({"on": "rays", "workers": 2}, "did you mean 'ray'"),
        ({"ladder": True}, "ladder was asked for"),
        ({"model": None}, "No base is named"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(
    rows: Path, tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    given = {"model": "sprout", "space": SPACE, "overrides": SETTINGS, **options}
    with pytest.raises(UsageError) as caught:
        search(rows, out=tmp_path / "out", **given)
    assert told in str(caught.value)
    assert caught.value.fix
    assert not (tmp_path / "out").exists()


def test_a_metric_that_this_task_lacks_is_refused_with_those_it_has(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no metric 'accuracy'") as caught:
        search(rows, model="sprout", metric="accuracy", out=tmp_path / "out", overrides=SETTINGS)
    assert "loss, exact_match" in caught.value.meaning
    assert not (tmp_path / "out").exists()


def test_a_budget_below_one_trial_is_refused_with_what_one_takes(rows: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"space": SPACE, "overrides": SETTINGS, "model": "sprout"}
    with pytest.raises(UsageError, match="less than one trial: about") as caught:
        search(rows, budget="3k tokens", out=tmp_path / "out", **options)
    assert "Give several times that" in caught.value.fix


def test_settings_that_do_not_go_together_fail_one_trial_and_not_the_search(
    rows: Path, tmp_path: Path
) -> None:
    space = {"method.type": ["lora", "ia3"], "train.loraplus_lr_ratio": [None, 8.0]}
    found = search(
        rows, model="sprout", space=space, sampler="grid", budget="4", out=tmp_path / "out",
        overrides=("train.max_steps=2", "data.eval_fraction=0.25", "output.dir=elsewhere", *SETTINGS[:2]),
    )  # fmt: skip
    failed = [trial for trial in found.figures["trials"] if trial["state"] == "failed"]
    assert [trial["fields"] for trial in failed] == [{"method.type": "ia3", "train.loraplus_lr_ratio": 8.0}]
    assert "loraplus_lr_ratio" in failed[0]["why"] and "failed" in found.report.read_text(encoding="utf-8")
    assert sum(trial["state"] == "whole" for trial in found.figures["trials"]) == 3


def test_too_few_rows_for_three_parts(tmp_path: Path) -> None:
    few = write_rows(tmp_path / "few.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(GraftError, match="leaves no rows to hold out"):
        search(few, model="sprout", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_are_not_mixed_up(searched: SearchResult, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="already holds a search"):
        search(rows, model="sprout", out=searched.folder, overrides=SETTINGS)
    with pytest.raises(UsageError, match="metric cannot be given"):
        search(searched.folder, resume=True, metric="loss")
    with pytest.raises(CheckpointError, match="no search in"):
        search(tmp_path, resume=True)
    with pytest.raises(ConfigError, match="whole_ladder"):
        search(rows, model="sprout", out=tmp_path / "out", whole_ladder=True)


def test_without_optuna_it_says_what_to_install(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingDependency, match="optuna") as caught:
        search(rows, model="sprout", out=tmp_path / "out", overrides=SETTINGS)
    assert "graftlm[search]" in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_without_ray_it_says_how_to_do_without(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="'ray' is not installed") as caught:
        search(rows, model="sprout", out=tmp_path / "out", overrides=SETTINGS, workers=2, on="ray")
    assert "graft search SEARCH --resume" in caught.value.fix
    assert not (tmp_path / "out").exists()


def started(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "graftlm", "search", *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def words(rows: Path, out: Path) -> list[str]:
    space = out.with_suffix(".yaml")
    space.write_text(json.dumps(SPACE), encoding="utf-8")
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    return [
        str(rows),
        "--model",
        "sprout",
        "--space",
        str(space),
        "--budget",
        "4",
        "--out",
        str(out),
        *settings,
    ]


def comparable(figures: dict[str, Any]) -> Any:
    """All but times and memory, which no two runs share."""
    trials = [
        (
            trial["number"], trial["state"], trial["fields"],
            [(rung["step"], rung["loss"]) for rung in trial["rungs"]],
        )
        for trial in figures["trials"]
    ]  # fmt: skip
    return trials, {key: figures[key] for key in ("front", "best", "knee", "chosen", "final", "tokens")}


@pytest.mark.slow
def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(
    rows: Path, searched: SearchResult, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    for number, step in ((1, 4), (2, 12)):  # in its first leg, and in one that goes on
        process = started(*(words(rows, out) if number == 1 else [str(out), "--resume"]))
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None and not _stepped(out, number, step):
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    found = search(out, resume=True)
    assert comparable(dict(found.figures)) == comparable(dict(searched.figures))
    assert files_of(found.adapter) == files_of(searched.adapter)


def _stepped(out: Path, number: int, step: int) -> bool:
    """Whether any trial from `number` on has taken that step."""
    logs = [path for path in out.glob("trials/*/events.jsonl") if int(path.parent.name) >= number]
    return any(
        event["kind"] == "step" and event["step"] >= step for log in logs for event in read_events(log)
    )


@pytest.mark.slow
def test_two_processes_share_one_search(rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "shared"
    first = started(*words(rows, out))
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (out / "search.json").exists():
        time.sleep(0.01)
    second = started(str(out), "--resume")
    assert (first.wait(300), second.wait(300)) == (0, 0)
    figures = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert [trial["number"] for trial in figures["trials"]] == [0, 1, 2, 3]
    for trial in figures["trials"]:
        events = read_events(out / "trials" / f"{trial['number']:03d}" / "events.jsonl")
        steps = [event["step"] for event in events if event["kind"] == "step"]
        assert steps == list(range(1, trial["rungs"][-1]["step"] + 1)), "each step once, by one process"


@pytest.mark.slow
def test_trials_side_by_side_are_the_trials_alone(rows: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"space": SPACE, "sampler": "random", "budget": "4", "model": "sprout"}
    options |= {"overrides": SETTINGS, "stopping": "none"}
    one = search(rows, out=tmp_path / "one", together=1, **options)
    four = search(rows, out=tmp_path / "four", together=4, **options)
    for number in range(4):
        folders = [one.folder / "trials" / f"{number:03d}", four.folder / "trials" / f"{number:03d}"]
        mine, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folders)
        assert mine.keys() == theirs.keys()
        worst = max(float((mine[key] - theirs[key]).abs().max()) for key in mine)
        assert worst < 1e-4, worst
    assert one.figures["chosen"] == four.figures["chosen"]


@pytest.mark.slow
def test_a_ladder_stops_where_nothing_is_gained_and_says_so(rows: Path, tmp_path: Path) -> None:
    found = search(rows, model="sprout", ladder=True, out=tmp_path / "ladder", overrides=SETTINGS)
    kinds = [trial["fields"]["method.type"] for trial in found.figures["trials"]]
    assert kinds[:3] == ["prompt", "prefix", "lora"] and len(kinds) < 9
    assert any("brought no gain" in line for line in found.lines)
    assert found.figures["chosen"] < len(kinds) - 1
