"""The suite passes a method that is right, and fails one for each thing that can be wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from graftlm.core.errors import ConfigError
from graftlm.methods import table
from graftlm.methods.base import Dense, Layer, LayerAdapter, SiteAdapter
from graftlm.methods.families import is_linear
from graftlm.methods.layer_config import LayerConfig
from graftlm.methods.lora import LoraConfig
from graftlm.testing.case import Case
from graftlm.testing.properties import PROPERTIES, check
from graftlm.testing.suite import Subject, check_method, examine


class Gain(LayerAdapter):
    """y * (1 + gain): a method that is right. Shape: gain [out]."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(layer.handle.shape[0]))

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return (y * (1 + self.gain)).to(y.dtype)

    def merged(self, dense: Dense) -> dict[str, Tensor]:
        factor = (1 + self.gain).to(dense["weight"].dtype)
        scaled = {"weight": dense["weight"] * factor[:, None]}
        return scaled | ({"bias": dense["bias"] * factor} if "bias" in dense else {})


class GainConfig(LayerConfig):
    """`Gain`, or a broken kind of it, on the linear layers of attention."""

    peft_type: ClassVar[str] = "GAIN"
    part: ClassVar[type[Gain]] = Gain

    target_modules: str | tuple[str, ...] | None = "attention"

    def supports(self, module: nn.Module) -> bool:
        return is_linear(module)

    def build(self, layer: Layer) -> SiteAdapter:
        return self.part(layer)


class Deaf(Gain):
    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return y + 0 * self.gain


class Eager(Gain):
    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        nn.init.normal_(self.gain)


class Idle(Gain):
    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.spare = nn.Parameter(torch.zeros(3))


class Leaking(Gain):
    """Trains the base's bias too."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.bias = layer.module.bias


class Wide(Gain):
    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return y * (1 + self.gain)


class Forgetful(Gain):
    def saved(self) -> dict[str, Tensor]:
        return {"gain": self.gain.detach().half().float()}


class Lying(Gain):
    def merged(self, dense: Dense) -> dict[str, Tensor]:
        return {"weight": dense["weight"] * 2}


class Hooked(Gain):
    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        layer.module.register_forward_hook(lambda module, args, output: output)


class Sociable(Gain):
    """Looks at the other rows of the batch."""

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return super().post(x, y) + 20 * self.gain * y.mean(0, keepdim=True)


class Curious(Gain):
    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return super().post(x, y) * (1.0 if float(y.detach().sum()) < 1e9 else 2.0)


class Counting(Gain):
    calls = 0

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return super().post(x, y) + 0 * self.calls


class Attached(Gain):
    """Gives gradients to the base's output as if it were no part of the way."""

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        return super().post(x, y) if x.shape[0] == 1 else super().post(x, y.detach())


BROKEN: dict[str, tuple[type[Gain], str]] = {
    "acts": (Deaf, "changes the logits by"),
    "identity": (Eager, "a new adapter changes the outputs"),
    "trains_alone": (Idle, "spare"),
    "disabled": (Leaking, "logits while disabled"),
    "saved": (Forgetful, "logits after loading"),
    "merge": (Lying, "merged logits"),
    "detach": (Hooked, "hooks of"),
    "master_weights": (Wide, "dtype"),
    "routed": (Sociable, "logits of a routed batch"),
    "routed_training": (Attached, "gradient"),
    "generates": (Sociable, "tokens of a padded batch"),
    "compiles": (Curious, "graph|data-dependent|Unsupported"),
    "switches_compiled": (Counting, "more times"),
}


@pytest.fixture
def config_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[type[Gain]], GainConfig]]:
    """A config whose parts are of the given kind; folders of the type load it."""

    def make(kind: type[Gain]) -> GainConfig:
        own = type(f"{kind.__name__}Config", (GainConfig,), {"part": kind, "__module__": __name__})
        monkeypatch.setattr(table, "METHODS", {**table.METHODS, "GAIN": own})
        config = own()
        assert isinstance(config, GainConfig)
        return config

    yield make


def test_a_method_that_is_right_passes(config_of: Callable[..., GainConfig]) -> None:
    report = check_method(config_of(Gain), kinds=["gpt2"])
    assert len(report.findings) == len(PROPERTIES)
    assert "FAILED" not in str(report)


@pytest.mark.parametrize("name", BROKEN)
def test_a_method_that_is_wrong_fails_where_it_is(config_of: Callable[..., GainConfig], name: str) -> None:
    kind, words = BROKEN[name]
    with pytest.raises(AssertionError, match=f"1 of 1 cells failed(?s:.*)({words})"):
        check_method(config_of(kind), kinds=["gpt2"], properties=[name])


def test_every_failure_is_listed_and_none_hides_another(config_of: Callable[..., GainConfig]) -> None:
    subject = Subject(config_of(Lying))
    report = examine(subject, ["gpt2", "bert"], ["identity", "merge", "merged_beside"])
    assert [(f.property, f.kind) for f in report.failures] == [
        ("merge", "gpt2"),
        ("merged_beside", "gpt2"),
        ("merge", "bert"),
        ("merged_beside", "bert"),
    ]


def test_what_is_not_promised_must_be_so() -> None:
    with pytest.raises(AssertionError, match="declare identity"):
        check("identity", Case("gpt2", LoraConfig(r=2), {"identity": "it is said to be loud"}))
    with pytest.raises(AssertionError, match="not refused"):
        check("merge", Case("gpt2", LoraConfig(r=2), {"merge/gpt2": "it is said to be unmergeable"}))
    with pytest.raises(AssertionError, match="not refused"):
        check_method(LoraConfig(r=2), kinds=["gpt2"], refused={"gpt2": "it is said to be too small"})
    assert check("merge", Case("gpt2", LoraConfig(r=2), {"merge/bert": "another kind"})) == "holds"


def test_a_config_may_depend_on_the_kind() -> None:
    names = {"gpt2": ("c_attn",), "bert": ("query",)}
    report = check_method(
        lambda kind: LoraConfig(r=2, target_modules=names[kind]),
        kinds=list(names),
        properties=["disabled", "generates"],
    )
    assert [f.outcome for f in report.findings] == ["holds", "holds", "holds", "absent"]
    assert "bert is an encoder" in str(report)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"exceptions": {"identiti": "why"}}, "'identiti' is no property; did you mean 'identity'"),
        ({"exceptions": {"merge/gtp2": "why"}}, "'gtp2' is no kind of model; did you mean 'gpt2'"),
        ({"refused": {"lama": "why"}}, "did you mean 'llama'"),
        ({"properties": ["merge", "mergee"]}, "did you mean 'merge'"),
        ({"kinds": ["gpt3"]}, "did you mean 'gpt2'"),
    ],
)
def test_a_name_that_is_spelled_wrong_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_method(LoraConfig(r=2), **wrong)
