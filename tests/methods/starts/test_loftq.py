"""LoftQ's start: the best correction of rank r of what quantising a base lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import graftlm as gl
from graftlm.core.errors import ConfigError, GraftError, ModelError
from graftlm.core.notices import forget_notices, notices_to
from graftlm.formats.layout import FOLDER
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.attach import adapters_of, attach
from graftlm.methods.lora import LoraConfig
from graftlm.methods.starts import loftq
from graftlm.methods.starts.initialise import LoftQConfig
from graftlm.methods.starts.loftq import Correction, correct_quantisation
from graftlm.models.originals import originals_of
from graftlm.quant.convert import dequantise, quantise, quantised_layers
from graftlm.quant.scheme import Scheme
from graftlm.testing.models import batch, logits, tiny
from graftlm.testing.snapshot import snapshot

pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")  # in PEFT

CONFIG = LoraConfig(r=4, lora_alpha=8)


def original_of(kind: str, **changes: Any) -> Callable[[str], Tensor]:
    whole = tiny(kind, **changes)
    return lambda path: whole.get_submodule(path).weight.detach()


def started(
    kind: str = "llama", scheme: str = "nf4", config: LoraConfig = CONFIG
) -> tuple[AdapterSet, list[Correction]]:
    model = tiny(kind)
    quantise(model, Scheme.parse(scheme))
    adapters = attach(model, config, storage=FOLDER)
    return adapters, correct_quantisation(adapters, "default", original_of(kind))


def best_left(lost: Tensor, rank: int) -> float:
    """What no matrix of that rank can take off (Eckart and Young)."""
    values = torch.linalg.svdvals(lost.double())
    return float(values[rank:].square().sum().sqrt())


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8", "fp8"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_correction_of_its_rank_is_better(kind: str, scheme: str) -> None:
    """At a scaling other than 1; GPT-2 stores its weights the other way round, some of them square."""
    adapters, found = started(kind, scheme)
    original = original_of(kind)
    layers = quantised_layers(adapters.model)
    assert len(found) == len(adapters.parts("default"))
    for one in found:
        weight = original(one.path).double()
        stored = layers[f"{one.path}.base_layer"].packed.decode(torch.float64)
        weight = weight.t() if kind == "gpt2" else weight
        part: Any = adapters.parts("default")[one.path]
        left = (weight - stored - part.scaling * part.lora_B.double() @ part.lora_A.double()).detach()
        best = best_left(weight - stored, 4)
        assert float(left.norm()) == pytest.approx(best, rel=1e-3, abs=1e-6 * float(weight.norm()))
        assert one.before == pytest.approx(float((weight - stored).norm() / weight.norm()), rel=1e-3)
        assert one.after == pytest.approx(float(left.norm() / weight.norm()), rel=1e-2, abs=1e-6)


def test_a_randomised_svd_is_all_but_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = [one.after for one in started()[1]]
    monkeypatch.setattr(loftq, "EXACT_SIDE", 8)
    state = torch.get_rng_state()
    again, more = (started()[1] for _ in range(2))
    assert [one.after for one in again] == [one.after for one in more], "it is the same every time"
    torch.set_rng_state(state)
    for best, found in zip(exact, again, strict=True):
        assert best <= found.after * (1 + 1e-6) and found.after < 1.01 * best


@pytest.mark.parametrize(
    "config",
    [
        CONFIG.replace(r=32, lora_alpha=5),
        CONFIG.replace(r=32, use_rslora=True),
        CONFIG.replace(r=32, use_dora=True),
    ],
)
def test_at_full_rank_the_model_is_what_it_was_before_quantising(config: LoraConfig) -> None:
    model = tiny("llama", num_key_value_heads=4)
    inputs = batch("llama")
    wanted = logits(model, inputs)
    quantise(model, Scheme.parse("nf4"))
    assert not torch.allclose(logits(model, inputs), wanted, atol=1e-4)
    adapters = attach(model, config, storage=FOLDER)
    correct_quantisation(adapters, "default", original_of("llama", num_key_value_heads=4))
    torch.testing.assert_close(logits(model, inputs), wanted, rtol=1e-4, atol=1e-5)


def test_the_product_is_that_of_peft_at_a_scaling_of_one() -> None:
    """PEFT's function wants a GPU around its decomposition; the decomposition itself is the oracle."""
    peft = pytest.importorskip("peft.utils.loftq_utils")
    adapters, found = started(config=CONFIG.replace(lora_alpha=4))
    original, layers = original_of("llama"), quantised_layers(adapters.model)
    for one in found:
        lost = original(one.path) - layers[f"{one.path}.base_layer"].packed.decode()
        theirs = peft._low_rank_decomposition(lost, reduced_rank=4)
        part: Any = adapters.parts("default")[one.path]
        torch.testing.assert_close(part.lora_B @ part.lora_A, theirs["L"] @ theirs["R"], rtol=1e-3, atol=1e-6)


