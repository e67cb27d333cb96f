"""Losses over pairs and marks: TRL's own trainers on the same batches, and the papers in float64."""

from __future__ import annotations

import copy
import math
import os
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from graftlm.core.errors import ConfigError
from graftlm.data.branches import Branched
from graftlm.data.preferences.encode import MarkedRow
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig
from graftlm.objectives.base import LossParts
from graftlm.objectives.kto import KtoObjective, KtoSettings, marked_batch
from graftlm.objectives.preference import DpoObjective, DpoSettings, IpoSettings, pair_batch
from graftlm.objectives.preference_losses import BY_DIFFERENCE, LOSSES, SMOOTHED, smoothed
from graftlm.objectives.reference_free import (
    OrpoObjective,
    OrpoSettings,
    SimpoObjective,
    SimpoSettings,
    log_odds,
)

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
pytestmark = pytest.mark.filterwarnings(
    "ignore:.* is deprecated and will be removed in v6:FutureWarning", "ignore:.*pin_memory.*:UserWarning"
)
PAIRS = [
    Branched((5, 9, 11, 40, 3), ((17, 30, 2), (19, 44, 45, 46, 2)), row=1, truncated=False),
    Branched((7, 8), ((60, 61, 62, 63, 64, 2), (12, 2)), row=2, truncated=False),
    Branched((4, 4, 21), ((33, 2), (34, 35, 2)), row=3, truncated=False),
]
MARKED = [
    MarkedRow(Branched(row.prompt, (row.answers[0], other.answers[0]), row.row, False), is_good)
    for row, other, is_good in zip(PAIRS, [*PAIRS[1:], PAIRS[0]], (True, False, True), strict=True)
]
Gradients = dict[str, Tensor]


