"""Log-probabilities of answers behind a shared prompt: what every answer gives alone, in every form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from graftlm.core.errors import ModelError
from graftlm.data.branches import Branched, branch_batch
from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.base import MethodConfig
from graftlm.methods.lora import LoraConfig
from graftlm.methods.prefix import PrefixTuningConfig
from graftlm.methods.prompt import PromptTuningConfig
from graftlm.models.fusing.attention import attention_layers
from graftlm.models.fusing.last_rows import last_layer
from graftlm.objectives.log_probs import AnswerLogProbs, Answers
from graftlm.quant.embedding import quantise_embeddings
from graftlm.testing.models import tiny

VOCABULARY = 80
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
PLAIN = {key: value for key, value in SIZES.items() if key != "head_dim"}
MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES),
    "llama, tied": ("Llama", {**SIZES, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", SIZES),
    "mistral, sliding": ("Mistral", {**SIZES, "sliding_window": 8}),
    "gpt2": ("GPT2", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "phi, bias in the head": ("Phi", PLAIN),
    "opt": ("OPT", {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "word_embed_proj_dim": 32}),
    "bloom, positions in the mask": ("Bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2,
                                               "n_head": 4}),
    "mamba, recurrent": ("Mamba", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
                                   "state_size": 4}),
    "gemma2, capped logits": ("Gemma2", {**SIZES, "query_pre_attn_scalar": 8, "sliding_window": 128}),
    "granite, scaled logits": ("Granite", {**SIZES, "logits_scaling": 4.0}),
}  # fmt: skip
CLASSES = {"GPT2": "GPT2LMHeadModel"}
NOT_SDPA = {"bloom, positions in the mask", "mamba, recurrent", "gemma2, capped logits"}
ALONE = {"bloom, positions in the mask", "mamba, recurrent"}
FULL = {"gemma2, capped logits", "granite, scaled logits"}
LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)


def make(kind: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa") -> Any:
    family, sizes = MADE[kind]
    torch.manual_seed(3)
    if kind in NOT_SDPA:
        attention = "eager"
    config = getattr(transformers, f"{family}Config")(**sizes, attn_implementation=attention)
    for name in vars(config):
        if "dropout" in name or name.endswith("_pdrop"):
            setattr(config, name, 0.0)
    model = getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))(config)
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)  # large enough for attention to matter
    return model.to(dtype).requires_grad_(False)


def rows() -> list[Branched]:
    """One, two and three answers; one is empty, one as short as can be."""
    draw = torch.Generator().manual_seed(4)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, VOCABULARY, (count,), generator=draw).tolist())

    lengths = [(6, (4, 9)), (1, (3,)), (11, (1, 0, 7)), (3, (5, 5))]
    return [
        Branched(tokens(prompt), tuple(map(tokens, answers)), row, truncated=False)
        for row, (prompt, answers) in enumerate(lengths, start=1)
    ]


def alone(model: Any, temperature: float = 1.0) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Each answer behind its prompt, by the model's own logits."""
    log_probs, entropies, lengths = [], [], []
    for row in rows():
        for answer in row.answers:
            ids = torch.tensor([[*row.prompt, *answer]])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(row.prompt) - 1 : -1]
            known = (logits / temperature).log_softmax(-1)
            log_probs.append(known.gather(1, ids[0, len(row.prompt) :].unsqueeze(1)).squeeze(1))
            entropies.append(-(known.exp() * known).sum(-1).detach())
            lengths.append(len(answer))
    return torch.cat(log_probs), torch.cat(entropies), tuple(lengths)


@contextmanager
def in_form(model: Any, form: str) -> Iterator[None]:
    """`masked`: the model's own attention; `flat`: Graft's, where this model takes it."""
    if form == "masked":
        yield
        return
    layers, last = attention_layers(model), last_layer(model)
    if layers.why:
        pytest.skip(layers.why)
    with layers.in_use(), last.in_use():
        yield


