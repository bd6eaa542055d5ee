"""Compile every kernel ahead of time for cards that are not here, as their launchers would.

    python -m tests.aot            prints a JSON list, a record per kernel, form and architecture
    python -m tests.aot --brief    the first form of every kernel, for the last architecture

The launchers run on CPU tensors with the launch itself replaced by a compilation, so that each
kernel gets its real specialisation (16-byte alignment, constants). Run it without
`TRITON_INTERPRET`.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from imf_kernels.ops import _attention_kernels as attention
from imf_kernels.ops import _triton
from imf_kernels.ops.causal_conv import _launch_forward as conv
from imf_kernels.ops.causal_conv import _launch_norm_backward as conv_norm_backward
from imf_kernels.ops.depthwise_conv import _launch_forward as depthwise_conv
from imf_kernels.ops.grn_gelu import _launch_forward as grn
from imf_kernels.ops.grn_gelu import _launch_sums as grn_sums
from imf_kernels.ops.grouped_conv import _launch_backward as conv_backward
from imf_kernels.ops.grouped_conv import _launch_forward as conv_forward
from imf_kernels.ops.guided_euler_step import _launch as step
from imf_kernels.ops.mean_velocity_loss import _launch_backward as loss_backward
from imf_kernels.ops.mean_velocity_loss import _launch_forward as loss_forward
from imf_kernels.ops.modulated_layer_norm import _launch_backward as norm_backward
from imf_kernels.ops.modulated_layer_norm import _launch_forward as norm_forward
from imf_kernels.ops.quantize_rows import _launch as quantize
from imf_kernels.ops.rope_qkv import _launch as rope
from imf_kernels.ops.rope_qkv import _launch_norm_backward as rope_norm_backward
from imf_kernels.rows import Rows

ARCHITECTURES = (80, 90)
FP8_FROM = 89
"""The first architecture that converts to FP8: before it no such kernel is launched."""
FRAMES = {80: 640, 100: 937}
"""Odd frame counts for F5-TTS's 100 channels: rows then start off 16-byte boundaries."""


