"""Every side by name: the module that trains, the way it does so, and the packages it needs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Side:
    """`module` has a function `train(case, ways, folder, recorder)`."""

    module: str
    ways: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()


GRAFT = "Graft"
GRAFT_EAGER = "Graft, nothing fused"
GRAFT_COMPILED = "Graft, compiled"
"""Ours with compiled layers, which `graft tune` takes by itself for long runs only."""
GRAFT_RECORDED = "Graft, recorded"
"""Ours with micro-batches recorded as CUDA graphs."""
GRAFT_LORA = "Graft, LoRA"
"""Ours with LoRA where the row is about another method: what the method costs beside it."""
GRAFT_DENSE = "Graft, 16-bit base"
"""Ours without quantisation where the row is about a quantised base."""
GRAFT_KINDS = {f"Graft, {kind}": (f"base {kind}",) for kind in ("fp4", "int8", "fp8")}
"""`base ...`: how the base is stored, whatever the row says."""
PEFT = "PEFT"
TRL = "TRL"
PEFT_SIDES = {
    PEFT: (),
    "PEFT, 16-bit adapters": ("16-bit adapters",),
    "PEFT, autocast": ("autocast",),
    "PEFT, compiled": ("compiled",),
    "PEFT, 16-bit adapters, compiled": ("16-bit adapters", "compiled"),
}
"""`autocast`: what the Trainer does with `bf16=True`."""
BITSANDBYTES_SIDES = {
    "PEFT + bitsandbytes, prepared": ("prepared",),
    "PEFT + bitsandbytes, prepared, autocast": ("prepared", "autocast"),
    "PEFT + bitsandbytes": (),
    "PEFT + bitsandbytes, 16-bit adapters": ("16-bit adapters",),
}
"""`prepared`: `prepare_model_for_kbit_training`."""
LIGER_SIDES = {
    "PEFT + Liger": ("liger",),
    "PEFT + Liger, 16-bit adapters": ("liger", "16-bit adapters"),
}
CUDA_PEERS = (PEFT, "PEFT, 16-bit adapters", *LIGER_SIDES, "torchtune", "Unsloth")
BITSANDBYTES_FASTEST = "PEFT + bitsandbytes, 16-bit adapters"
CUDA_FOUR_BIT_PEERS = ("PEFT + bitsandbytes, prepared", BITSANDBYTES_FASTEST, "Unsloth, 4 bits")
CUDA_DORA_PEERS = (PEFT, "PEFT, 16-bit adapters")
TRL_SIDES = {
    TRL: (),
    "TRL, sorted by length": ("sorted",),
    "TRL, 16-bit, sorted by length": ("sorted", "16-bit"),
    "TRL, padding free": ("padding free",),
    "TRL, 16-bit, padding free": ("padding free", "16-bit"),
}
"""`sorted`: the examples of a step in the order of their lengths, in micro-batches of four. `16-bit`: no
autocast, adapters in the model's type. `padding free`: all examples of a micro-batch in one row."""

SIDES: dict[str, Side] = {
    GRAFT: Side("graft"),
    GRAFT_EAGER: Side("graft", ("eager",)),
    GRAFT_COMPILED: Side("graft", ("compiled",)),
    GRAFT_RECORDED: Side("graft", ("recorded",)),
    GRAFT_LORA: Side("graft", ("lora",)),
    GRAFT_DENSE: Side("graft", ("base none",)),
    **{name: Side("graft", ways) for name, ways in GRAFT_KINDS.items()},
    **{name: Side("peft_transformers", ways, ("peft",)) for name, ways in PEFT_SIDES.items()},
    **{
        name: Side("peft_transformers", ("4 bits", *ways), ("peft", "bitsandbytes"))
        for name, ways in BITSANDBYTES_SIDES.items()
    },
    **{name: Side("peft_transformers", ways, ("peft", "liger_kernel")) for name, ways in LIGER_SIDES.items()},
    **{name: Side("trl_sft", ways, ("trl", "peft")) for name, ways in TRL_SIDES.items()},
    "torchtune": Side("torchtune_recipe", (), ("torchtune",)),
    "Unsloth": Side("unsloth_model", (), ("unsloth",)),
    "Unsloth, 4 bits": Side("unsloth_model", ("4 bits",), ("unsloth",)),
}
