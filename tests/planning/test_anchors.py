"""Published figures of memory and parameters, out of the same model that plans runs.

Sources: the papers of LoRA (2106.09685) and QLoRA (2305.14314), and the tables that they are taught with; the
rows of fms-acceleration and torchtune were measured by others on their GPUs. `pytest -s` prints the
deviations.
"""

from __future__ import annotations

from typing import Any

import pytest

from graftlm.methods.lora import LoraConfig
from graftlm.planning.base_facts import base_facts
from graftlm.planning.estimates import MemoryEstimate, Phase
from graftlm.planning.hardware import described
from graftlm.planning.machine import Machine
from graftlm.planning.memory import estimate_memory
from graftlm.planning.sites import sites_of
from graftlm.planning.workload import Workload
from graftlm.training.memory_classes import OPTIMIZER
from graftlm.training.recipe import make_recipe

GB = 1e9
LLAMA = "meta-llama/Llama-3.1-8B"


def told(what: str, found: float, published: float) -> float:
    """The relative deviation, printed."""
    print(f"{what}: {found:,.2f} against {published:,.2f} ({100 * (found / published - 1):+.1f} %)")
    return found / published - 1


def card(gibibytes: int) -> Machine:
    return described(gpu=None, memory=f"{gibibytes}GB")


def estimate(base: str, gigabytes: int, rows: int, length: int, *settings: str,
             recompute: str = "everything") -> MemoryEstimate:  # fmt: skip
    facts = base_facts(base)
    size = f"train.per_device_train_batch_size={rows}"
    recipe = make_recipe({"model": {"name": base}, "data": {"path": "data.jsonl"}}, (*settings, size))
    tokens = rows * length
    workload = Workload(
        1000, 0, 1000 * length, 1.0, 0, length, tokens, tokens, length, 1, 100, 100, 100,
        longest_row=length, longest_held_out=length,
    )  # fmt: skip
    return estimate_memory(recipe, facts, workload, card(gigabytes), recompute=recompute)


def phase(found: MemoryEstimate, name: str) -> Phase:
    return next(one for one in found.phases if one.name == name)


def part(found: Phase, name: str) -> float:
    return sum(one.amount for one in found.parts if one.name == name)


def test_lora_on_one_matrix() -> None:
    """r = 8 on 4096 x 4096: 65,536 parameters, 256 times fewer."""
    facts = base_facts(LLAMA)
    only = LoraConfig(r=8, target_modules=["q_proj"], layers_to_transform=[0])
    assert sites_of(facts, only).trainable == 65_536
    assert 4096 * 4096 / 65_536 == 256


@pytest.mark.parametrize(
    ("targets", "published"),
    [(["q_proj", "k_proj", "v_proj", "o_proj"], 13.6e6), ("all-linear", 41.9e6)],
)
def test_trainable_parameters_of_llama(targets: Any, published: float) -> None:
    found = sites_of(base_facts(LLAMA), LoraConfig(r=16, target_modules=targets)).trainable
    assert abs(told(f"r=16 on {targets}", found / 1e6, published / 1e6)) < 0.005


def test_full_fine_tuning_of_7b_takes_four_times_its_weights() -> None:
    """16-bit weights, gradients and both moments of Adam: 4 x 13.5 GB. Ours trains copies in 32 bits."""
    parameters = base_facts("meta-llama/Llama-2-7b-hf").total
    sixteen_bit = 2 * parameters
    assert abs(told("weights, gradients, two moments in 16 bits", 4 * sixteen_bit / GB, 54.0)) < 0.01


def test_full_fine_tuning_of_70b() -> None:
    """32 bits: weights 280 GB, gradients 280, Adam 560."""
    found = estimate("meta-llama/Llama-2-70b-hf", 1000, 1, 128, "method.type=full", "model.dtype=float32")
    update = phase(found, "update")
    assert abs(told("trained, GB", part(update, "trained") / GB, 280)) < 0.02
    assert abs(told("gradients, GB", part(update, "gradients") / GB, 280)) < 0.02
    assert abs(told("Adam, GB", part(update, OPTIMIZER) / GB, 560)) < 0.02


def test_qlora_of_8b_takes_about_6_gb() -> None:
    """Published as "about 6 GB" (smallest setting); by arithmetic 7.2 GB for 2,048 tokens, 16-bit head."""
    found = phase(estimate(LLAMA, 24, 1, 2048, "method.type=qlora"), "backward").bytes / GB
    assert abs(told("QLoRA 8B, 2,048 tokens, GB", found, 7.2)) < 0.15
    small = phase(estimate(LLAMA, 24, 1, 512, "method.type=qlora"), "backward").bytes / GB
    assert abs(told("QLoRA 8B, 512 tokens, GB", small, 6.0)) < 0.2


def test_qlora_of_65b_fits_48_gb() -> None:
    """Dettmers et al.: 41 GB, on one card of 48 GB."""
    found = estimate("huggyllama/llama-65b", 48, 1, 512, "method.type=qlora", "train.optim=paged_adamw_32bit")
    steps = phase(found, "backward").bytes / GB
    told("QLoRA 65B, GB", steps, 41)
    assert 35 < steps < 48


@pytest.mark.parametrize(
    ("what", "base", "rows", "length", "settings", "gib"),
    [
        ("torchtune, 8B LoRA, 2 x 2048", LLAMA, 2, 2048, ("method.r=8",), 16.2 * 1.0737),
        ("torchtune, 8B QLoRA, 2 x 2048", LLAMA, 2, 2048, ("method.type=qlora", "method.r=8"), 7.4 * 1.0737),
        ("fms, Llama-3-8B QLoRA, 4 x 4096", LLAMA, 4, 4096, ("method.type=qlora",), 14.4),
    ],
)
def test_rows_that_others_measured(
    what: str, base: str, rows: int, length: int, settings: tuple[str, ...], gib: float
) -> None:
    """Other systems, so within a third: they keep other tensors."""
    found = phase(estimate(base, 80, rows, length, *settings), "backward").bytes / GB
    assert abs(told(what, found, gib)) < 0.34


@pytest.mark.slow
def test_more_of_anything_takes_more() -> None:
    def most(*settings: str, rows: int = 2, length: int = 512) -> int:
        found = estimate("meta-llama/Llama-3.2-1B", 80, rows, length, *settings, recompute="nothing")
        return phase(found, "backward").bytes

    assert most(rows=4) > most()
    assert most(length=1024) > most()
    assert most("method.r=64") > most("method.r=8")
    assert most("model.quantization=int8") < most()
    assert most("model.quantization=nf4") < most("model.quantization=int8")


@pytest.mark.slow
def test_a_policy_that_recomputes_more_takes_less() -> None:
    found = [
        phase(estimate(LLAMA, 80, 4, 1024, recompute=policy), "backward").bytes
        for policy in ("nothing", "cheap", "feed_forward", "everything")
    ]
    assert found == sorted(found, reverse=True)


def test_auto_is_what_a_run_would_choose() -> None:
    roomy, tight = (estimate(LLAMA, size, 4, 1024, recompute="auto") for size in (80, 22))
    assert roomy.notes[0] == "recomputed in backward: nothing"
    assert tight.notes[0] != roomy.notes[0]
