"""Cases in which PEFT gives a wrong result, or another one: `python benchmarks/peft_differences.py`.

Every case runs the same on PEFT and here, on tiny random models, and prints one figure for each. What is
right is a definition written out in the case. docs/results/peft-differences.md explains them;
tests/integrations/test_peft_differences.py holds the figures.
"""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graftlm.integrations import peft_api

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
IDS = torch.randint(3, 48, (3, 7), generator=torch.Generator().manual_seed(0))
Library = Any


@dataclass(frozen=True)
class Case:
    """One figure of each library. `unit` says what is counted; zero is right unless it says otherwise."""

    peft: float
    graft: float
    unit: str


CASES: dict[str, tuple[Callable[[Library], float], str]] = {}


def case(name: str, unit: str) -> Callable[[Callable[[Library], float]], Callable[[Library], float]]:
    """Register a measurement."""

    def register(measure: Callable[[Library], float]) -> Callable[[Library], float]:
        CASES[name] = (measure, unit)
        return measure

    return register


def measure(name: str) -> Case:
    """Both figures of one case."""
    function, unit = CASES[name]
    with quiet():
        return Case(function(peft), function(peft_api), unit)


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def llama(**changes: Any) -> Any:
    """A tiny Llama, the same each time."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **changes})).eval()


def adapted(library: Library, model: Any = None, **fields: Any) -> Any:
    """A Llama with a LoRA that changes it."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    torch.manual_seed(1)
    wrapped = library.get_peft_model(
        llama() if model is None else model, library.LoraConfig(**config | fields)
    )
    return wrapped.eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    """The model's logits for some tokens."""
    found: Tensor = model(input_ids=ids, **inputs).logits.double()
    return found


def error(found: Tensor, right: Tensor, base: Tensor) -> float:
    """Distance from what is right, relative to what the adapter changes at all."""
    return float((found - right).norm() / (right - base).norm())


# Combining