def test_the_file_is_a_plain_lora_for_any_copy_of_the_base(tmp_path: Path) -> None:
    import peft

    adapters, _ = started(config=CONFIG.replace(init_lora_weights="loftq"))
    wanted = logits(adapters.model, batch("llama"))
    adapters.save(tmp_path)
    config = peft.LoraConfig.from_pretrained(str(tmp_path))
    assert config.init_lora_weights is True and config.r == 4
    base = tiny("llama-nf4")
    dequantise(base, torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(logits(theirs, batch("llama")), wanted, rtol=0, atol=1e-5)


def test_attaching_reads_the_originals_from_where_the_base_came(tmp_path: Path) -> None:
    """GPT-2's files leave out the name of the backbone."""
    whole = tiny("gpt2")
    whole.transformer.save_pretrained(tmp_path)
    model = tiny("gpt2-nf4")
    model.config._name_or_path = str(tmp_path)
    adapters = gl.attach(model, gl.LoraConfig(r=4, init_lora_weights="loftq"))
    assert adapters.active == ("default",) and adapters.config("default").init_lora_weights is True
    direct, _ = started("gpt2")
    gaps = []
    for one, other in ((adapters.model, whole), (direct.detach(), whole)):
        gaps.append(float((logits(one, batch("gpt2")) - logits(other, batch("gpt2"))).norm()))
    assert gaps[0] < gaps[1], "nearer to the original than the quantised base is"


def test_without_originals_attaching_says_so_and_starts_plain() -> None:
    heard: list[str] = []
    forget_notices()
    with notices_to(heard.append):
        adapters = attach(tiny("llama-nf4"), CONFIG.replace(init_lora_weights="loftq"), storage=FOLDER)
    assert any("before quantising" in text for text in heard)
    assert all(not p.any() for key, p in adapters.named_parameters("default").items() if "lora_B" in key)


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "an unquantised base": (
        lambda: correct_quantisation(
            attach(tiny("llama"), CONFIG, storage=FOLDER), "default", original_of("llama")
        ),
        "no adapted layer is quantised",
    ),
    "other weights": (
        lambda: correct_quantisation(
            attach(tiny("llama-nf4"), CONFIG, storage=FOLDER), "default", original_of("llama", seed=1)
        ),
        "another weight",
    ),
    "weights of another shape": (
        lambda: correct_quantisation(
            attach(tiny("llama-nf4"), CONFIG, storage=FOLDER), "default", lambda path: torch.zeros(3, 5)
        ),
        r"\[3, 5\]",
    ),
    "more directions than there are": (
        lambda: started(config=CONFIG.replace(r=33)),
        "takes r directions",
    ),
    "another number of bits": (
        lambda: correct_quantisation(
            attach(tiny("llama-int8"), CONFIG, storage=FOLDER), "default", original_of("llama"), LoftQConfig()
        ),
        "stored in 8 bits",
    ),
    "rounds that replace the base": (
        lambda: LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_iter": 5}),
        "only be 1",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_refused(what: str) -> None:
    action, words = WRONG[what]
    with pytest.raises(ConfigError, match=words):
        action()


def test_a_refused_start_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    config = gl.LoraConfig(r=4, init_lora_weights="loftq")
    tiny("llama").save_pretrained(tmp_path / "dense")
    tiny("llama", seed=1).save_pretrained(tmp_path / "other")
    cases: list[tuple[Any, str, type[GraftError], str]] = [
        (tiny("llama"), str(tmp_path / "dense"), ConfigError, "no adapted layer is quantised"),
        (tiny("llama-nf4"), str(tmp_path / "other"), ConfigError, "another weight"),
        (tiny("llama-nf4"), "", ModelError, "does not say what it was quantised from"),
        (tiny("llama-nf4"), str(tmp_path / "nowhere"), ModelError, "nowhere"),
        (tiny("gpt2-nf4"), str(tmp_path / "dense"), ModelError, "no tensor for"),
    ]
    for model, source, kind, words in cases:
        model.config._name_or_path = source
        unchanged = snapshot(model)
        with pytest.raises(kind, match=words):
            gl.attach(model, config)
        unchanged()
        assert adapters_of(model) is None


def test_a_source_that_is_quantised_itself_is_refused(tmp_path: Path) -> None:
    model = tiny("llama-nf4")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="stored quantised"):
        originals_of(model, tmp_path / "model.safetensors")
