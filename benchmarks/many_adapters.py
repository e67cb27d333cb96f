"""Many adapters on a deep model: what the 64th `add` costs beside the first, and a switch, against PEFT.

    python benchmarks/many_adapters.py [--layers 200] [--adapters 64]

A stack of linear layers, one LoRA of rank 8 on each. Ours and PEFT alternate, adapter by adapter, in one
process. The median of three neighbours is shown, so that one slow moment of the machine does not decide.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor, nn

from graftlm.formats.layout import FOLDER
from graftlm.methods.attach import attach
from graftlm.methods.lora import LoraConfig

RANK = 8


class Deep(nn.Module):
    """Linear layers in a row."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.01 * layer(x)
        return x


def seconds(action: Callable[[], object]) -> float:
    """Wall clock of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def around(times: Sequence[float], place: int) -> float:
    """Milliseconds: the median of a value and its two neighbours."""
    low = max(0, min(place - 1, len(times) - 3))
    return 1e3 * statistics.median(times[low : low + 3])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    options = parser.parse_args()
    torch.manual_seed(0)
    model, theirs = Deep(options.layers, options.width), Deep(options.layers, options.width)
    config = LoraConfig(r=RANK, target_modules=r"layers\.\d+")
    peft_config = PeftLoraConfig(r=RANK, target_modules=r"layers\.\d+")
    started = time.perf_counter()
    adapters = attach(model, config, "a0", storage=FOLDER)
    ours = [time.perf_counter() - started]
    started = time.perf_counter()
    peft_model = get_peft_model(theirs, peft_config, adapter_name="a0")  # type: ignore[arg-type]
    peft = [time.perf_counter() - started]
    for number in range(1, options.adapters):
        name = f"a{number}"
        ours.append(seconds(lambda name=name: adapters.add(name, config)))
        peft.append(seconds(lambda name=name: peft_model.add_adapter(name, peft_config)))
    last = options.adapters - 1
    print(f"{options.layers} layers, rank {RANK}, {options.adapters} adapters; milliseconds")
    print(f"{'adapter':>10} {'graft':>9} {'peft':>9}")
    for place in sorted({0, last // 4, last // 2, last}):
        print(f"{place + 1:>10} {around(ours, place):>9.1f} {around(peft, place):>9.1f}")
    print(f"last / first: graft {around(ours, last) / around(ours, 0):.2f}, "
          f"peft {around(peft, last) / around(peft, 0):.2f}")  # fmt: skip
    switch = [1e3 * seconds(lambda i=i: adapters.activate(f"a{i % 2}")) for i in range(9)]
    peft_switch = [1e3 * seconds(lambda i=i: peft_model.set_adapter(f"a{i % 2}")) for i in range(9)]
    print(f"switch: graft {statistics.median(switch):.2f}, peft {statistics.median(peft_switch):.2f}")


if __name__ == "__main__":
    main()
