"""DPO and SFT steps on the same pairs: ours, and those of TRL's trainers.

Started as `python -m harness.pair_sides <case> <side> <round> <folder>`; the last line of its output is the
`Run` as JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.case import Case, parse_case
from harness.measurement import Recorder, Run
from harness.sides.trl_sft import watcher
from harness.writer import ADAPTER, BASE

PAIRS = "pairs.json"
BETA = 0.1
GRAFT, REPEATED, GRAFT_SFT = "Graft", "Graft, prompts repeated", "Graft, SFT"
TRL, IN_STEP, SECOND, TRL_SFT = "TRL, precomputed", "TRL", "TRL, second model", "TRL, SFT"
SIDES = (GRAFT, REPEATED, GRAFT_SFT, TRL, IN_STEP, SECOND, TRL_SFT)

Pair = tuple[list[int], list[int], list[int]]
"""Tokens of a prompt, of the chosen answer and of the rejected one."""


def steps_of(case: Case, folder: Path) -> list[list[Pair]]:
    """The pairs of each step."""
    pairs = [tuple(pair) for pair in json.loads((folder / PAIRS).read_text(encoding="utf-8"))]
    return [pairs[at : at + case.rows] for at in range(0, len(pairs), case.rows)]


def tokens_of(step: Sequence[Pair]) -> int:
    """Of the pairs, prompts once."""
    return sum(len(part) for pair in step for part in pair)


def graft(case: Case, side: str, folder: Path, recorder: Recorder) -> None:
    """The step of `graft tune`."""
    import torch

    from graftlm.formats.layout import FOLDER
    from graftlm.methods.attach import attach_folder
    from graftlm.models.load import load_model
    from graftlm.objectives.preference import DpoObjective, DpoSettings
    from graftlm.objectives.sft import SftObjective
    from graftlm.training.optim import make_optimizer
    from graftlm.training.recipe import Recipe
    from graftlm.training.step import optimizer_step
    from graftlm.verbs.step_setup import step_setup

    recorder.imported()
    model, _ = load_model(folder / BASE, dtype=torch.bfloat16)
    recorder.base(model)
    adapters = attach_folder(model, folder / ADAPTER, storage=FOLDER)
    recipe = Recipe.model_validate({
        "model": "any",
        "data": {"path": "any", "max_length": case.length},
        "train": {
            "learning_rate": case.rate, "per_device_train_batch_size": case.rows, "recompute": "nothing"
        },
    })  # fmt: skip
    steps = steps_of(case, folder)
    is_sft = side == GRAFT_SFT
    objective: Any = SftObjective(model) if is_sft else DpoObjective(model, DpoSettings(beta=BETA))
    parameters = adapters.named_parameters("default")
    optimizer = make_optimizer(parameters, recipe.train)
    setup = step_setup(model, objective, recipe, tokens=max(map(tokens_of, steps)))
    recorder.run.note = f"{objective.why}; {setup.fusable.summary}"
    model.train()
    with setup.in_use():
        batches = [texts(step) if is_sft else pairs(step, side, model, objective) for step in steps]
        recorder.begin()
        for step, batch in zip(steps, batches, strict=True):
            stats = optimizer_step(
                model, objective, [batch], parameters, optimizer, max_grad_norm=1.0, stop_asked=lambda: False
            )
            recorder.step(stats.loss, stats.grad_norm, tokens_of(step))


def texts(step: Sequence[Pair]) -> Any:
    """Pairs as whole texts with labels on both answers."""
    from graftlm.data.batches import Batches
    from graftlm.data.encode import Encoded

    rows = [
        Encoded((*prompt, *chosen, *rejected), (*[-100] * len(prompt), *chosen, *rejected), number, False)
        for number, (prompt, chosen, rejected) in enumerate(step)
    ]
    longest = max(len(row.input_ids) for row in rows)
    layout: dict[str, Any] = {"rows_per_batch": len(rows), "packing": False, "seed": 0, "pad_token_id": 0}
    return Batches(rows, max_length=longest, **layout).batch(0, 0)


def pairs(step: Sequence[Pair], side: str, model: Any, objective: Any) -> Any:
    """A batch of pairs with what the model says of them before the first step."""
    import torch

    from graftlm.data.branches import Branched
    from graftlm.objectives.preference import PairBatch, pair_batch

    answers = [(tuple(prompt), tuple(map(tuple, both))) for prompt, *both in step]
    if side == REPEATED:
        answers = [(prompt, (answer,)) for prompt, both in answers for answer in both]
    rows = [Branched(prompt, some, number, False) for number, (prompt, some) in enumerate(answers)]
    batch = pair_batch(rows, pad=0)
    with torch.no_grad():
        reference = objective.log_probs(model, batch).sums().view(-1, 2)
    return PairBatch(**{**vars(batch), "target_tokens": len(step), "reference": reference})


def trl(case: Case, side: str, folder: Path, recorder: Recorder) -> None:
    """Its own trainers, with adapters in the model's type and no autocast: the fastest of its ways here."""
    import torch
    import transformers
    from datasets import Dataset
    from peft import PeftModel

    library: Any = importlib.import_module("trl")
    recorder.imported()

    def base() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder / BASE, dtype=torch.bfloat16, attn_implementation="sdpa"
        )

    model = base()
    recorder.base(model)
    model = PeftModel.from_pretrained(
        model, folder / ADAPTER, is_trainable=True, autocast_adapter_dtype=False
    )
    steps = steps_of(case, folder)
    options: dict[str, Any] = {
        "output_dir": str(folder / "trl"), "per_device_train_batch_size": case.rows, "max_steps": case.steps,
        "max_length": None, "learning_rate": case.rate, "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "max_grad_norm": 1.0, "bf16": False, "gradient_checkpointing": False, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "train_sampling_strategy": "sequential", "dataloader_pin_memory": False,
    }  # fmt: skip
    shared: dict[str, Any] = {
        "model": model,
        "processing_class": transformers.AutoTokenizer.from_pretrained(folder / BASE),
        "callbacks": [watcher(recorder, [tokens_of(step) for step in steps])],
    }
    if side == TRL_SFT:
        rows = [{"input_ids": p + c + r, "labels": [-100] * len(p) + c + r} for s in steps for p, c, r in s]
        args = library.SFTConfig(**options)
        library.SFTTrainer(args=args, train_dataset=Dataset.from_list(rows), **shared).train()
        return

    class OnTokens(library.DPOTrainer):  # type: ignore[misc]
        """Takes pairs that are tokens already."""

        def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
            return dataset

    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for step in steps for p, c, r in step]
    args = library.DPOConfig(beta=BETA, precompute_ref_log_probs=side == TRL, **options)
    second = base() if side == SECOND else None
    OnTokens(args=args, ref_model=second, train_dataset=Dataset.from_list(rows), **shared).train()


def work(case: Case, side: str, number: int, folder: Path) -> Run:
    """One side in this process."""
    recorder = Recorder(Run(side, number, warm_up=1), "cpu")
    (graft if side.startswith("Graft") else trl)(case, side, folder, recorder)
    recorder.end()
    return recorder.run


if __name__ == "__main__":
    _, given_case, given_side, given_round, given_folder = sys.argv
    result = work(parse_case(given_case), given_side, int(given_round), Path(given_folder))
    print(json.dumps(asdict(result)))
