"""Triton's reader of packed weights against its definition: in the interpreter on a CPU, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from importlib import util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from graftlm.core.notices import forget_notices, notices_to
from graftlm.kernels import decoding, quantised_cuda
from graftlm.kernels.buffers import borrowed_on_stream
from graftlm.kernels.quantised import decode, quantised_linear
from graftlm.quant.packed import encode
from graftlm.quant.scheme import Scheme

HAS_TRITON = util.find_spec("triton") is not None and util.find_spec("triton.language") is not None
SCHEMES = [Scheme("nf4"), Scheme("nf4", double_quant=False), Scheme("fp4"), Scheme("int8")]
SCHEMES += [Scheme("fp8"), Scheme("fp8_block")]
SHAPES = [(1, 1), (3, 5), (7, 129), (65, 300)]

INTERPRETED = """
import torch
from graftlm.kernels import decoding
from graftlm.kernels.triton import dequantise as triton_dequantise
from graftlm.quant.packed import encode
from graftlm.quant.scheme import Scheme

def truncated(value):  # what the interpreter makes of bfloat16; a GPU rounds
    return (value.view(torch.int32) & -65536).view(torch.float32).bfloat16()

checked = 0
for kind, double_quant, block in (
    ("nf4", True, 64), ("nf4", False, 64), ("nf4", True, 4096), ("fp4", True, 32),
    ("int8", True, 64), ("fp8", True, 64), ("fp8_block", True, 64),
):
    for shape in ((1, 1), (3, 5), (7, 129), (65, 300)):
        weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.02
        packed = encode(weight, Scheme(kind, double_quant, block))
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            out = torch.empty(shape, dtype=dtype)
            triton_dequantise.read_into(out, packed.stored, kind, block)
            exact = decoding.decode(packed.stored, kind, block, *shape, torch.float32)
            expected = truncated(exact) if dtype == torch.bfloat16 else exact.to(dtype)
            assert torch.equal(out, expected), (kind, double_quant, block, shape, dtype)
            checked += 1
print(checked)
"""

TRANSLATED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from graftlm.kernels.triton import dequantise as triton_dequantise

blocks = dict.fromkeys(("scale_scales", "scale_offset", "scale_map", "values"), "*fp32")
blocks = {"codes": "*u8", "scales": "*u8", **blocks, "out": "*bf16", "count": "i32"}
rows = {"codes": "*u8", "scales": "*fp32", "values": "*fp32", "out": "*bf16"}
rows = {**rows, "count": "i32", "columns": "i32", "unit": "fp32"}
for kernel, types, constants in (
    (triton_dequantise._read_blocks, blocks, {"block": 64, "scale_block": 256, "nested": True, "size": 1024}),
    (triton_dequantise._read_rows, rows, {"size": 1024, "tile": 128}),
):
    signature = types | dict.fromkeys(constants, "constexpr")
    made = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", 90, 32),
        options={"enable_fp_fusion": False},
    )
    assert "fma" not in made.asm["ptx"] and "cvt.rn.bf16" in made.asm["ptx"]
print("both")
"""


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize(
    ("script", "says", "interpret"),
    [(INTERPRETED, "84", "1"), (TRANSLATED, "both", "0")],
    ids=["run", "compile"],
)
def test_without_a_gpu(script: str, says: str, interpret: str, tmp_path: Path) -> None:
    """Triton's interpreter runs the kernels on a CPU; its compiler makes code for a GPU that is not there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    source = str(Path(quantised_cuda.__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([source, environment.get("PYTHONPATH", "")])
    environment["TRITON_INTERPRET"] = interpret
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == says


def test_without_triton_the_definition_runs_and_a_notice_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "graftlm.kernels.triton.dequantise", None)
    quantised_cuda._reader.cache_clear()
    forget_notices()
    heard: list[str] = []
    weight = encode(torch.randn(6, 20), Scheme("nf4"))
    layout = (weight.stored, "nf4", 64, 6, 20)
    x, grad = torch.randn(3, 20), torch.randn(3, 6)
    try:
        with notices_to(heard.append):
            dense = quantised_cuda.decode(*layout, torch.float32)
            y = quantised_cuda.quantised_linear(x, *layout, None)
            dx = quantised_cuda.quantised_linear_backward(grad, *layout)
    finally:
        quantised_cuda._reader.cache_clear()
        forget_notices()
    assert len(heard) == 1 and "graftlm[gpu]" in heard[0]
    assert torch.equal(dense, decoding.decode(*layout, torch.float32))
    assert torch.equal(y, x @ dense.T) and torch.equal(dx, grad @ dense)


class Stream:
    """Stands for a CUDA stream where there is none."""

    cuda_stream = 7


def test_products_use_one_buffer_for_each_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the CUDA path but the kernel and the device."""
    given: list[int] = []

    def read(out: Tensor, stored: Sequence[Tensor], kind: str, block: int) -> None:
        given.append(out.data_ptr())
        out.copy_(decoding.decode(stored, kind, block, *out.shape, out.dtype))

    monkeypatch.setattr(quantised_cuda, "_reader", lambda: read)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    weight = encode(torch.randn(16, 20), Scheme("nf4"))
    layout = (weight.stored, "nf4", 64, 16, 20)
    dense = weight.decode(torch.float32)
    x, grad, bias = torch.randn(3, 20), torch.randn(3, 16), torch.randn(16)
    y = quantised_cuda.quantised_linear(x, *layout, bias)
    dx = quantised_cuda.quantised_linear_backward(grad, *layout)
    assert given[0] == given[1]
    torch.testing.assert_close(y, x @ dense.T + bias)
    torch.testing.assert_close(dx, grad @ dense)
    assert torch.equal(quantised_cuda.decode(*layout, torch.float32), dense)
    assert given[2] != given[0], "what is handed out is no buffer"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    torch.testing.assert_close(quantised_cuda.quantised_linear(x, *layout, bias), y)
    assert given[3] != given[0], "a graph that is being captured has memory of its own"