def made(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small model with an adapter that has moved; its weights are large, for unequal probabilities."""
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.15, pad_token_id=0,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config)
    attach(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), storage=FOLDER)
    return model.to(dtype)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return made()


@pytest.fixture(scope="module")
def reference() -> Tensor:
    """[3, 2]: not far from what the model says."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([[float(len(answer)) for answer in row.answers] for row in PAIRS])
    return -5.5 * lengths + 2 * torch.randn(3, 2, generator=generator)


def ours(model: nn.Module, objective: Any, batch: Any) -> tuple[float, Gradients, LossParts]:
    model.zero_grad()
    parts = objective(model, batch)
    (parts.loss_sum / parts.target_tokens).backward()
    return float(parts.loss_sum.detach()) / parts.target_tokens, gradients(model), parts


def gradients(model: nn.Module) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def equal(one: Gradients, other: Gradients) -> bool:
    """To 1e-5 of each tensor's size, in float32."""
    return one.keys() == other.keys() and all(
        float((one[key] - other[key]).norm()) <= 1e-5 * float(other[key].norm()) for key in other
    )


def texts(answer: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(row.prompt, row.answers[answer]) for row in PAIRS]


def for_trl(pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> dict[str, Tensor]:
    """Rows padded on the right, with the mask of what is answered."""
    ids = [torch.tensor([*prompt, *answer]) for prompt, answer in pairs]
    masks = [torch.tensor([0] * len(prompt) + [1] * len(answer)) for prompt, answer in pairs]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "completion_mask": pad_sequence(masks, batch_first=True),
    }


def trainer(kind: str, folder: Path, **columns: Any) -> Any:
    """A trainer of TRL on a copy of the model, whose reference log-probabilities come with the batch."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({str(number): number for number in range(80)}, unk_token="0"))
    words.pre_tokenizer = Whitespace()
    config = getattr(trl, f"{kind}Config")(
        str(folder), bf16=False, gradient_checkpointing=False, report_to="none", use_cpu=True,
        precompute_ref_log_probs=True, per_device_train_batch_size=2,
    )  # fmt: skip
    found = getattr(trl, f"{kind}Trainer")(
        model=made(),
        args=config,
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="0", eos_token="2"
        ),
    )
    found._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    return found


@pytest.fixture(scope="module")
def dpo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("dpo")
    return trainer("DPO", folder, prompt=["5 6"] * 4, chosen=["7 8"] * 4, rejected=["9 10"] * 4)


@pytest.fixture(scope="module")
def kto(tmp_path_factory: pytest.TempPathFactory) -> Any:
    labels = [True, False, True, False]
    return trainer(
        "KTO",
        tmp_path_factory.mktemp("kto"),
        prompt=["5 6"] * 4,
        completion=["7", "8", "9", "10"],
        label=labels,
    )


def theirs(trainer: Any, inputs: dict[str, Any]) -> tuple[float, Gradients, dict[str, float]]:
    model = trainer.model
    model.zero_grad()
    model.train()
    trainer._metrics["train"].clear()
    loss = trainer._compute_loss(model, inputs, False)
    loss.backward()
    return float(loss.detach()), gradients(model), {k: v[0] for k, v in trainer._metrics["train"].items()}


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence"])
@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "sft"])
def test_dpo_and_its_relatives_equal_trl(
    loss: Any, divergence: Any, dpo: Any, model: nn.Module, reference: Tensor
) -> None:
    smoothing = 0.1 if loss in SMOOTHED - {"sigmoid"} else 0.0
    given = {"beta": 0.3, "loss_type": loss, "label_smoothing": smoothing, "f_divergence_type": divergence}
    try:
        settings = DpoSettings(**given)
    except ConfigError:
        assert divergence != "reverse_kl" and loss not in BY_DIFFERENCE
        return
    mine, grads, parts = ours(model, DpoObjective(model, settings), pair_batch(PAIRS, 0, reference))
    dpo.beta, dpo.loss_types, dpo.loss_weights = 0.3, [loss], [1.0]
    dpo.label_smoothing, dpo.f_divergence_type = smoothing, divergence
    known = {"ref_chosen_logps": reference[:, 0], "ref_rejected_logps": reference[:, 1]}
    loss_of_trl, expected, metrics = theirs(dpo, for_trl([*texts(0), *texts(1)]) | known)
    assert mine == pytest.approx(loss_of_trl, rel=1e-5)
    assert equal(grads, expected)
    assert parts.target_tokens == 3
    assert {key: metrics[key] for key in parts.metrics} == pytest.approx(parts.metrics, rel=1e-4)


def test_several_losses_are_added_with_their_weights(dpo: Any, model: nn.Module, reference: Tensor) -> None:
    """The term of imitation is a mean over pairs of means over tokens; TRL's is over the tokens of a batch,
    which is the same for one pair."""
    settings = DpoSettings(loss_type=("sigmoid", "sft"), loss_weights=(1.0, 0.5))
    batch = pair_batch(PAIRS[:1], 0, reference[:1])
    mine, grads, _ = ours(model, DpoObjective(model, settings), batch)
    dpo.beta, dpo.loss_types, dpo.loss_weights = 0.1, ["sigmoid", "sft"], [1.0, 0.5]
    dpo.label_smoothing, dpo.f_divergence_type = 0.0, "reverse_kl"
    known = {"ref_chosen_logps": reference[:1, 0], "ref_rejected_logps": reference[:1, 1]}
    loss, expected, _ = theirs(dpo, for_trl([texts(0)[0], texts(1)[0]]) | known)
    assert mine == pytest.approx(loss, rel=1e-5)
    assert equal(grads, expected)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_kto_equals_trl(loss: Any, kto: Any, model: nn.Module, reference: Tensor) -> None:
    """With the same answers of other rows. In the paper's words z is their mean, at least 0."""
    known = reference.flip(0)
    settings = KtoSettings(beta=0.3, loss_type=loss, desirable_weight=1.2, undesirable_weight=0.7)
    mine, grads, parts = ours(model, KtoObjective(model, settings), marked_batch(MARKED, 0, known))
    kto.beta, kto.loss_type, kto.calculate_KL = 0.3, loss, loss == "kto"
    kto.desirable_weight, kto.undesirable_weight = 1.2, 0.7
    own = for_trl([(row.branched.prompt, row.branched.answers[0]) for row in MARKED])
    other = for_trl([(row.branched.prompt, row.branched.answers[1]) for row in MARKED])
    inputs = {
        **own,
        **{f"KL_{name}": value for name, value in other.items()},
        "label": torch.tensor([row.is_good for row in MARKED]),
        "ref_logps": known[:, 0],
        "ref_KL_logps": known[:, 1],
    }
    loss_of_trl, expected, metrics = theirs(kto, inputs)
    assert mine == pytest.approx(loss_of_trl, rel=1e-5)
    assert equal(grads, expected)
    assert parts.metrics["kl"] == pytest.approx(metrics["kl"], rel=1e-4)
    assert (parts.metrics["kl"] > 0) == (loss == "kto")
    assert parts.metrics["rewards/margins"] == pytest.approx(metrics["rewards/margins"], rel=1e-4)


def means(model: nn.Module, answer: int) -> Tensor:
    """Mean log-probabilities of one side, by the plain model."""
    inputs = for_trl(texts(answer))
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    known = logits.log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None])[..., 0]
    mask = inputs["completion_mask"][:, 1:]
    found: Tensor = (known * mask).sum(1) / mask.sum(1)
    return found


