"""Operations of one evaluation, counted without a GPU on tensors without data.

    python -m benchmarks.count

Every operation that PyTorch dispatches is one, attention and each fused op included; views are
none. "a block" is what one more block adds. FLOPs are those of matrix products, convolutions and
attention; bytes are what operations read and write, in float32. Beside this library's models stands
F5-TTS's own, where `f5-tts` is installed. How many kernels an operation launches only a profiler on
a GPU can say.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

os.environ["TRITON_INTERPRET"] = "1"  # the fused ops, without a device; none of them runs

import imf_kernels
from benchmarks import f5_client, report
from benchmarks.workload import VOCABULARY
from imf_kernels.models import CausalUNet, CausalUNetConfig, DiT, DiTConfig, TextConfig
from imf_kernels.models.linears import FusedLinears
from imf_kernels.models.step_tables import StepTables

FRAMES = 1250  # 10 s generated after a 3.3 s prompt, at 93.75 frames a second


class Count(NamedTuple):
    """Operations, FLOPs and bytes of one evaluation; `by_name` for the curious."""

    operations: int
    flops: float
    nbytes: float
    by_name: Counter[str]


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        out = func(*args, **(kwargs or {}))
        if not (func.is_view or func.namespace == "prim" or "detach" in str(func)):
            self.names[str(func)] += 1
            leaves = tree_leaves((args, kwargs, out))
            self.nbytes += sum(t.nbytes for t in leaves if isinstance(t, Tensor))
        return out


def count(evaluate: Callable[[], Any]) -> Count:
    """What `evaluate` does, on tensors of the "meta" device."""
    flops = flop_counter.FlopCounterMode(
        display=False,
        custom_mapping={
            torch.ops.imf_kernels.attention: _attention_flops,
            torch.ops.imf_kernels.causal_conv: _conv_flops,
            torch.ops.imf_kernels.grouped_conv_mish: _conv_flops,
            torch.ops.aten._addmm_activation: _addmm_flops,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops,
        },
    )
    with flops, _Counting() as counting:
        evaluate()
    total = sum(counting.names.values())
    return Count(total, flops.get_total_flops(), counting.nbytes, counting.names)


def _attention_flops(qkv: Any, starts: Any, *_: Any, **__: Any) -> int:
    """Of rows that fill their frames evenly; there is a start more than rows."""
    frames, _, heads, width = qkv
    return 4 * frames * (frames // max(starts[0] - 1, 1)) * heads * width


def _conv_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * x[0] * math.prod(weight)


def _addmm_flops(bias: Any, a: Any, b: Any, **_: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _sdpa_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return flop_counter.sdpa_flop_count(q, k, v)


def ours(
    variant: str,
    guided: bool,
    frames: int,
    packed: bool = False,
    training: bool = False,
    **sizes: int,
) -> Count:
    """One evaluation of a student from step tables, or of a guided teacher; or the forward pass of
    a student in training."""
    patches = (
        # addresses, by which storage is known to be fused, do not exist here
        mock.patch.object(FusedLinears, "fuse", lambda self, layers: self.whole),
        mock.patch("imf_kernels.ops.linear._epilogue_is_tanh", return_value=True),
    )
    with torch.device("meta"), torch.no_grad(), imf_kernels.backend("triton"):
        model, tables = _unet(**sizes) if variant == "cosyvoice2" else _dit(variant, **sizes)
        model.fuse_weights()
        with patches[0], patches[1]:
            given = {
                name: torch.zeros(spec.shape(1, frames), dtype=spec.dtype)
                for name, spec in model.inputs.items()
            }
            cond = model.prepare(**given, guided=guided, packed=frames if packed else False)
            x = torch.zeros(1, frames, model.config.channels)
            if not training:
                return count(lambda: model.evaluate(x, tables.at(0), cond))
            t = torch.zeros(1)
            e = torch.zeros(1, model.config.dim, requires_grad=True)
            with (
                torch.enable_grad(),
                mock.patch.object(FusedLinears, "fused", return_value=True),
                mock.patch.object(type(model), "embed_time", return_value=e),  # wants autocast
            ):
                return count(lambda: model(x, t, t, cond))


def _dit(variant: str, **sizes: int) -> tuple[Any, StepTables]:
    text = TextConfig(vocab=VOCABULARY) if variant.startswith("f5") else None
    config = DiTConfig.for_variant(variant, text=text, mixer=True, **sizes)
    tables = torch.zeros(1, 1, config.depth, 6, config.dim), torch.zeros(1, 1, 2, config.dim)
    return DiT(config), StepTables(*tables)


def _unet(depth: int) -> tuple[Any, StepTables]:
    """The public size; `depth` transformer blocks after each ResNet block."""
    config = CausalUNetConfig(depth=depth, mixer=True)
    blocks = torch.zeros(1, 1, config.mid_blocks + 2, config.dim)
    return CausalUNet(config), StepTables(blocks, blocks[:, :, :0])


def clients(guided: bool, frames: int, **sizes: int) -> Count | None:
    """One evaluation of F5-TTS's own DiT (its text embedding cached), where it is installed."""
    try:
        dit = f5_client.load().DiT
    except ImportError:
        return None
    with FakeTensorMode(), torch.no_grad():
        model = dit(**sizes, ff_mult=2, text_num_embeds=VOCABULARY, text_dim=512, conv_layers=4)
        model = model.eval()
        x = torch.zeros(1, frames, 100)
        text, t = torch.zeros(1, 140, dtype=torch.int64), torch.zeros(())
        arguments = {"x": x, "cond": x, "text": text, "time": t, "cache": True}
        arguments |= {"cfg_infer": True} if guided else {}
        model(**arguments)
        return count(lambda: model(**arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=22)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--names", action="store_true", help="also every operation by name")
    args = parser.parse_args()
    results: dict[str, dict[str, Any] | None] = {}
    for guided in (False, True):
        kind = "guided" if guided else "unguided"
        for variant in ("f5_v0", "f5_v1", "cosyvoice3"):
            results[f"{variant}, {kind}"] = _row(functools.partial(ours, variant), guided, args)
        run = functools.partial(ours, "f5_v1", packed=True)
        results[f"f5_v1 packed, {kind}"] = _row(run, guided, args)
        if not guided:
            run = functools.partial(ours, "f5_v1", training=True)
            results["f5_v1 in training"] = _row(run, guided, args)
        results[f"F5-TTS's own, {kind}"] = _row(clients, guided, args)
        run = functools.partial(ours, "cosyvoice2")
        results[f"cosyvoice2, {kind}"] = _difference(run, guided, args.frames, 4, _UNET_STACKS)
    print(f"{'':<26}{'operations':>11}{'a block':>9}{'GFLOP':>8}{'MB':>8}")
    for name, row in results.items():
        if row is None:
            print(f"{name:<26}{'f5-tts is not installed':>27}")
            continue
        print(
            f"{name:<26}{row['operations']:>11}{row['a block']:>9}"
            f"{row['flops'] / 1e9:>8.0f}{row['bytes'] / 1e6:>8.0f}"
        )
        if args.names:
            for operation, times in row["names"].items():
                print(f"    {times:>5} {operation}")
    report.write(args.out, results)


_UNET_STACKS = 14
"""Stacks of transformer blocks in CosyVoice2's estimator: one block more in `depth` is 14."""


def _row(run: Callable[..., Count | None], guided: bool, args: Any) -> dict[str, Any] | None:
    sizes = {"dim": args.dim, "heads": args.dim // 64}
    return _difference(functools.partial(run, **sizes), guided, args.frames, args.depth)


def _difference(
    run: Callable[..., Count | None], guided: bool, frames: int, depth: int, stacks: int = 1
) -> dict[str, Any] | None:
    whole, less = (run(guided, frames, depth=d) for d in (depth, depth - 1))
    if whole is None or less is None:
        return None
    return {
        "operations": whole.operations,
        "a block": (whole.operations - less.operations) // stacks,
        "flops": whole.flops,
        "bytes": whole.nbytes,
        "names": dict(whole.by_name.most_common()),
    }


if __name__ == "__main__":
    main()