def on_gpu(scheme: Scheme, rows: int, columns: int) -> tuple[list[Tensor], str, int, int, int]:
    weight = encode(torch.randn(rows, columns) * 0.02, scheme)
    return [tensor.cuda() for tensor in weight.stored], scheme.kind, scheme.block_size, rows, columns


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.kind)
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 1024)])
def test_values_on_a_gpu_equal_the_definition_to_the_bit(scheme: Scheme, shape: tuple[int, int]) -> None:
    layout = on_gpu(scheme, *shape)
    stored = [tensor.cpu() for tensor in layout[0]]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(decode(*layout, dtype).cpu(), decoding.decode(stored, *layout[1:], dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.kind)
def test_linear_on_a_gpu(scheme: Scheme) -> None:
    layout = on_gpu(scheme, 512, 768)
    dense = decode(*layout, torch.bfloat16)
    x, grad = (torch.randn(33, width, device="cuda", dtype=torch.bfloat16) for width in (768, 512))
    x.requires_grad_()
    y = quantised_linear(x, *layout, None)
    y.backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(y, x.detach() @ dense.T)
    torch.testing.assert_close(x.grad, grad @ dense)


@pytest.mark.gpu
def test_the_buffer_on_a_gpu_is_reused() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    layout = on_gpu(SCHEMES[0], 1024, 1024)
    x = torch.randn(4, 1024, device=device, dtype=torch.bfloat16)
    quantised_linear(x, *layout, None)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        quantised_linear(x, *layout, None)
    assert torch.cuda.max_memory_allocated() - before < 2**20
    with borrowed_on_stream(8, torch.bfloat16, device) as first:
        place = first.data_ptr()
    with borrowed_on_stream(16, torch.bfloat16, device) as second:
        assert second.data_ptr() == place


@pytest.mark.gpu
def test_threads_on_one_gpu_do_not_disturb_each_other() -> None:
    layouts = [on_gpu(SCHEMES[0], 512, 256), on_gpu(SCHEMES[2], 256, 512)]
    inputs = [torch.randn(8, layout[4], device="cuda", dtype=torch.bfloat16) for layout in layouts]
    expected = [quantised_linear(x, *layout, None) for x, layout in zip(inputs, layouts, strict=True)]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(100):
            if not torch.equal(quantised_linear(inputs[index], *layouts[index], None), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