class NoDevice:
    """Stands in for a driver: a target to compile for, and nothing to run on."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


def forms() -> Iterator[tuple[str, Callable[..., object], tuple[Any, ...]]]:
    """A label, a launcher and its arguments, for every kernel in the forms that models use."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for channels, dtype in itertools.product((80, 100), dtypes):
        label = f"C={channels} {dtype}"
        rows, frames = 2, FRAMES[channels]
        x = torch.empty(rows, frames, channels)
        v = torch.empty(4, 2 * rows, frames, channels, dtype=dtype)
        dt, w = torch.empty(4, rows), torch.empty(rows)
        lengths = torch.empty(rows, dtype=torch.int64)
        out = None if dtype == torch.float32 else dtype
        yield f"{label} number", step, (x, v[:1], dt[:1], None, 2.0, None, None, out)
        yield f"{label} tensor", step, (x, v[:1], dt[:1], w, 1.0, lengths, x, out)
        yield f"{label} unguided", step, (x, v[:1, :rows], dt[:1], None, 1.0, lengths, None, out)
        yield f"{label} held", step, (x, v, dt, w, 1.0, lengths, x, out)
        u, mask = x.to(dtype), torch.empty(rows, frames, dtype=torch.bool)
        for velocity in (None, x):
            name = f"{label} boundary" if velocity is x else label
            yield name, loss_forward, (u, x, w, velocity, mask)
            yield name, loss_backward, (w, u, x, w, velocity, mask)
    lengths = torch.tensor([937, 500])
    rows = Rows.padded(lengths, 937)
    frames = len(rows.row_of)
    for dim, dtype in itertools.product((192, 256, 768, 1024, 2048), dtypes):
        label = f"D={dim} {dtype}"
        x = torch.empty(frames, dim, dtype=dtype)
        gate, shift, scale = torch.empty(2, 6 * dim, dtype=dtype).chunk(6, dim=1)[:3]
        yield label, norm_forward, (x, x, gate, shift, scale, rows.row_of, 1e-6)
        yield label, norm_backward, (x, x, x, x, gate, scale, rows, 1e-6)
        yield f"{label} first", norm_forward, (x, None, None, shift, scale, rows.row_of, 1e-6)
        yield f"{label} first", norm_backward, (x, x, x, None, None, scale, rows, 1e-6)
        # a step table's row for all rows: float32, without a row stride
        gate, shift, scale = torch.empty(1, 6, dim).unbind(1)[:3]
        yield f"{label} table", norm_forward, (x, x, gate, shift, scale, rows.row_of, 1e-6)
        if dim == 256:  # a plain transformer's block
            plain = (x, x, None, shift[:1], scale[:1])
            yield f"{label} affine", norm_forward, (*plain, None, 1e-5, True)
            yield f"{label} affine", norm_backward, (x, x, x, x, None, scale[:1], None, 1e-5, True)
    for dim, dtype in itertools.product((256, 768, 1024), dtypes):
        label = f"D={dim} conv {dtype}"
        x = torch.empty(frames, dim, dtype=dtype)
        weight, bias = torch.empty(dim, dim // 16, 31, dtype=dtype), torch.empty(dim, dtype=dtype)
        for causal, residual in ((False, x), (True, None)):
            name = f"{label} causal" if causal else label
            yield name, conv_forward, (x, weight, bias, *rows[:3], causal, residual)
        yield label, conv_backward, (x, x, weight, bias, *rows[:3], False)
    for dtype in dtypes:
        label = f"text tower {dtype}"
        x, h = (torch.empty(frames, width, dtype=dtype) for width in (512, 1024))
        vectors, wide = (torch.empty(3, t.shape[1], dtype=dtype).unbind() for t in (x, h))
        weight = torch.empty(512, 1, 7, dtype=dtype)
        yield label, depthwise_conv, (x, weight, *vectors, rows.row_of, 1e-6)
        yield label, grn, (h, *wide[:2], *rows[:3])
        yield f"{label} backward", grn_sums, (h, h, *rows[:2])
    for channels, dtype in itertools.product((80, 256, 512), dtypes):
        label = f"{channels} to 256 {dtype}"
        x, h = (torch.empty(frames, width, dtype=dtype) for width in (channels, 256))
        weight = torch.empty(256, 320 if channels == 80 else channels, 3, dtype=dtype)[:, :channels]
        norm = torch.empty(2, 256, dtype=dtype).unbind()
        bias, shift = norm[0], torch.empty(1, 256)
        where = (rows.starts, rows.row_of, 1e-5)
        yield f"{label} alone", conv, (x, weight, bias, None, None, None, None, *where, False)
        for keep in (False, True):  # with a state's share, a first and a second block
            name = f"{label} kept" if keep else label
            given = bias, None, norm, shift, None
            if channels == 80:
                yield f"{name} share", conv, (x, weight, None, h, *given[2:], *where, keep)
            yield f"{name} first", conv, (x, weight, *given, *where, keep)
            yield f"{name} second", conv, (x, weight, *given[:3], None, h, *where, keep)
        yield label, conv_norm_backward, (h, h, *norm, rows, 1e-5)
    for (heads, width), dtype in itertools.product(((16, 64), (8, 32), (8, 128)), dtypes[:2]):
        label = f"H={heads}x{width} {dtype}"
        qkv = torch.empty(frames, 3, heads, width, dtype=dtype)
        angles, weight = torch.empty(937, width), torch.empty(width, dtype=dtype)
        where = (angles, rows.starts, rows.row_of)
        no_norm = (None, None, 1e-6)
        yield f"{label} in place", rope, (qkv, *where, heads, *no_norm, qkv)
        yield f"{label} first head", rope, (qkv, *where, 1, *no_norm, qkv)
        yield f"{label} norm", rope, (qkv, *where, heads, weight, weight, 1e-6, qkv)
        yield f"{label} apart", rope, (qkv, *where, 1, *no_norm, qkv.clone())
        yield f"{label} inverse", rope, (qkv, *where, heads, *no_norm, qkv.clone(), True)
        yield f"{label} norm", rope_norm_backward, (qkv, qkv, rows.row_of, weight, weight, 1e-6)
        out, lse = torch.empty(frames, heads, width, dtype=dtype), torch.empty(heads, frames)
        for chunk in (None, torch.tensor([50, 50])):
            name = f"{label} full" if chunk is None else f"{label} streaming"
            q, kv, where = qkv[:, 0], qkv[:, 1:], (rows.starts, rows.lengths)
            yield name, attention.forward, (q, kv, rows, *where, chunk, 0.125)
            yield name, attention.backward, (out, qkv, out, lse, rows, chunk, 0.125)
        where = (rows.lengths, rows.lengths, torch.tensor([50, 50]), 0.125)
        cache = torch.empty(4000, 2, heads, width, dtype=dtype)
        yield f"{label} cached", attention.forward, (qkv[:, 0], cache, rows, *where)


def fp8_forms() -> Iterator[tuple[str, Callable[..., object], tuple[Any, ...]]]:
    """The same for the kernels that write FP8."""
    dims, dtypes = (192, 256, 768, 1024, 2048), (torch.float32, torch.bfloat16)
    rows = Rows.padded(torch.tensor([937, 500]), 937)
    frames = len(rows.row_of)
    for dim, dtype in itertools.product(dims, dtypes):
        label = f"D={dim} {dtype}"
        x = torch.empty(frames, dim, dtype=dtype)
        yield f"{label} fp8", quantize, (x, False)
        yield f"{label} fp8 gelu", quantize, (x, True)
        for name, rows_of_table, table in (("", 2, dtype), (" table", 1, torch.float32)):
            modulation = torch.empty(rows_of_table, 6 * dim, dtype=table)
            gate, shift, scale = modulation.chunk(6, dim=1)[:3]
            tail = (rows.row_of, 1e-6, True)
            yield f"{label} fp8{name}", norm_forward, (x, x, gate, shift, scale, *tail)
            yield f"{label} fp8 first{name}", norm_forward, (x, None, None, shift, scale, *tail)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and shared memory as `cuobjdump` reads them; spills show as stack."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text))
    return {name.lower(): int(value) for name, value in found.items()}


def compile_all(brief: bool = False) -> Iterator[dict[str, Any]]:
    """Compile every form for every architecture."""
    compiled: list[tuple[Any, Any]] = []
    known = set()

    def compile_only(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if not (brief and kernel in known):
            compiled.append((kernel, kernel.warmup(*args, grid=grid, **options)))
            known.add(kernel)

    _triton.launcher = compile_only
    for architecture in ARCHITECTURES[-1:] if brief else ARCHITECTURES:
        driver.set_active(NoDevice(architecture))
        fp8 = fp8_forms() if architecture >= FP8_FROM else ()
        for label, launcher, args in itertools.chain(forms(), fp8):
            launcher(*args)
            for kernel, binary in compiled:
                file = Path(kernel.fn.__code__.co_filename).stem
                yield {
                    "op": file.removeprefix("_").removesuffix("_kernels"),
                    "kernel": kernel.fn.__name__,
                    "form": label,
                    "architecture": f"sm_{architecture}",
                    "vector_bits": vector_bits(binary.asm["ptx"]),
                    **resources(binary.asm["cubin"]),
                    "shared": binary.metadata.shared,
                    "warps": binary.metadata.num_warps,
                    "waits": "griddepcontrol.wait" in binary.asm["ptx"],
                }
            compiled.clear()


def vector_bits(ptx: str) -> int:
    """Width of the widest global load of a thread, into registers or into shared memory."""
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.\S+ \[.*?\], \[.*?\], 0x([0-9a-f]+)", ptx)
    widths = [int(count or 1) * int(bits) for count, bits in loads]
    return max([*widths, *(8 * int(size, 16) for size in copies)], default=0)


if __name__ == "__main__":
    print(json.dumps(list(compile_all("--brief" in sys.argv)), indent=1))