def expected_of(model: nn.Module, losses: Tensor) -> tuple[float, Gradients]:
    model.zero_grad()
    losses.mean().backward()
    return float(losses.mean().detach()), gradients(model)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_equals_trl(smoothing: float, model: nn.Module) -> None:
    cpo = pytest.importorskip("trl.experimental.cpo")
    settings = SimpoSettings(beta=2.5, simpo_gamma=1.4, label_smoothing=smoothing, cpo_alpha=0.3)
    mine, grads, parts = ours(model, SimpoObjective(model, settings), pair_batch(PAIRS, 0))
    trainer = SimpleNamespace(
        alpha=0.0, beta=2.5, simpo_gamma=1.4, loss_type="simpo", label_smoothing=smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    chosen, rejected = means(model, 0), means(model, 1)
    losses, rewards, _ = cpo.CPOTrainer.cpo_loss(trainer, chosen, rejected)
    loss, expected = expected_of(model, losses - 0.3 * chosen)
    assert mine == pytest.approx(loss, rel=1e-5)
    assert equal(grads, expected)
    assert parts.metrics["rewards/chosen"] == pytest.approx(float(rewards.mean()), rel=1e-5)


def test_orpo_equals_trl_and_imitates_the_answer_alone(model: nn.Module) -> None:
    """The odds ratio is TRL's. The other term is over the answer, as in the paper; TRL has the prompt too."""
    orpo = pytest.importorskip("trl.experimental.orpo")
    mine, grads, _ = ours(model, OrpoObjective(model, OrpoSettings(beta=0.25)), pair_batch(PAIRS, 0))
    trainer = SimpleNamespace(beta=0.25, accelerator=SimpleNamespace(device="cpu"))
    chosen, rejected = means(model, 0), means(model, 1)
    ratio = orpo.ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]
    loss, expected = expected_of(model, -chosen - ratio)
    assert mine == pytest.approx(loss, rel=1e-5)
    assert equal(grads, expected)