def weight_one(library: Library, way: str, fields: dict[str, Any]) -> float:
    model = adapted(library, llama(attention_bias=True), **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # as training would change them
            if "magnitude" in name:
                parameter.mul_(1.5)
            elif "lora_B" in name and parameter.dim() == 1:
                parameter.fill_(0.5)
    right, base = logits(model), logits(llama(attention_bias=True))
    model.add_weighted_adapter(["default"], [1.0], "same", combination_type=way)
    model.set_adapter("same")
    return error(logits(model), right, base)


KINDS = {
    "combine rsLoRA by svd": ("svd", {"use_rslora": True}),
    "combine rsLoRA by linear": ("linear", {"use_rslora": True}),
    "combine rsLoRA by cat": ("cat", {"use_rslora": True}),
    "combine DoRA": ("cat", {"use_dora": True}),
    "combine lora_bias": ("cat", {"lora_bias": True}),
}
for _name, (_way, _fields) in KINDS.items():
    case(_name, "error of a combination of one adapter with weight 1")(
        partial(weight_one, way=_way, fields=_fields)
    )


@case("combine linear", "error of dW, against the weighted sum of both dW")
def combine_linear(library: Library) -> float:
    model = adapted(library, target_modules=["q_proj"])
    torch.manual_seed(2)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": False}
    model.add_adapter("other", library.LoraConfig(**config))
    changes = []
    for name in ("default", "other"):
        changes.append(delta(model, name))
    model.add_weighted_adapter(["default", "other"], [0.7, 0.3], "sum", combination_type="linear")
    right = 0.7 * changes[0] + 0.3 * changes[1]
    return float((delta(model, "sum") - right).norm() / right.norm())


def delta(model: Any, name: str) -> Tensor:
    """dW of the first layer's queries."""
    model.set_adapter(name)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    before = layer.weight.detach().double().clone()
    model.merge_adapter()
    after = layer.weight.detach().double().clone()
    model.unmerge_adapter()
    return after - before


# Merging


@case("merge one of two active", "error of the output, where nothing should change")
def merge_one(library: Library) -> float:
    model = adapted(library)
    torch.manual_seed(2)
    model.add_adapter(
        "other", library.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    model.base_model.set_adapter(["default", "other"])
    right, base = logits(model), logits(llama())
    model.merge_adapter(["default"])
    return error(logits(model), right, base)


@case("disable while merged", "error of the weights after the block, where the merge should still be there")
def disable_merged(library: Library) -> float:
    model = adapted(library, target_modules=["q_proj"])
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    base = layer.weight.detach().clone()
    model.merge_adapter()
    right = layer.weight.detach().clone()
    with model.disable_adapter():
        logits(model)
    return error(layer.weight.detach(), right, base)


@case("merge a tied head", "error of the output after the merge")
def merge_tied(library: Library) -> float:
    model = adapted(library, llama(tie_word_embeddings=True), target_modules=["lm_head"])
    right, base = logits(model), logits(llama(tie_word_embeddings=True))
    return error(logits(model.merge_and_unload()), right, base)


@case("merge cycles in bfloat16", "mean error of the weights after 100 cycles, relative to their mean size")
def merge_cycles(library: Library) -> float:
    model = adapted(library, llama().to(torch.bfloat16), target_modules=["q_proj"])
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    before = layer.weight.detach().double().clone()
    for cycle in range(100):
        generator = torch.Generator().manual_seed(cycle)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.merge_adapter()
        model.unmerge_adapter()
    return float((layer.weight.detach().double() - before).abs().mean() / before.abs().mean())


@case("unmerge IA3 with a zero factor", "error of the weights after merge and unmerge")
def unmerge_ia3(library: Library) -> float:
    config = library.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    model = library.get_peft_model(llama(), config)
    layer = model.get_base_model().model.layers[0].self_attn.k_proj.base_layer
    before = layer.weight.detach().clone()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3" in name:
                parameter[0] = 0.0
    model.merge_adapter()
    model.unmerge_adapter()
    return float((layer.weight.detach() - before).norm() / before.norm())


# Files


@case("rank_pattern order", "1 if the library cannot load the file that it wrote")
def pattern_order(library: Library) -> float:
    fields = {"rank_pattern": {"layers.0.self_attn.q_proj": 4, ".*q_proj": 2}, "target_modules": ["q_proj"]}
    with tempfile.TemporaryDirectory() as folder:
        adapted(library, **fields).save_pretrained(folder)
        try:
            library.PeftModel.from_pretrained(llama(), folder)
        except (RuntimeError, ValueError):
            return 1.0
    return 0.0


@case("unknown tensors in a file", "1 if loading says nothing about them")
def unknown_tensors(library: Library) -> float:
    with tempfile.TemporaryDirectory() as folder:
        adapted(library).save_pretrained(folder)
        file = Path(folder) / "adapter_model.safetensors"
        save_file({**load_file(file), "base_model.model.model.lora_C.weight": torch.ones(3)}, file)
        return loads_silently(library, folder, llama())


@case("another base", "1 if loading says nothing about it")
def another_base(library: Library) -> float:
    with tempfile.TemporaryDirectory() as folder:
        adapted(library).save_pretrained(folder)
        torch.manual_seed(9)
        other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
        return loads_silently(library, folder, other)


def loads_silently(library: Library, folder: str, model: Any) -> float:
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            library.PeftModel.from_pretrained(model, folder)
        except ValueError:
            return 0.0
        finally:
            logging.getLogger().removeHandler(handler)
    told = [
        str(w.message)
        for w in said
        if w.category is not FutureWarning and "config file" not in str(w.message)
    ]
    return float(not told and not heard)


@case("modules_to_save by ending", "modules copied for the name 'norm'; the model has one of that name")
def by_ending(library: Library) -> float:
    with tempfile.TemporaryDirectory() as folder:
        adapted(library, modules_to_save=["norm"]).save_pretrained(folder)
        return float(sum("norm" in key for key in load_file(Path(folder) / "adapter_model.safetensors")))


@case("a name of torch's own", "1 if an adapter cannot be called 'half'")
def named_half(library: Library) -> float:
    try:
        library.get_peft_model(llama(), library.LoraConfig(), adapter_name="half")
    except KeyError:
        return 1.0
    return 0.0


# State


@case("half-done changes", "modules left wrapped after an error")
def half_done(library: Library) -> float:
    model = nn.Sequential()
    model.add_module("first", nn.Linear(4, 4))
    model.add_module("second", nn.GRU(4, 4))
    before = [type(module) for module in model.modules()]
    with suppress(ValueError):
        library.get_peft_model(model, library.LoraConfig(target_modules=["first", "second"]))
    return float(len(list(model.modules())) - len(before))


@case("flags after unload", "base parameters that were trainable and no longer are")
def flags(library: Library) -> float:
    model = llama()
    before = sum(parameter.requires_grad for parameter in model.parameters())
    base = library.get_peft_model(model, library.LoraConfig(target_modules=["q_proj"])).unload()
    return float(before - sum(parameter.requires_grad for parameter in base.parameters()))


@case("a loaded prompt", "parameters that are trainable after loading for inference")
def loaded_prompt(library: Library) -> float:
    with tempfile.TemporaryDirectory() as folder:
        prompted(library).save_pretrained(folder)
        loaded = library.PeftModel.from_pretrained(llama(), folder)
        return float(sum(parameter.requires_grad for parameter in loaded.parameters()))


def prompted(library: Library, kind: str = "PromptTuningConfig", model: Any = None) -> Any:
    torch.manual_seed(3)
    config = getattr(library, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    return library.get_peft_model(llama() if model is None else model, config)


# Prompt and prefix


@case("training on from a saved prefix", "1 if it is refused")
def resumed_prefix(library: Library) -> float:
    with tempfile.TemporaryDirectory() as folder:
        prompted(library, "PrefixTuningConfig").save_pretrained(folder)
        try:
            library.PeftModel.from_pretrained(llama(), folder, is_trainable=True)
        except ValueError:
            return 1.0
    return 0.0


@case("prefix with recomputed activations", "1 if it is refused")
def checkpointed_prefix(library: Library) -> float:
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        prompted(library, "PrefixTuningConfig", model).train()(input_ids=IDS, labels=IDS).loss.backward()
    except ValueError:
        return 1.0
    return 0.0


@case("left padding and prompts", "error of a row's logits because another row is longer")
def left_padding(library: Library) -> float:
    model = prompted(library).eval()
    short, padded = IDS[:1, :4], torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[:1, :4]], dim=1)
    seen = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    alone = logits(model, short, attention_mask=torch.ones_like(short))[0, -4:]
    beside = logits(model, padded, attention_mask=seen)[0, -4:]
    return float((beside - alone).norm() / alone.norm())


# Several adapters, memory


@case("mixed batch with DoRA", "1 if it is refused")
def mixed_dora(library: Library) -> float:
    model = adapted(library, use_dora=True)
    try:
        logits(model, adapter_names=["default", "__base__", "default"])
    except ValueError:
        return 1.0
    return 0.0


@case("mixed batch in training", "1 if it is refused")
def mixed_training(library: Library) -> float:
    model = adapted(library).train()
    try:
        model(input_ids=IDS, labels=IDS, adapter_names=["default", "__base__", "default"]).loss.backward()
    except ValueError:
        return 1.0
    return 0.0


@case("bytes kept for backward", "bytes kept by one adapted bfloat16 layer, relative to those of its input")
def kept_bytes(library: Library) -> float:
    model = nn.Sequential()
    model.add_module("layer", nn.Linear(512, 512, dtype=torch.bfloat16))
    wrapped = library.get_peft_model(model, library.LoraConfig(target_modules=["layer"], r=8))
    x = torch.randn(256, 512, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in wrapped.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.dim() == 2:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        wrapped(x)
    return sum(kept.values()) / (x.numel() * 2)


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    print(f"PEFT {peft.__version__}, torch {torch.__version__}, transformers {transformers.__version__}\n")
    width = max(map(len, CASES))
    for name in CASES:
        row = measure(name)
        print(f"{name:{width}}  PEFT {row.peft:10.4g}  Graft {row.graft:10.4g}  {row.unit}", flush=True)


if __name__ == "__main__":
    main()
