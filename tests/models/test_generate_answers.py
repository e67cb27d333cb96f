"""Encoder-decoders write the same alone, in batches and through any adapter as step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from graftlm.core.errors import ModelError
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.base import MethodConfig
from graftlm.methods.bottleneck import BottleneckConfig
from graftlm.methods.ia3 import IA3Config
from graftlm.methods.lora import LoraConfig
from graftlm.methods.prefix import PrefixTuningConfig
from graftlm.methods.prompt import PromptTuningConfig
from graftlm.models.encoder_decoder import require_encoder_decoder, start_token
from graftlm.models.generate import Sampling
from graftlm.models.generate_answers import generate_answers
from graftlm.testing.models import tiny

SOURCES = [[5, 9, 3], [7], [4, 4, 8, 11, 20, 13, 40], [6, 5, 30, 31]]
METHODS: dict[str, MethodConfig | None] = {
    "none": None,
    "lora": LoraConfig(r=4, target_modules="all-linear"),
    "ia3": IA3Config(),
    "bottleneck": BottleneckConfig(),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
    "prompt": PromptTuningConfig(num_virtual_tokens=3),
}


def made(kind: str, method: str = "none") -> Any:
    """A model whose likeliest token is never nearly tied, with an adapter that does something."""
    model = tiny(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4)
    config = METHODS[method]
    if config is not None:
        adapters = attach(model, config, storage=FOLDER)
        for parameter in adapters.named_parameters("default").values():
            nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def step_by_step(model: Any, source: list[int], count: int) -> list[int]:
    """Greedy, one whole pass through both halves for each token, without a cache."""
    ids, read = torch.tensor([source]), [start_token(model)]
    mask = torch.ones_like(ids)
    for _ in range(count):
        logits = model(
            input_ids=ids, attention_mask=mask, decoder_input_ids=torch.tensor([read]), use_cache=False
        ).logits
        read.append(int(logits[0, -1].argmax()))
    return [int(token) for token in read[1:] if token is not None]


@pytest.mark.parametrize("kind", ["bart", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_greedy(kind: str, method: str) -> None:
    model = made(kind, method)
    found = generate_answers(model, SOURCES, max_new_tokens=8, stop_ids=[], rows_per_batch=3)
    assert [list(answer.token_ids) for answer in found] == [step_by_step(model, row, 8) for row in SOURCES]
    assert {answer.finish for answer in found} == {"length"}


def test_an_end_token_ends() -> None:
    model = made("bart")
    whole = generate_answers(model, SOURCES, max_new_tokens=8, stop_ids=[])
    end = whole[0].token_ids[3]
    found = generate_answers(model, SOURCES, max_new_tokens=8, stop_ids=[end])
    place = whole[0].token_ids.index(end)
    assert (found[0].token_ids, found[0].finish, found[0].end_id) == (whole[0].token_ids[:place], "end", end)


def test_beams_are_never_less_likely() -> None:
    model = made("t5")

    @torch.no_grad()
    def score(source: list[int], answer: tuple[int, ...]) -> float:
        read = torch.tensor([[start_token(model), *answer[:-1]]])
        logits = model(input_ids=torch.tensor([source]), decoder_input_ids=read).logits[0]
        return float(logits.log_softmax(-1).gather(1, torch.tensor(answer).unsqueeze(1)).sum())

    greedy = generate_answers(model, SOURCES, max_new_tokens=4, stop_ids=[])
    beams = generate_answers(model, SOURCES, max_new_tokens=4, stop_ids=[], num_beams=8)
    ours = [score(source, answer.token_ids) for source, answer in zip(SOURCES, beams, strict=True)]
    theirs = [score(source, answer.token_ids) for source, answer in zip(SOURCES, greedy, strict=True)]
    assert sum(ours) > sum(theirs)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_beams_with_virtual_tokens(method: str) -> None:
    """A beam search reorders the cache; virtual tokens belong to all beams alike."""
    model = made("bart", method)
    together = generate_answers(model, SOURCES, max_new_tokens=5, stop_ids=[], num_beams=3)
    alone = [generate_answers(model, [row], max_new_tokens=5, stop_ids=[], num_beams=3)[0] for row in SOURCES]
    assert together == alone


def test_sampling_depends_on_its_seed_alone() -> None:
    model = made("bart")
    state = torch.get_rng_state()
    first = generate_answers(model, SOURCES, max_new_tokens=8, stop_ids=[], sampling=Sampling(seed=4))
    assert torch.equal(state, torch.get_rng_state())
    again = generate_answers(model, SOURCES, max_new_tokens=8, stop_ids=[], sampling=Sampling(seed=4))
    other = generate_answers(model, SOURCES, max_new_tokens=8, stop_ids=[], sampling=Sampling(seed=5))
    assert first == again != other


def test_no_answer_beyond_the_context() -> None:
    model = made("bart")
    found = generate_answers(model, SOURCES[:1], max_new_tokens=100, stop_ids=[])[0]
    assert (len(found.token_ids), found.finish) == (63, "context")


def test_a_stop_is_heard() -> None:
    found = generate_answers(
        made("bart"), SOURCES, max_new_tokens=2, stop_ids=[], rows_per_batch=2, should_stop=lambda: True
    )
    assert {answer.finish for answer in found} == {"cancelled"}


def test_what_is_refused() -> None:
    model = made("bart")
    with pytest.raises(ModelError, match="Source 1 is empty"):
        generate_answers(model, [[3], []], max_new_tokens=2, stop_ids=[])
    with pytest.raises(ModelError, match="65 tokens; the model's context is 64"):
        generate_answers(model, [[3] * 65], max_new_tokens=2, stop_ids=[])
    with pytest.raises(ModelError, match="no encoder-decoder"):
        generate_answers(tiny("llama"), SOURCES, max_new_tokens=2, stop_ids=[])
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(ModelError, match="does not say what its decoder starts with"):
        require_encoder_decoder(model)
