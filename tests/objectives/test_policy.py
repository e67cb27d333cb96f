"""GRPO and RLOO against TRL's own trainers on the same answers: losses, gradients and advantages."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from graftlm.data.branches import Branched, branch_batch
from graftlm.models.sprout import sprout_folder
from graftlm.objectives.advantages import grpo_advantages, rloo_advantages
from graftlm.objectives.base import LossParts
from graftlm.objectives.policy import GrpoObjective, PolicyBatch, RlooObjective
from graftlm.objectives.policy_settings import GrpoSettings, RlooSettings

PROMPTS = ((5, 9, 11, 40, 3), (7, 8))
ANSWERS = (((17, 30, 2), (19, 44, 45, 46, 2)), ((90, 2), (12, 61, 77, 8)))
LENGTHS = [3, 5, 2, 4]
ADVANTAGES = (0.7, -0.7, 1.3, -1.2)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.* is deprecated and will be removed in v6:FutureWarning", "ignore:.*pin_memory.*:UserWarning"
)
CLIPPED = {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}
NEAR = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A small model in float32, its weights large enough for unequal probabilities."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=128, initializer_range=0.15,
        )
    )  # fmt: skip
    model.config._name_or_path = str(folder)  # TRL makes itself a second model from there
    model.save_pretrained(folder)
    return model


def noise(seed: int, scale: float) -> Tensor:
    return scale * torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def known(base: nn.Module) -> Tensor:
    """Log-probabilities of all tokens under the base, at temperature 0.7."""
    values = []
    with torch.no_grad():
        for prompt, answers in zip(PROMPTS, ANSWERS, strict=True):
            for answer in answers:
                ids = torch.tensor([[*prompt, *answer]])
                logits = base(input_ids=ids).logits[0, len(prompt) - 1 : -1] / 0.7
                values.append(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0])
    return torch.cat(values)


def ours(model: nn.Module, objective: Any, batch: PolicyBatch) -> tuple[LossParts, dict[str, Tensor]]:
    model = copy.deepcopy(model)
    parts = objective(model, batch)
    (parts.loss_sum / parts.target_tokens).backward()
    return parts, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def batch_of(known: Tensor, *, old: bool, reference: bool) -> PolicyBatch:
    rows = [Branched(p, a, n, False) for n, (p, a) in enumerate(zip(PROMPTS, ANSWERS, strict=True), 1)]
    return PolicyBatch(
        **vars(branch_batch(rows, 0)),
        advantages=torch.tensor(ADVANTAGES),
        old_log_probs=known + noise(1, 0.3) if old else None,
        reference_log_probs=known + noise(2, 0.5) if reference else None,
    )


def padded(values: Tensor) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(values.split(LENGTHS)), batch_first=True)


def for_trl(batch: PolicyBatch) -> dict[str, Tensor]:
    """The same answers as TRL's trainers have them: prompts padded on the left, answers on the right."""
    prompts = [torch.tensor(PROMPTS[each]) for each in (0, 0, 1, 1)]
    answers = [torch.tensor(answer) for group in ANSWERS for answer in group]
    width = max(map(len, prompts))
    found = {
        "prompt_ids": torch.stack([nn.functional.pad(p, (width - len(p), 0)) for p in prompts]),
        "prompt_mask": torch.stack(
            [nn.functional.pad(torch.ones_like(p), (width - len(p), 0)) for p in prompts]
        ),
        "completion_ids": nn.utils.rnn.pad_sequence(answers, batch_first=True),
        "completion_mask": padded(torch.ones(sum(LENGTHS))).long(),
        "advantages": torch.tensor(ADVANTAGES),
        "num_items_in_batch": torch.tensor(float(sum(LENGTHS))),
    }
    if batch.old_log_probs is not None:
        found["old_per_token_logps"] = padded(batch.old_log_probs)
        found["old_logps"] = torch.stack([part.sum() for part in batch.old_log_probs.split(LENGTHS)])
    if batch.reference_log_probs is not None:
        found["ref_per_token_logps"] = padded(batch.reference_log_probs)
    return found


def theirs(
    trainer: Any, inputs: Mapping[str, Tensor], model: nn.Module
) -> tuple[float, dict[str, Tensor], Mapping[str, list[float]]]:
    model.zero_grad()
    model.train()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(model, inputs)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients, trainer._metrics["train"]


Make = Callable[..., tuple[Any, nn.Module]]


@pytest.fixture(scope="module")
def make(base: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """TRL's trainer of a kind, with its own model."""
    pytest.importorskip("trl")
    from datasets import Dataset

    tokenizer = transformers.AutoTokenizer.from_pretrained(sprout_folder())
    data = Dataset.from_list([{"prompt": f"What is {n} + 1?"} for n in range(8)])
    folder = tmp_path_factory.mktemp("trl")

    def trainer(kind: str, **settings: Any) -> tuple[Any, nn.Module]:
        import trl

        config, cls = {
            "grpo": (trl.GRPOConfig, trl.GRPOTrainer),
            "rloo": (trl.RLOOConfig, trl.RLOOTrainer),
        }[kind]
        args = config(
            output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", gradient_accumulation_steps=1,
            temperature=0.7, max_completion_length=9,
            **{"per_device_train_batch_size": 4, "num_generations": 2, **settings},
        )  # fmt: skip
        model = copy.deepcopy(base)
        made = cls(
            model=model, reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
            args=args, train_dataset=data, processing_class=tokenizer,
        )  # fmt: skip
        return made, model

    return trainer


GRPO: list[dict[str, Any]] = [
    {},
    {"loss_type": "grpo", "beta": 0.04},
    {"loss_type": "bnpo", "beta": 0.04, "use_bias_correction_kl": False},
    {"loss_type": "dr_grpo", "epsilon": 0.1, "epsilon_high": 0.28},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.1},
    {"loss_type": "dapo", "delta": 1.4, "beta": 0.02},
]


