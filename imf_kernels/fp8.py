"""FP8 at inference: which products gain from it on this device, and what it costs in the mel::

    student = fp8.quantize(student, frames=[1250, 4096])    # the frames that will be served
    print(fp8.accuracy(original, student, noise, conditions, nfe=3, bound=0.05))

`models.DiT.fp8` makes the model. An FP8 layer holds no bfloat16 copy of its weights, so a layer
cannot change its mind from one request to the next: it is chosen once, for the frames that the
caller says will be served, and where FP8 is slower the layer stays in bfloat16.
"""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imf_kernels import checks, masks
from imf_kernels.models import linears
from imf_kernels.models.config import FP8_LAYERS
from imf_kernels.models.dit import DiT
from imf_kernels.ops.fp8_linear import runs_on
from imf_kernels.ops.quantize_rows import quantize_rows
from imf_kernels.sampler import sample


class Timing(NamedTuple):
    """Microseconds of one block's layer over a number of frames, in bfloat16 and in FP8."""

    layer: str
    frames: int
    bfloat16: float
    fp8: float


class Accuracy(NamedTuple):
    """Of a solved mel against float32's: RMS of the error over that of the mel, largest error."""

    relative_rms: float
    max_abs: float


def quantize(model: DiT, frames: Sequence[int] | None = None) -> DiT:
    """`model.fp8()`, of the layers that are faster so.

    Args:
        frames: Frames of an evaluation (rows times frames, twice when guided) as they will be
            served; a number that comes more often weighs more. Measured here (`measure`), on the
            model's device. None: nothing is measured, all layers are quantised.

    What stays in bfloat16 is said in a warning.
    """
    if not isinstance(model, DiT):
        raise TypeError(f"model: expected a DiT, got {type(model).__name__}")
    if frames is None:
        return model.fp8()
    device = model.proj_out.weight.device
    if not runs_on(device):
        _warn(f"no layer is in FP8: {device} has no such products")
        return model.fp8(layers=())
    timings = measure(model, frames)
    chosen = []
    for layer in FP8_LAYERS:
        own = [timing for timing in timings if timing.layer == layer]
        if sum(timing.fp8 for timing in own) < sum(timing.bfloat16 for timing in own):
            chosen.append(layer)
        else:
            times = ", ".join(
                f"{timing.fp8:.1f} us against {timing.bfloat16:.1f} over {timing.frames} frames"
                for timing in own
            )
            _warn(f"the layer {layer!r} stays in bfloat16: FP8 takes {times}")
    return model.fp8(chosen)


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


@torch.no_grad()
def measure(model: DiT, frames: Sequence[int]) -> list[Timing]:
    """Time every layer of `FP8_LAYERS` both ways, for each number of frames.

    As they run in the model: in a CUDA graph, on the weights of all blocks in turn, which do not
    stay in the cache; with the GELU, and with the quantisation where no norm has done it.

    Raises:
        ValueError: no frames, a model in FP8, or a device without FP8 products.
    """
    if not frames:
        raise ValueError(f"frames: expected one number of frames or more, got {frames!r}")
    for count in frames:
        checks.positive_int("frames", count)
    device = model.proj_out.weight.device
    if not runs_on(device):
        raise ValueError(f"model: expected a device with FP8 products, got {device}")
    quantised = model.fp8()
    plain = copy.deepcopy(model).to(torch.bfloat16).eval()
    inner = model.config.heads * model.config.head_dim
    timings = []
    for layer in FP8_LAYERS:
        for count in frames:
            width = inner if layer == "out" else model.config.dim
            x = torch.randn(count, width, dtype=torch.bfloat16, device=device)
            written = x if layer == "out" else quantize_rows(x)  # by the norm before
            runs = partial(_run, plain, layer, x), partial(_run, quantised, layer, written)
            times = (_microseconds(run, device) / model.config.depth for run in runs)
            timings.append(Timing(layer, count, *times))
    return timings


def _run(model: DiT, layer: str, x: Any) -> None:
    """One layer, in every block."""
    block: Any
    for block in model.transformer_blocks:
        if layer == "qkv":
            block.attn.project(x)
        elif layer == "out":
            linears.apply(block.attn.to_out[0], x)
        else:
            block.ff(x)


def _microseconds(run: Callable[[], None], device: torch.device, rounds: int = 20) -> float:
    """Median time of a replay."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        times = []
        for _ in range(rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def accuracy(
    model: DiT,
    quantised: DiT,
    noise: Tensor,
    conditions: Mapping[str, Any],
    grid: str | Tensor | Sequence[float] = "uniform",
    *,
    nfe: int | None = None,
    guidance: Tensor | float | None = None,
    bound: float | None = None,
) -> Accuracy:
    """The error of the FP8 model's mels, solved from the same noise as the float32 model's.

    Args:
        model: In float32.
        quantised: Its copy in FP8, or any other.
        noise, grid, nfe, guidance: As for `sampler.sample`.
        conditions: Arguments of `prepare`.
        bound: The largest relative RMS that is accepted.

    Raises:
        RuntimeError: the error is beyond the bound.
        ValueError, TypeError: naming the argument, the expected and the given value.
    """
    if model.dtype != torch.float32:
        raise ValueError(f"model: expected one in float32, got {model.dtype}")

    def solved(model: DiT) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            cond = model.prepare(**conditions, guided=guidance is not None)
        mel = sample(model, noise, cond, grid, nfe=nfe, guidance=guidance)
        return mel, masks.inside(cond["lengths"][: len(noise)], noise.shape[1])

    (mel, inside), (got, _) = solved(model), solved(quantised)
    error, mel = (got - mel)[inside], mel[inside]
    result = Accuracy(
        float(error.square().mean().sqrt() / mel.square().mean().sqrt()), float(error.abs().max())
    )
    if bound is not None and not result.relative_rms <= bound:  # NaN is beyond it
        raise RuntimeError(
            f"quantised: expected mels within a relative RMS of {bound} of float32's, got {result}"
        )
    return result