def gradients(model: Any, log_probs: Tensor) -> list[Tensor]:
    """With another weight for each token, as policies have it. Adapters are float32 in every model."""
    weights = torch.linspace(-1.0, 2.0, len(log_probs), dtype=log_probs.dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad((weights * log_probs).sum(), trained, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def expect_same(model: Any, near: float = 1e-9, temperature: float = 1.0) -> Answers:
    expected, entropies, lengths = alone(model, temperature)
    wanted = gradients(model, expected)
    found = AnswerLogProbs(model)(
        model, branch_batch(rows(), 0), temperature=temperature, with_entropy=True, with_hidden=True
    )
    assert found.lengths == lengths and found.entropy is not None and found.hidden is not None
    assert found.hidden.shape == (len(expected), 32)
    torch.testing.assert_close(found.log_probs, expected, rtol=near, atol=near, check_dtype=False)
    torch.testing.assert_close(found.entropy, entropies, rtol=near, atol=near, check_dtype=False)
    for mine, its in zip(gradients(model, found.log_probs), wanted, strict=True):
        assert (mine - its).norm() <= max(20 * near, 1e-6) * its.norm().clamp_min(1e-3)
    return found


@pytest.mark.parametrize("form", ["masked", "flat"])
@pytest.mark.parametrize("kind", MADE)
def test_the_same_as_every_answer_alone(kind: str, form: str) -> None:
    model = make(kind)
    attach(model, LORA, storage=FOLDER)
    objective = AnswerLogProbs(model)
    assert (objective.path == "full logits") is (kind in FULL)
    assert ("for each answer" in objective.why) is (kind in ALONE)
    with in_form(model, form):
        expect_same(model, near=1e-5 if kind in NOT_SDPA else 1e-9)  # their softmax is in float32


@pytest.mark.parametrize("form", ["masked", "flat"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "granite, scaled logits"])
def test_temperature(kind: str, form: str) -> None:
    model = make(kind)
    attach(model, LORA, storage=FOLDER)
    with in_form(model, form):
        expect_same(model, temperature=0.6)


@pytest.mark.parametrize("form", ["masked", "flat"])
def test_in_float32(form: str) -> None:
    model = make("llama", torch.float32)
    attach(model, LORA, storage=FOLDER)
    with in_form(model, form):
        expect_same(model, near=1e-6)


METHODS: dict[str, MethodConfig] = {
    "lora": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
    "prompt": PromptTuningConfig(num_virtual_tokens=3),
}


@pytest.mark.parametrize("form", ["masked", "flat"])
@pytest.mark.parametrize("method", ["prefix", "prompt"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_virtual_tokens_stand_before_every_prompt(kind: str, method: str, form: str) -> None:
    model = make(kind)
    attach(model, METHODS[method], storage=FOLDER)
    with in_form(model, form):
        expect_same(model, near=1e-6)  # they are float32


@pytest.mark.parametrize("form", ["masked", "flat"])
@pytest.mark.parametrize("head", ["trained", "packed"])
def test_other_heads(head: str, form: str) -> None:
    model = make("llama, tied" if head == "packed" else "llama")
    if head == "packed":
        quantise_embeddings(model)
    targets = ["q_proj", "lm_head"] if head == "trained" else ["q_proj"]
    attach(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False), storage=FOLDER)
    assert AnswerLogProbs(model).path == f"{head} head"
    with in_form(model, form):
        expect_same(model, near=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_prompt_is_computed_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that reach the model, and rows that reach its last feed-forward part."""
    model = make("llama", dtype)
    attach(model, METHODS["lora"], storage=FOLDER)
    objective = AnswerLogProbs(model)
    seen: list[tuple[int, ...]] = []
    model.model.embed_tokens.register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape[:2])))
    model.model.layers[-1].mlp.register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape[:2])))
    batch = branch_batch(rows(), 0)
    with in_form(model, "flat"):
        objective(model, batch)
        seen.clear()  # of probes too
        objective(model, batch)
    predicting = sum(1 + sum(max(0, len(answer) - 1) for answer in row.answers) for row in rows())
    assert seen == [(1, 64), (1, predicting)] and batch.real_tokens == 55


def test_no_further_from_the_truth_than_the_models_own_logits_in_16_bits() -> None:
    exact, model = make("llama"), make("llama", torch.bfloat16)
    exact.load_state_dict(model.state_dict())  # the same rounded weights
    expected, entropies, _ = alone(exact)
    own, own_entropies, _ = alone(model)
    with in_form(model, "flat"):
        found = AnswerLogProbs(model)(model, branch_batch(rows(), 0), with_entropy=True)
    assert found.entropy is not None
    for mine, its, value in ((found.log_probs, own, expected), (found.entropy, own_entropies, entropies)):
        assert mine.dtype == torch.float32
        assert (mine - value).norm() <= (its - value).norm()


def test_of_each_answer() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    found = Answers(values, (1, 0, 3))
    assert found.sums().tolist() == [1.0, 0.0, 9.0] and found.means().tolist() == [1.0, 0.0, 3.0]
    (gradient,) = torch.autograd.grad(found.means().sum(), values)
    torch.testing.assert_close(gradient, torch.tensor([1.0, 1 / 3, 1 / 3, 1 / 3]))


@pytest.mark.parametrize("form", ["masked", "flat"])
def test_answers_without_tokens(form: str) -> None:
    model = make("llama")
    attach(model, LORA, storage=FOLDER)
    objective = AnswerLogProbs(model)
    batch = branch_batch([Branched((5, 6), ((), ()), 1, truncated=False)], 0)
    with in_form(model, form):
        found = objective(model, batch)
    assert found.lengths == (0, 0) and found.sums().tolist() == [0.0, 0.0]


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(ModelError, match="encoder-decoder"):
        AnswerLogProbs(tiny("t5"))


def test_a_label_that_is_taken_out_is_not_scored() -> None:
    """A tool's words in the middle of an answer, for instance."""
    model = make("llama")
    batch = branch_batch([Branched((5, 6), ((7, 8, 9), (3, 4)), 1, truncated=False)], 0)
    whole = AnswerLogProbs(model)(model, batch)
    batch.labels[0, 3] = -100
    part = AnswerLogProbs(model)(model, batch)
    assert part.lengths == (2, 2)
    torch.testing.assert_close(part.log_probs, whole.log_probs[[0, 2, 3, 4]])


def test_filled_up_to_a_number_of_tokens_it_gives_the_same() -> None:
    model = make("llama")
    objective, batch = AnswerLogProbs(model), branch_batch(rows(), 0)
    with in_form(model, "flat"):
        found, wide = objective(model, batch), objective(model, batch, tokens=160)
    torch.testing.assert_close(wide.log_probs, found.log_probs, rtol=1e-12, atol=1e-12)
