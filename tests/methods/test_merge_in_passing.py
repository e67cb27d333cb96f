"""A forward pass that merges each layer while it runs, against a merge."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graftlm.core.errors import MergeError
from graftlm.formats.layout import FOLDER
from graftlm.methods.adapter_set import AdapterSet
from graftlm.methods.attach import attach
from graftlm.methods.base import MethodConfig
from graftlm.methods.lora import LoraConfig
from graftlm.methods.merge_in_passing import merged_in_passing
from graftlm.methods.prompt import PromptTuningConfig
from graftlm.methods.site import Site
from graftlm.quant.convert import quantise
from graftlm.quant.scheme import Scheme

IDS = torch.arange(24).reshape(2, 12)


def attached(config: MethodConfig, quantization: str = "nf4") -> AdapterSet:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()
    if quantization != "none":
        quantise(model, Scheme.parse(quantization))
    adapters = attach(model, config, "default", storage=FOLDER)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.parameters("default"):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return adapters


@torch.no_grad()
def said(adapters: AdapterSet) -> torch.Tensor:
    logits: torch.Tensor = adapters.model(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("config", [LoraConfig(r=4), LoraConfig(r=4, use_dora=True)], ids=["lora", "dora"])
def test_it_computes_what_a_merge_computes(config: LoraConfig, quantization: str) -> None:
    adapters = attached(config, quantization)
    live = said(adapters)
    with merged_in_passing(adapters):
        passing = said(adapters)
    assert torch.equal(said(adapters), live), "nothing is left of it"
    adapters.merge()
    assert torch.equal(said(adapters), passing)
    adapters.unmerge()
    assert torch.equal(said(adapters), live)


def test_one_layer_is_dense_at_a_time() -> None:
    adapters = attached(LoraConfig(r=4))
    sites = [module for module in adapters.model.modules() if isinstance(module, Site)]
    most = 0

    def count(*_: object) -> None:
        nonlocal most
        most = max(most, sum(bool(site.originals) for site in sites))

    with merged_in_passing(adapters):
        handles = [site.register_forward_pre_hook(count) for site in sites]
        said(adapters)
    for handle in handles:
        handle.remove()
    assert most == 1
    assert not any(site.originals or site._forward_hooks or site._forward_pre_hooks for site in sites)


def test_what_cannot_be_merged_says_so() -> None:
    adapters = attached(PromptTuningConfig(num_virtual_tokens=4))
    with pytest.raises(MergeError), merged_in_passing(adapters):
        pass
    assert said(adapters).isfinite().all()


def test_a_merge_that_overflows_leaves_the_base_alone() -> None:
    adapters = attached(LoraConfig(r=4))
    with torch.no_grad():
        for name, parameter in adapters.named_parameters("default").items():
            if "mlp.down_proj" in name:
                parameter.fill_(1e30)
    with adapters.disabled():
        base = said(adapters)
    with pytest.raises(MergeError, match="NaN or infinity"), merged_in_passing(adapters):
        said(adapters)
    with adapters.disabled():
        assert torch.equal(said(adapters), base)