@pytest.mark.parametrize("settings", GRPO, ids=lambda each: "-".join(map(str, each.values())) or "default")
def test_grpo_is_trl(base: nn.Module, known: Tensor, make: Make, settings: dict[str, Any]) -> None:
    batch = batch_of(known, old=True, reference=bool(settings.get("beta")))
    trainer, model = make("grpo", **settings)
    loss, gradients, metrics = theirs(trainer, for_trl(batch), model)
    parts, found = ours(
        base, GrpoObjective(base, GrpoSettings(temperature=0.7, max_completion_length=9, **settings)), batch
    )
    assert float(parts.loss_sum.detach()) / parts.target_tokens == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, **NEAR)
    shown = {"entropy"} if settings.get("importance_sampling_level") else {"entropy", *CLIPPED}
    if not settings.get("use_bias_correction_kl", True):
        shown.add("kl")  # with the correction, TRL logs the weighted term
    for name in shown:
        assert parts.metrics[name] == pytest.approx(metrics[name][-1], rel=1e-5), name


def test_grpo_before_the_policy_changes(base: nn.Module, known: Tensor, make: Make) -> None:
    batch = batch_of(known, old=False, reference=False)
    trainer, model = make("grpo")
    loss, gradients, _ = theirs(trainer, for_trl(batch), model)
    parts, found = ours(base, GrpoObjective(base, GrpoSettings(temperature=0.7)), batch)
    assert float(parts.loss_sum.detach()) / parts.target_tokens == pytest.approx(loss, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(found["model.norm.weight"], gradients["model.norm.weight"], **NEAR)


def test_rloo_is_trl(base: nn.Module, known: Tensor, make: Make) -> None:
    batch = batch_of(known, old=True, reference=True)
    trainer, model = make("rloo", beta=0.05)
    loss, gradients, _ = theirs(trainer, for_trl(batch), model)
    parts, found = ours(base, RlooObjective(base, RlooSettings(temperature=0.7)), batch)
    assert float(parts.loss_sum.detach()) / parts.target_tokens == pytest.approx(loss, rel=1e-5, abs=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, **NEAR)


REWARDS = torch.tensor([[1.0, 0.0, 0.5, 2.0], [1.0, 1.0, 1.0, 1.0], [0.0, math.nan, 3.0, math.nan]])


@pytest.mark.parametrize("kind, settings", [
    ("grpo", {"scale_rewards": "group"}), ("grpo", {"scale_rewards": "batch"}),
    ("grpo", {"scale_rewards": "none"}), ("rloo", {"beta": 0.0}),
    ("rloo", {"beta": 0.0, "normalize_advantages": True}),
    ("rloo", {"beta": 0.0, "reward_clip_range": (0.25, 1.5)}),
], ids=str)  # fmt: skip
def test_advantages_are_those_of_trl(make: Make, kind: str, settings: dict[str, Any]) -> None:
    trainer, model = make(kind, num_generations=4, per_device_train_batch_size=12, **settings)
    model.train()
    values = [None if math.isnan(value) else value for value in REWARDS.flatten().tolist()]
    trainer.reward_funcs[0] = lambda completions, **_: values
    inputs = [{"prompt": f"What is {n // 4} + 1?"} for n in range(12)]
    expected = trainer._generate_and_score_completions(inputs)["advantages"].view(3, 4)
    if kind == "grpo":
        found = grpo_advantages(REWARDS, GrpoSettings(**settings))
    else:
        found = rloo_advantages(REWARDS, RlooSettings(**settings))
    torch.testing.assert_close(found.nan_to_num(0.0), expected, **NEAR)


def test_rloo_takes_the_log_ratio_off_the_reward() -> None:
    """By the definition: reward minus beta times the log-ratio of the answer, against the others' mean."""
    rewards, kl = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, -1.0, 2.0]])
    paid = [1.0 - 0.1 * 0.5, 0.0 + 0.1, 2.0 - 0.1 * 2.0]
    expected = [own - (sum(paid) - own) / 2 for own in paid]
    found = rloo_advantages(rewards, RlooSettings(beta=0.1), kl)
    assert found[0].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_an_answer_alone_teaches_nothing() -> None:
    rewards = torch.tensor([[1.0, math.nan], [math.nan, math.nan]])
    assert rloo_advantages(rewards, RlooSettings()).nan_to_num(0.0).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert grpo_advantages(rewards, GrpoSettings()).nan_to_num(0.0).tolist() == [[0.0, 0.0], [0.0, 0.0]]
