"""Groups of answers: the likeliest tokens are those of `generate`; draws have the model's distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.base import MethodConfig
from graftlm.methods.lora import LoraConfig
from graftlm.methods.prefix import PrefixTuningConfig
from graftlm.methods.prompt import PromptTuningConfig
from graftlm.models.fusing.fused import fusable, fused
from graftlm.models.generate import Generated, Sampling, generate_ids
from graftlm.models.generate_groups import GroupWriter, _chosen, _written

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
PROMPTS = [[5, 9, 11, 30, 3], [7, 8], [1], [4, 4, 12, 13]]


def model(kind: str = "Llama") -> Any:
    torch.manual_seed(3)
    if kind == "GPT2":
        config = transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        made: Any = transformers.GPT2LMHeadModel(config)
    else:
        config = getattr(transformers, f"{kind}Config")(**SIZES, initializer_range=0.3)
        made = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2)
    return made.eval()


def never() -> bool:
    return False


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Qwen3", "Gemma2", "Mistral"])
def test_likeliest_tokens_are_those_of_generate(kind: str) -> None:
    made = model(kind)
    assert GroupWriter(made).why == ""
    expected = generate_ids(made, PROMPTS, max_new_tokens=9, stop_ids=(6, 17))
    found = _written(made, PROMPTS, 3, 9, frozenset((6, 17)), None)
    for place, each in enumerate(expected):
        whole = [*each.token_ids, *([each.end_id] if each.end_id is not None else [])]
        assert found[3 * place : 3 * place + 3] == [whole] * 3


@pytest.mark.parametrize("config", [
    LoraConfig(r=2, init_lora_weights=False), PrefixTuningConfig(num_virtual_tokens=3),
    PromptTuningConfig(num_virtual_tokens=3),
], ids=lambda each: each.peft_type)  # fmt: skip
def test_with_adapters_as_they_are_trained(config: MethodConfig) -> None:
    made = model()
    attach(made, config, storage=FOLDER)
    expected = generate_ids(made, PROMPTS, max_new_tokens=6, stop_ids=())
    with fused(fusable(made)):
        assert GroupWriter(made).why == ""
        found = _written(made, PROMPTS, 1, 6, frozenset(), None)
    assert found == [list(each.token_ids) for each in expected]


def test_draws_have_the_distribution_of_the_model() -> None:
    """By the exact probabilities of the first two tokens, over many draws (chi-square)."""
    made, count = model(), 6000
    writer = GroupWriter(made)
    drawn = writer([[5, 9]], count, max_new_tokens=2, stop_ids=(), sampling=Sampling(1.5, 1.0, seed=1),
                   rows_per_batch=count, should_stop=never)  # fmt: skip
    with torch.no_grad():
        first = (made(torch.tensor([[5, 9]])).logits[0, -1] / 1.5).softmax(-1)
        second = (made(torch.tensor([[5, 9, t] for t in range(40)])).logits[:, -1] / 1.5).softmax(-1)
    expected = (first[:, None] * second).flatten() * count
    seen = torch.zeros(1600).index_add_(
        0, torch.tensor([40 * a + b for a, b in (each.token_ids for each in drawn)]), torch.ones(count)
    )
    common = expected >= 5
    terms = ((seen - expected) ** 2 / expected)[common]
    assert float(terms.sum()) < len(terms) + 5 * (2 * len(terms)) ** 0.5


def test_top_p_keeps_the_likeliest() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(2000, 4)
    torch.manual_seed(0)
    assert set(_chosen(logits, Sampling(1.0, 0.75)).tolist()) == {0, 1}
    assert set(_chosen(logits, Sampling(1.0, 0.1)).tolist()) == {0}


def test_the_seed_fixes_the_draw_and_nothing_else_moves() -> None:
    made = model()
    writer, state = GroupWriter(made), torch.get_rng_state()

    def draw(seed: int) -> list[Generated]:
        return writer(PROMPTS, 4, max_new_tokens=8, stop_ids=(6,), sampling=Sampling(1.0, 1.0, seed),
                      rows_per_batch=8, should_stop=never)  # fmt: skip

    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(draw(1)) == 16 and len({each.token_ids for each in draw(1)[:4]}) > 1


def test_stopped_and_out_of_room() -> None:
    made = model()
    writer = GroupWriter(made)
    how: dict[str, Any] = {"stop_ids": (), "sampling": Sampling(), "rows_per_batch": 8}
    stopped = writer(PROMPTS, 2, max_new_tokens=4, should_stop=lambda: True, **how)
    assert {each.finish for each in stopped} == {"cancelled"} and len(stopped) == 8
    long = writer([[5] * 60], 2, max_new_tokens=8, should_stop=never, **how)
    assert [(each.finish, len(each.token_ids)) for each in long] == [("context", 4)] * 2


def test_a_model_with_another_memory_is_left_to_generate() -> None:
    torch.manual_seed(3)
    config = transformers.MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, state_size=4)
    made = transformers.MambaForCausalLM(config).eval()
    writer = GroupWriter(made)
    assert writer.why
    found = writer(PROMPTS, 2, max_new_tokens=3, stop_ids=(), sampling=Sampling(), rows_per_batch=8,
                   should_stop=never)  # fmt: skip
    assert [len(each.token_ids) for each in found] == [3] * 8
