"""PPO against its definition in float64: values, advantages, clipped losses and their gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn

from graftlm.data.branches import Branched, branch_batch
from graftlm.objectives.advantages import generalised_advantages
from graftlm.objectives.policy_settings import PpoSettings
from graftlm.objectives.ppo import VALUE_HEAD, PpoBatch, PpoObjective, ValueHead

PROMPT, ANSWERS = (5, 9, 11, 40, 3), ((17, 30, 2), (19, 44, 45, 46, 2))
SETTINGS = PpoSettings(temperature=0.8, vf_coef=0.3, cliprange=0.1, cliprange_value=0.15)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(4)
    made = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.2,
        )
    )  # fmt: skip
    head = ValueHead(32, torch.device("cpu"))
    nn.init.normal_(head.weight, std=0.3)
    nn.init.constant_(head.bias, 0.2)
    made.add_module(VALUE_HEAD, head)
    return made


def drawn(seed: int, scale: float) -> Tensor:
    return scale * torch.randn(8, generator=torch.Generator().manual_seed(seed))


def by_definition(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Log-probabilities at the temperature, and values, of every token of every answer, one by one."""
    known, values = [], []
    for answer in ANSWERS:
        ids = torch.tensor([[*PROMPT, *answer]])
        hidden = model.model(input_ids=ids).last_hidden_state[0]  # type: ignore[union-attr, operator]
        at = hidden[len(PROMPT) - 1 : -1]
        logits = model.lm_head(at) / SETTINGS.temperature  # type: ignore[operator]
        known.append(logits.log_softmax(-1).gather(1, ids[0, len(PROMPT) :, None])[:, 0])
        head = model.get_submodule(VALUE_HEAD)
        values.append(at @ head.weight + head.bias)  # type: ignore[operator]
    return torch.cat(known), torch.cat(values)


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.float64, 1e-6)], ids=str)
def test_loss_and_gradients_are_the_definition(model: nn.Module, dtype: torch.dtype, near: float) -> None:
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        known, values = by_definition(exact)
    old, old_values = known + drawn(1, 0.2).double(), values + drawn(2, 0.2).double()
    advantages, returns = drawn(3, 1.0).double(), drawn(4, 1.0).double()
    new, value = by_definition(exact)
    ratio = (new - old).exp()
    policy = torch.maximum(-ratio * advantages, -ratio.clamp(0.9, 1.1) * advantages)
    near_old = torch.maximum(torch.minimum(value, old_values + 0.15), old_values - 0.15)
    errors = torch.maximum((value - returns) ** 2, (near_old - returns) ** 2) / 2
    expected = (policy + 0.3 * errors).mean()
    expected.backward()

    ours = copy.deepcopy(model).to(dtype)
    plain = branch_batch([Branched(PROMPT, ANSWERS, 1, False)], 0)
    batch = PpoBatch(
        **vars(plain), old_log_probs=old, old_values=old_values, advantages=advantages, returns=returns
    )
    parts = PpoObjective(ours, SETTINGS)(ours, batch)
    (parts.loss_sum / parts.target_tokens).backward()
    assert float(parts.loss_sum.detach()) / parts.target_tokens == pytest.approx(
        float(expected.detach()), rel=near
    )
    for (name, mine), theirs in zip(ours.named_parameters(), exact.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None, name
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=10 * near, atol=near, msg=name)
    assert parts.metrics["loss/value"] == pytest.approx(float(errors.detach().mean()), rel=near)
    clipped = ((ratio > 1.1) & (advantages > 0)) | ((ratio < 0.9) & (advantages < 0))
    assert parts.metrics["clip_ratio/region_mean"] == pytest.approx(float(clipped.double().mean()))


def test_generalised_advantages_are_the_sum_of_the_paper() -> None:
    """A_t is the sum over k of (gamma * lambda)^k * delta_(t + k), answer by answer."""
    gamma, lam, lengths = 0.9, 0.7, [3, 5]
    rewards, values = drawn(5, 1.0).double(), drawn(6, 1.0).double()
    found = generalised_advantages(rewards, values, lengths, gamma=gamma, lam=lam)
    start = 0
    for length in lengths:
        r, v = rewards[start : start + length], [*values[start : start + length].tolist(), 0.0]
        deltas = [float(r[t]) + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t))
            assert float(found[start + t]) == pytest.approx(expected, rel=1e-12)
        start += length


def test_a_fresh_value_head_expects_nothing(model: nn.Module) -> None:
    assert ValueHead(4, torch.device("cpu"))(torch.ones(3, 4)).tolist() == [0.0, 0.0, 0.0]