def test_papers_in_float64(reference: Tensor) -> None:
    """DPO equation 7, conservative DPO, IPO equation 17 per token, SimPO equation 6, ORPO equations 4-7."""
    model, known = made(torch.float64), reference.double()
    chosen, rejected = means(model, 0), means(model, 1)
    lengths = torch.tensor([[float(len(answer)) for answer in row.answers] for row in PAIRS]).double()
    ratios = torch.stack([chosen, rejected], 1) * lengths - known
    logits = 0.1 * (ratios[:, 0] - ratios[:, 1])
    per_token = ratios / lengths
    odds = [torch.log(p / (1 - p)) for p in (chosen.exp(), rejected.exp())]
    cases: list[tuple[Any, Tensor]] = [
        (DpoObjective(model, DpoSettings()), -torch.log(torch.sigmoid(logits))),
        (
            DpoObjective(model, DpoSettings(label_smoothing=0.2)),
            -0.8 * torch.log(torch.sigmoid(logits)) - 0.2 * torch.log(torch.sigmoid(-logits)),
        ),
        (DpoObjective(model, IpoSettings()), (per_token[:, 0] - per_token[:, 1] - 5) ** 2),
        (
            SimpoObjective(model, SimpoSettings(beta=2.0, simpo_gamma=0.5)),
            -torch.log(torch.sigmoid(2 * chosen - 2 * rejected - 0.5)),
        ),
        (
            OrpoObjective(model, OrpoSettings(beta=0.1)),
            -chosen - 0.1 * torch.log(torch.sigmoid(odds[0] - odds[1])),
        ),
    ]
    for objective, losses in cases:
        mine, grads, _ = ours(model, objective, pair_batch(PAIRS, 0, known))
        model.zero_grad()
        losses.mean().backward(retain_graph=True)
        assert mine == pytest.approx(float(losses.mean().detach()), rel=1e-10), objective
        assert equal(grads, gradients(model)), "norms and angles of positions are in float32"


def test_before_the_first_step_a_policy_is_its_own_reference(model: nn.Module) -> None:
    """Dropout of the base does not move it: nothing has been learnt."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=80,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.5,
        attn_pdrop=0.5,
        bos_token_id=1,
        eos_token_id=2,
    )
    gpt2 = transformers.GPT2LMHeadModel(config).train()
    attach(gpt2, LoraConfig(r=4), storage=FOLDER)
    objective = DpoObjective(gpt2, DpoSettings())
    once = objective(gpt2, pair_batch(PAIRS, 0))
    assert float(once.loss_sum.detach()) == pytest.approx(3 * math.log(2), rel=1e-6)
    assert once.metrics["rewards/accuracies"] == 0.5
    assert torch.equal(once.loss_sum, objective(gpt2, pair_batch(PAIRS, 0)).loss_sum)
    mine = KtoObjective(model, KtoSettings())(model, marked_batch(MARKED, 0))
    assert float(mine.loss_sum.detach()) == pytest.approx(1.5, rel=1e-6)


def test_odds_of_a_certain_answer_have_a_gradient() -> None:
    at = torch.tensor([0.0, -1e-9, -30.0], requires_grad=True)
    odds = log_odds(at)
    odds.sum().backward()
    assert odds.isfinite().all() and at.grad is not None and at.grad.isfinite().all()
    assert float(odds[2].detach()) == pytest.approx(-30, rel=1e-6)


@pytest.mark.parametrize("length", [1, 5, 64])
def test_probes_have_a_gradient(length: int, model: nn.Module) -> None:
    for objective in (DpoObjective(model, DpoSettings()), KtoObjective(model, KtoSettings())):
        batch: Any = objective.probe(length)
        assert batch.real_tokens == max(length, 4)
        assert ours(copy.deepcopy(model), objective, batch)[1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"beta": 0}, "beta"),
        ({"loss_type": "sigmod"}, "loss_type"),
        ({"loss_type": ()}, "loss_type is empty"),
        ({"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0,)}, "1 numbers for 2 loss types"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing has no effect"),
        ({"loss_type": "exo_pair"}, "needs label_smoothing"),
        ({"loss_type": "apo_zero", "f_divergence_type": "forward_kl"}, "not defined for apo_zero"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"pref_beta": 0.1}, "did you mean 'beta'"),
    ],
)
def test_wrong_settings_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        DpoSettings(**given)
    assert said in str(error.value)


def test_the_smoothed_loss_is_a_mean_of_both_labels() -> None:
    logits = torch.tensor([0.3, -2.0])
    both = 0.9 * -F.logsigmoid(logits) + 0.1 * -F.logsigmoid(-logits)
    assert torch.allclose(smoothed(logits, 0.1), both)
