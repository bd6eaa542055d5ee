"""Operations of one evaluation, counted without a GPU on tensors without data.

    python -m benchmarks.count

Every operation that PyTorch dispatches is one, attention and each fused op included; views are
none. "a block" is what one more block adds. FLOPs and bytes are `benchmarks.operations`', in
float32. Beside this library's models stands F5-TTS's own, where `f5-tts` is installed. How many
kernels an operation launches only a profiler on a GPU can say.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import imf_kernels
from benchmarks import f5_client, facts
from benchmarks.operations import Count, count
from benchmarks.workload import VOCABULARY
from imf_kernels.models import CausalUNet, CausalUNetConfig, DiT, DiTConfig, TextConfig
from imf_kernels.models.step_tables import StepTables

FRAMES = 1250  # 10 s generated after a 3.3 s prompt, at 93.75 frames a second


def ours(
    variant: str,
    guided: bool,
    frames: int,
    packed: bool = False,
    training: bool = False,
    **sizes: int,
) -> Count:
    """One evaluation within a solve, of a student from step tables or of a guided teacher; or the
    forward pass of a student in training."""
    with without_data(), torch.no_grad():
        model, tables = _unet(**sizes) if variant == "cosyvoice2" else _dit(variant, **sizes)
        model.fuse_weights()
        given = {
            name: torch.zeros(spec.shape(1, frames), dtype=spec.dtype)
            for name, spec in model.inputs.items()
        }
        cond = model.prepare(**given, guided=guided, packed=frames if packed else False)
        x = torch.zeros(1, frames, model.config.channels)
        if not training:
            cond = model.lay_out(cond, 1)
            return count(lambda: model.evaluate(x, tables.at(0), cond))
        t = torch.zeros(1)
        with torch.enable_grad():
            return count(lambda: model(x, t, t, cond))


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """On the "meta" device, with the fused ops: what they look for there is not to be found."""
    with (
        torch.device("meta"),
        imf_kernels.backend("triton"),
        mock.patch("imf_kernels.dispatch.INTERPRETED", True),  # a GPU; no kernel runs
        mock.patch("imf_kernels.models.linears._lie_in", _yes),  # addresses
        mock.patch("imf_kernels.ops.linear._epilogue_is_tanh", _yes),
        mock.patch("torch.autocast", _no_autocast),
    ):
        yield


def _yes(*_: Any) -> bool:
    """No mock, which would keep its arguments alive."""
    return True


@contextlib.contextmanager
def _no_autocast(*_: Any, **__: Any) -> Iterator[None]:
    yield


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
    facts.write(args.out, results)


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
