"""Prefix tuning against its definition: a prefix made of real tokens is those tokens, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from graftlm.core.errors import ConfigError, ModelError, TargetError
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.prefix import PrefixTuningConfig
from graftlm.methods.virtual.real_prefix import real_states
from graftlm.methods.virtual.stacks import key_values, stack_path, task_of
from graftlm.models.load import load_model
from graftlm.models.sprout import sprout_folder

from .tiny import KINDS, batch, graft, logits, stir, tiny

DECODERS = ("llama", "gpt2", "gemma3")
TEXT = torch.tensor([5, 9, 31, 7])
CONFIG = PrefixTuningConfig(num_virtual_tokens=4)


def part_of(adapters: AdapterSet, name: str = "default") -> Any:
    """The one part that an adapter of a whole stack has."""
    (part,) = adapters.parts(name).values()
    return part


def with_prefix_of_text(kind: str) -> Any:
    model = tiny(kind).double()
    adapters = graft(model, CONFIG, dtype="base")
    part = part_of(adapters)
    stack = model.get_submodule(stack_path(model, "backbone"))
    states = real_states(stack, TEXT, key_values(model, stack))
    with torch.no_grad():
        part.prompt_embeddings.copy_(part.slots.filled(states.double()))
    return model


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", DECODERS)
@torch.no_grad()
def test_a_prefix_made_of_tokens_is_those_tokens(kind: str, side: str) -> None:
    model, base = with_prefix_of_text(kind), tiny(kind).double()
    inputs = batch(kind)
    for row, missing in enumerate((3, 0, 1)):
        inputs["attention_mask"][row, slice(missing) if side == "left" else slice(7 - missing, None)] = 0
    found = logits(model, inputs)
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        ids = torch.cat((TEXT, inputs["input_ids"][row][mask]))
        expected = base(ids.unsqueeze(0)).logits[0, len(TEXT) :]
        torch.testing.assert_close(found[row][mask], expected, rtol=0, atol=1e-6)  # states pass float32


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", DECODERS)
def test_it_continues_text_as_the_base_continues_both(kind: str, beams: int) -> None:
    model, base = with_prefix_of_text(kind), tiny(kind).double()
    ids = batch(kind)["input_ids"]
    padded = torch.cat((torch.zeros(3, 2, dtype=torch.long), ids), 1)
    mask = torch.cat((torch.zeros(3, 2, dtype=torch.long), torch.ones_like(ids)), 1)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    found = model.generate(padded, attention_mask=mask, **options)
    together = torch.cat((TEXT.expand(3, -1), ids), 1)
    expected = base.generate(together, attention_mask=torch.ones_like(together), **options)
    assert torch.equal(found[:, 9:], expected[:, 11:])


def test_a_text_is_a_prefix_to_begin_with() -> None:
    model, tokenizer = load_model("sprout", dtype="float32")
    ids = torch.tensor([tokenizer("Answer briefly: ")["input_ids"]])
    config = PrefixTuningConfig(
        num_virtual_tokens=ids.shape[1],
        init_weights="text",
        init_text="Answer briefly: ",
        tokenizer_name_or_path=str(sprout_folder()),
    )
    question = torch.tensor([tokenizer("What is the capital of France?")["input_ids"]])
    expected = logits(model, {"input_ids": torch.cat((ids, question), 1)})[:, ids.shape[1] :]
    adapters = graft(model, config)
    torch.testing.assert_close(logits(model, {"input_ids": question}), expected, rtol=0, atol=1e-3)
    adapters.add("projected", config.replace(prefix_projection=True))
    adapters.activate("projected")
    torch.testing.assert_close(logits(model, {"input_ids": question}), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_a_projection_is_folded_into_the_file_and_training_goes_on_from_it(kind: str) -> None:
    model = tiny(kind)
    config = CONFIG.replace(prefix_projection=True, encoder_hidden_size=24)
    adapters = graft(model, config)
    stir(adapters)
    part = part_of(adapters)
    assert set(part.saved()) == {"prompt_embeddings"}
    portable: Any = adapters.config("default").portable()
    assert not portable.prefix_projection
    adapters.add("plain", CONFIG)
    adapters.add("again", config)
    for name in ("plain", "again"):
        other = part_of(adapters, name)
        other.load_saved(part.saved())
    expected = logits(model, batch(kind))
    for name in ("plain", "again"):
        with adapters.activated(name):
            torch.testing.assert_close(logits(model, batch(kind)), expected, rtol=0, atol=1e-6)
    adapters.activate("again")
    adapters.train_only("again")
    model(**batch(kind)).loss.backward()
    other = part_of(adapters, "again")
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in other.parameters())


def test_zeros_draw_attention_and_say_nothing() -> None:
    model = tiny("llama")
    adapters = graft(model, CONFIG.replace(init_weights="zero"))
    part = part_of(adapters)
    assert not part.states().any()
    assert torch.isfinite(logits(model, batch("llama"))).all()


def test_random_numbers_are_those_that_an_embedding_begins_with() -> None:
    torch.manual_seed(3)
    expected = torch.nn.Embedding(4, 2 * 2 * 2 * 8).weight
    model = tiny("llama")
    torch.manual_seed(3)
    assert torch.equal(next(graft(model, CONFIG).parameters("default")), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_its_shape_follows_the_keys_of_the_model(kind: str) -> None:
    part = part_of(graft(tiny(kind), CONFIG))
    heads = 2 if kind in ("llama", "llama-tied", "gemma3") else 4
    assert part.states().shape == (1 if kind == "bart" else 2, 2, heads, 4, 8)


def test_layers_of_an_encoder_decoder_share_a_prefix_in_pairs_unless_told() -> None:
    def states(submodules: int | None) -> Tensor:
        config = CONFIG.replace(num_transformer_submodules=submodules)
        adapters = graft(tiny("t5", num_layers=4, num_decoder_layers=4), config)
        part = part_of(adapters)
        assert part.states().shape[0] == 4
        found: Tensor = part.states()
        return found

    shared, own = states(None), states(1)
    assert torch.equal(shared[0], shared[2]) and torch.equal(shared[1], shared[3])
    assert not torch.equal(shared[0], shared[1])
    assert len({tuple(layer.flatten().tolist()) for layer in own}) == 4


def test_a_config_for_another_model_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(TargetError, match="num_layers: 3, but the model has 2"):
        graft(model, CONFIG.replace(num_layers=3, token_dim=64))
    with pytest.raises(ConfigError, match="belong together"):
        PrefixTuningConfig(init_weights="text")
    with pytest.raises(TargetError, match="reads tokens"):
        graft(torch.nn.Sequential(torch.nn.Linear(2, 2)), CONFIG)
    assert not hasattr(model, "graft_adapters")


def test_keys_of_another_shape_than_the_config_says_are_refused() -> None:
    config = transformers.FalconConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, multi_query=True
    )
    model = transformers.FalconForCausalLM(config).eval()
    graft(model, CONFIG)
    with pytest.raises(
        ModelError, match="The prefix has 4 heads of 8 numbers, the keys of this layer 1 of 8"
    ):
        model(batch("llama")["input_ids"])


def test_tasks_are_told_by_the_class_of_the_model() -> None:
    tasks = {kind: task_of(tiny(kind)) for kind in ("llama", "gpt2", "bert", "t5", "bart")}
    assert tasks == {
        **dict.fromkeys(("llama", "gpt2"), "CAUSAL_LM"),
        **dict.fromkeys(("t5", "bart"), "SEQ_2_SEQ_LM"),
        "bert": "SEQ_CLS",
    }
    assert task_of(tiny("llama").base_model) == "FEATURE_EXTRACTION"
