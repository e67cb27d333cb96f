"""Switch off the dropout of a base, where its outputs are compared with those of the base itself."""

from __future__ import annotations

from torch import nn

from graftlm.methods.attach import adapters_of

RATES = ("attention_dropout", "activation_dropout", "hidden_dropout", "dropout", "dropout_prob")
"""Attributes under which modules of `transformers` keep a rate that no `nn.Dropout` holds."""
KINDS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def drop_nothing(model: nn.Module) -> None:
    """Set every rate of dropout in the base to zero; those of adapters, which a recipe names, stay.

    A policy with dropout, beside a reference without, seems to have moved before it has learnt anything.
    """
    for module in _of_base(model):
        if isinstance(module, KINDS):
            module.p = 0.0
        for name in RATES:
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)


def drops(model: nn.Module) -> bool:
    """Whether the base drops values at random while it trains, beside what adapters drop."""
    return any(
        (isinstance(module, KINDS) and module.p > 0)
        or any(isinstance(vars(module).get(name), float) and vars(module)[name] > 0 for name in RATES)
        for module in _of_base(model)
    )


def _of_base(model: nn.Module) -> list[nn.Module]:
    """The modules that belong to no adapter."""
    adapters = adapters_of(model)
    own = set[nn.Module]()
    if adapters is not None:
        for part in [part for name in adapters.names for part in adapters.parts(name).values()]:
            own.update(part.modules())
    return [module for module in model.modules() if module not in own]
