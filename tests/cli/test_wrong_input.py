"""Wrong input: a clear error in three parts, the right exit code, and not one file written or changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from graftlm.models.sprout import sprout_folder
from graftlm.verbs.tune import tune

GOOD = [{"prompt": f"What is twice {n}?", "completion": f"It is {2 * n}."} for n in range(70)]
SHORT = ["model.dtype=float32", "train.max_steps=1", "data.max_length=64", "eval.before_after=false"]
TUNE = ["tune", "good.jsonl", "--model", "sprout", "--out", "new"]


def lines(rows: Sequence[object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


FILES = {
    "good.jsonl": lines(GOOD),
    "broken.jsonl": lines(GOOD[:6]) + '{"prompt": "x", "completion": \n' + lines(GOOD[7:]),
    "columns.jsonl": lines([{"foo": str(n), "bar": n} for n in range(50)]),
    "no-answers.jsonl": lines([{"prompt": f"q{n}", "completion": ""} for n in range(50)]),
    "long.jsonl": lines([{"prompt": f"q {n} " * 500, "completion": "yes"} for n in range(50)]),
    "empty.jsonl": "",
    "one.jsonl": lines(GOOD[:1]),
    "picture.png": "not data",
    "typo.yaml": "model: sprout\ndata: good.jsonl\ntrain: {learning_rat: 1e-3}\n",
    "alias.yaml": "model: sprout\ndata: {path: good.jsonl, max_seq_length: 64}\n",
    "many.yaml": "model: {}\ndata: {path: good.jsonl, eval_path: a, eval_fraction: 0.2}\n"
    "method: {r: 0, lora_alfa: 3}\ntrain: {lr: 1, optim: sgd, num_train_epochs: -1}\nzorp: 1\n",
    "broken.yaml": "model: [\n",
    "list.yaml": "- model\n",
    "notes/readme.txt": "not a model",
    "newer/config.json": '{"model_type": "zorp-9", "architectures": ["ZorpForCausalLM"]}',
    "newer/model.safetensors": "",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with everything that can be named wrongly, made once: no command may change it."""
    folder = tmp_path_factory.mktemp("place")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    before = Path.cwd()
    os.chdir(folder)
    try:
        tune("good.jsonl", model="sprout", out="run", overrides=[*SHORT, "output.report_to=none"])
        damaged(Path("run/adapter"), "cut-adapter", "adapter_model.safetensors", lambda data: data[:-100])
        damaged(Path("run/adapter"), "noise-adapter", "adapter_model.safetensors", lambda data: b"\x99" * 900)
        damaged(
            Path("run/adapter"), "odd-adapter", "adapter_config.json", lambda data: data[: len(data) // 2]
        )
        damaged(sprout_folder(), "cut-base", "model.safetensors", lambda data: data[:-100])
        damaged(sprout_folder(), "noise-base", "model.safetensors", lambda data: b"\x99" * 900)
        damaged(sprout_folder(), "other-base", "model.safetensors", lambda data: data[:-2000] + bytes(2000))
        yield folder
    finally:
        os.chdir(before)


def damaged(source: Path, name: str, file: str, change: Callable[[bytes], bytes]) -> None:
    shutil.copytree(source, name)
    (Path(name) / file).write_bytes(change((source / file).read_bytes()))


@dataclass(frozen=True)
class Wrong:
    """A command line, its exit code, and words of each part of the error."""

    command: str
    code: int
    seen: str
    meaning: str = ""
    fix: str = ""
    problems: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        return self.command.split()


T = " ".join(TUNE)
CASES = [
    # data
    Wrong("tune nowhere.jsonl --model sprout", 1, "No file nowhere.jsonl", "misspelt", "Did you mean"),
    Wrong("tune godo.jsonl --model sprout", 1, "No file godo.jsonl", "misspelt", "good.jsonl"),
    Wrong("tune notes --model sprout", 1, "notes is a folder", "one file", "readme.txt"),
    Wrong("tune picture.png --model sprout", 1, "'.png'", "ending", ".jsonl"),
    Wrong("tune broken.jsonl --model sprout", 1, "1 of 70 rows in broken.jsonl", "hide a fault",
          "data.bad_rows=skip", ("row 7: broken JSON",)),
    Wrong("tune columns.jsonl --model sprout", 1, "No usable column", "prompt", "Rename the columns"),
    Wrong("tune no-answers.jsonl --model sprout", 1, "50 of 50 rows", "No row is left", "graft check",
          ("row 1: the answer ('completion') is empty", "... and 40 more")),
    Wrong("tune long.jsonl --model sprout --set data.max_length=16", 1, "No training row of long.jsonl",
          "Every label is masked", "data.max_length", ("beyond max_length 16",)),
    Wrong("tune empty.jsonl --model sprout", 1, "empty.jsonl has no rows", "empty", '"completion"'),
    Wrong("tune one.jsonl --model sprout", 1, "no rows to hold out", "held-out", "data.eval_path=FILE"),
    Wrong(f"{T} --set data.format=messages", 1, "do not have the columns of 'messages'", "messages", "auto"),
    Wrong(f"{T} --set data.format=zorp", 2, "Unknown data format 'zorp'", fix="prompt_completion"),
    Wrong(f"{T} --set data.eval_path=nope.jsonl", 1, "No file nope.jsonl", "misspelt", "Did you mean"),
    Wrong(f"{T} --set eval.known_path=nope.txt", 1, "No file nope.txt", "misspelt", "Data files"),
    Wrong(f"{T} --set eval.known_path=columns.jsonl", 1, "no column 'text'", "running text", "known_path"),
    # base
    Wrong("tune good.jsonl", 2, "No base is named", "one base", "graft tune good.jsonl --model M"),
    Wrong("tune good.jsonl --model notes", 1, "notes is not a model", "readme.txt", "save_pretrained"),
    Wrong("tune good.jsonl --model good.jsonl", 1, "good.jsonl is a file, not a model", "folder", "folder"),
    Wrong("tune good.jsonl --model ./nowhere", 1, "No folder ./nowhere", "nothing is there", "the path"),
    Wrong("tune good.jsonl --model sprot", 1, "did you mean 'sprout'", "cache", "folder"),
    Wrong("tune good.jsonl --model run", 1, "run is a run, not a base", "trained on sprout", "sprout"),
    Wrong("tune good.jsonl --model run/adapter", 1, "is an adapter, not a base", "sprout", "sprout"),
    Wrong("tune good.jsonl --model cut-base", 1, "corrupt or cut short", "did not finish", "again"),
    Wrong("tune good.jsonl --model noise-base", 1, "corrupt or cut short", "did not finish", "again"),
    Wrong("chat cut-base --prompt x", 1, "corrupt or cut short", "did not finish", "again"),
    # recipe
    Wrong("tune nowhere.yaml", 2, "No file nowhere.yaml", fix="Check the path"),
    Wrong("tune broken.yaml", 2, "broken.yaml is not valid YAML", fix="line"),
    Wrong("tune list.yaml", 2, "list.yaml holds list", fix="model: ..."),
    Wrong("tune typo.yaml", 2, "typo.yaml has 1 problem", fix="Correct",
          problems=("train.learning_rat: unknown key; did you mean 'learning_rate'?",)),
    Wrong("tune alias.yaml", 2, "alias.yaml has 1 problem", fix="Correct",
          problems=("data.max_seq_length: unknown key; did you mean 'max_length'?",)),
    Wrong("tune many.yaml", 2, "many.yaml has 8 problems", fix="Correct", problems=(
        "model.name: Field required", "eval_fraction has no effect", "method.r:", "did you mean 'lora_alpha'",
        "did you mean 'learning_rate'", "train.optim:", "train.num_train_epochs:", "zorp: unknown key")),
    Wrong(f"{T} --set method.r=0", 2, "1 problem", fix="Correct", problems=("method.r: Input should be gr",)),
    Wrong(f"{T} --set zorp", 2, "Cannot read the override 'zorp'", fix="section.field=value"),
    Wrong(f"{T} --set method.target_modules=q_porj", 1, "target modules", "spelled", "all-linear",
          ("near misses: 'q_proj'",)),
    Wrong(f"{T} --set method.modules_to_save=[lm_haed]", 1, "modules_to_save", fix="Name modules"),
    Wrong(f"{T} --set method.layers_to_transform=[99]", 1, "", problems=("99",)),
    Wrong(f"{T} --method qlor", 2, "1 problem", problems=("no such method; did you mean 'qlora'?",)),
    Wrong(f"{T} --method qlora --set model.quantization=none", 2, "1 problem", fix="Correct",
          problems=("method.type: qlora trains on a quantised base, and model.quantization is none",)),
    Wrong(f"{T} --task stf", 2, "1 problem", problems=("no such task; did you mean 'sft'?",)),
    Wrong(f"{T} --set model.quantization=nf5", 2, "1 problem", problems=("'nf4', 'fp4', 'int8' or 'fp8'",)),
    Wrong(f"{T} --set model.load_in_4bit=true", 2, "1 problem", fix="Correct",
          problems=("model.load_in_4bit: unknown key; did you mean 'quantization'?",)),
    Wrong(f"{T} --set train.optim=adamw8bit", 2, "1 problem", problems=("train.optim: Input should be",)),
    Wrong(f"{T} --method full --set model.quantization=nf4", 1, "trained whole are quantised", "far smaller",
          "quantization='none'", ("model.layers.0.self_attn.q_proj",)),
    Wrong(f"{T} --set output.register_as=x", 2, "1 problem", problems=("not in this version",)),
    Wrong(f"{T} --set data.max_length=4096", 2, "context of this base", "never trained", "at most"),
    # what would have no effect
    Wrong(f"{T} --set data.path=other.jsonl", 2, "data.path is given twice", "no effect", "Leave one"),
    Wrong(f"{T} --set model.name=gpt2", 2, "model.name is given twice", "no effect", "Leave one"),
    Wrong(f"{T} --set data.eval_path=one.jsonl --set data.eval_fraction=0.2", 2, "1 problem", fix="Correct",
          problems=("eval_fraction has no effect beside eval_path",)),
    Wrong(f"{T} --set eval.before_after=false --set eval.max_forgetting=0.1", 2, "1 problem", fix="Correct",
          problems=("max_forgetting has no effect with before_after: false",)),
    Wrong("check good.jsonl --max-length 64", 2, "max_length has no effect", "tokenizer", "--model"),
    Wrong("check good.jsonl --template chat", 2, "template has no effect", "tokenizer", "--model"),
    # folders
    Wrong("tune good.jsonl --model sprout --out run", 2, "run already holds a run", "mix two runs",
          "graft tune run --resume"),
    Wrong("tune good.jsonl --model sprout --out notes", 2, "notes exists already", "never", "another"),
    Wrong("tune good.jsonl --model sprout --out good.jsonl/run", 2, "is a file", "folder", "another folder"),
    Wrong("tune run", 2, "run is a run that was started before", "data or from a recipe",
          "graft tune run --resume"),
    Wrong("tune nowhere --resume", 1, "There is no run to resume in nowhere", "recipe.yaml", "--resume"),
    Wrong("tune good.jsonl --resume", 1, "There is no run to resume", "recipe.yaml", "--resume"),
    Wrong("tune run --resume --set train.learning_rate=1e-3", 2, "started with another recipe", "repeat",
          "Resume without", ("train.learning_rate: 0.0018 in the run, 0.001 asked for",)),
    Wrong("tune run --resume --out other", 2, "Two runs are named", "own folder", "graft tune run --resume"),
    Wrong("merge run --out notes", 2, "notes exists already", "never overwrites", "another folder"),
    Wrong("merge run --out good.jsonl/merged", 2, "is a file", "folder", "another folder"),
    Wrong("demo --out notes", 2, "notes exists already", "never overwrites", "another folder"),
    # adapters
    Wrong("eval cut-adapter --data good.jsonl", 1, "cannot be read", "damaged or cut off", "again"),
    Wrong("eval noise-adapter --data good.jsonl", 1, "cannot be read", "damaged or cut off", "again"),
    Wrong("merge odd-adapter --out new", 1, "not valid JSON", "damaged or cut off", "again"),
    Wrong("merge cut-adapter --out new", 1, "cannot be read", "damaged or cut off", "again"),
    Wrong("chat noise-adapter --prompt x", 1, "cannot be read", "damaged or cut off", "again"),
    Wrong("eval run --data good.jsonl --base other-base", 1, "trained on another base", "weights", "base"),
    Wrong("merge run --out new --base other-base", 1, "trained on another base", "weights", "base"),
    Wrong("eval notes --data good.jsonl", 1, "neither an adapter", "adapter_config.json", "Check the path"),
    Wrong("eval run --data nope.jsonl", 1, "No file nope.jsonl", "misspelt", "Did you mean"),
    Wrong("merge run --out new --dtype zorp", 2, "Unknown dtype 'zorp'", fix="bfloat16"),
    *(Wrong(f"{verb} support@3 {rest}", 2, "a name in the registry", "not in this version", "folder")
      for verb, rest in (("eval", "--data good.jsonl"), ("merge", "--out new"), ("chat", "--prompt x"))),
]  # fmt: skip


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.mark.parametrize("wrong", CASES, ids=[case.command for case in CASES])
def test_three_parts_and_nothing_written(wrong: Wrong, place: Path, graft: Callable[..., Any]) -> None:
    before = state(place)
    outcome = graft(*wrong.words, "--json")
    after = state(place)
    for stray in after.keys() - before.keys():  # so that one failure is not the next one's
        shutil.rmtree(stray, ignore_errors=True)
    assert after == before
    assert outcome.code == wrong.code, outcome.err
    assert "Traceback" not in outcome.err
    error = outcome.json
    assert error["exit_code"] == wrong.code
    assert wrong.seen in error["seen"]
    assert wrong.meaning in error["meaning"]
    assert wrong.fix in error["fix"]
    listed = "\n".join(error["problems"])
    assert all(problem in listed for problem in wrong.problems), listed
    assert error["fix"] or error["meaning"]


REAL = [
    Wrong("tune good.jsonl --out new --model MODELS/g2p-bart-gb --task sft", 1,
          "is an encoder-decoder model", "", ""),
    Wrong("tune good.jsonl --out new --model MODELS/roberta-tiny-en", 1, "only reads text", "encoder",
          "a base that writes"),
    Wrong("tune good.jsonl --out new --model MODELS/roberta-tiny-en --task sft", 1, "does not write text",
          "encoder", "ForCausalLM"),
    Wrong("chat MODELS/roberta-tiny-en --prompt x", 1, "does not write text", "encoder", "ForCausalLM"),
    Wrong("eval run --data good.jsonl --base MODELS/stories260K", 1, "another base", "weights", "base"),
]  # fmt: skip


@pytest.mark.parametrize("wrong", REAL, ids=[case.command for case in REAL])
def test_real_models_that_do_not_fit(
    wrong: Wrong, shared: Path, place: Path, graft: Callable[..., Any]
) -> None:
    command = wrong.command.replace("MODELS", str(shared / "models"))
    test_three_parts_and_nothing_written(Wrong(**{**vars(wrong), "command": command}), place, graft)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of a given size."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("only root may mount a small file system")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_a_disk_that_is_full(small_disk: Path, place: Path, graft: Callable[..., Any]) -> None:
    """A merged model does not fit: no half of it stays. A run's checkpoint does not fit: it can go on."""
    out = graft("merge", "run", "--out", str(small_disk / "merged"), "--dtype", "float32", "--json")
    assert out.code == 1
    assert out.json["error"] == "StorageError", out.err
    assert "bytes needed" in out.json["seen"]
    assert not list(small_disk.iterdir())

    run = small_disk / "run"
    (small_disk / "ballast").write_bytes(bytes(4_500_000))
    options = [word for setting in SHORT for word in ("--set", setting)]
    out = graft("tune", "good.jsonl", "--model", "sprout", "--out", str(run), *options, "--json")
    assert out.code == 1
    assert out.json["error"] == "StorageError", out.err
    assert "--resume" in out.json["fix"]
    assert not (run / "adapter").exists()
    (small_disk / "ballast").unlink()
    again = graft("tune", str(run), "--resume", "--json")
    assert again.code == 0, again.err
