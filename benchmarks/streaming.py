"""An incremental streaming solve against solving the whole prefix again for every block.

    python -m benchmarks.streaming --out benchmarks/results/cpu/streaming.json

Blocks of 50 frames (1 s) arrive one by one; both contenders answer each before the next, in turn,
with the same model and kernels, float32, under the streaming mask: `imf_kernels.streaming`
evaluates the new block behind its caches, the other (CosyVoice's own way) all frames so far.
Students take 1 and 3 steps, the guided teacher 10 of two branches. Public widths; depths are cut
where re-solving would take too long, and stated in every row. A first run over 3 blocks has to give
the same mel to 1e-5, relative RMS, before anything is timed, and so do all that are timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import facts
from benchmarks.timing import milliseconds
from benchmarks.workload import error
from imf_kernels import guidance, sampler
from imf_kernels.models import CausalUNet, CausalUNetConfig, DiT, DiTConfig
from imf_kernels.models.estimator import Estimator
from imf_kernels.streaming import Streams

BOUND = 1e-5
W = guidance.from_cosyvoice(0.7)
STEPS = {1: None, 3: None, 10: W}
"""Evaluations, and the guidance of a teacher."""


def unet(**sizes: Any) -> Callable[[bool], Estimator]:
    return lambda mixer: CausalUNet(CausalUNetConfig(**sizes, mixer=mixer))


def dit(**sizes: Any) -> Callable[[bool], Estimator]:
    return lambda mixer: DiT(DiTConfig.for_variant("cosyvoice3", **sizes, mixer=mixer))


WIDE = {"dim": 1024, "heads": 16}
MODELS = {
    "unet": {1: unet(), 3: unet(), 10: unet(mid_blocks=1, depth=1)},
    "dit": {1: dit(**WIDE, depth=4), 3: dit(**WIDE, depth=4), 10: dit(**WIDE, depth=1)},
}
QUICK = {
    "unet": dict.fromkeys(STEPS, unet(dim=32, mid_blocks=1, depth=1, heads=1)),
    "dit": dict.fromkeys(STEPS, dit(dim=32, heads=1, depth=1)),
}


def build(make: Callable[[bool], Estimator], mixer: bool, args: argparse.Namespace) -> Estimator:
    """With random weights: a fresh DiT answers 0."""
    torch.manual_seed(0)
    model = make(mixer)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.to(args.device, getattr(torch, args.dtype)).eval().requires_grad_(False)


class Run(NamedTuple):
    """Milliseconds of every block, by contender; how far they are apart; frames and bytes."""

    blocks: dict[str, list[float]]
    difference: float
    frames: dict[str, int]
    nbytes: int


def run(model: Any, nfe: int, w: float | None, blocks: int) -> Run:
    """Both contenders over an utterance, block by block."""
    chunk, channels, device = model.config.chunk, model.config.channels, model.last.weight.device
    mu, noise = torch.randn(2, blocks * chunk, channels, device=device).unbind()
    spks = torch.randn(channels, device=device)
    streams = Streams(model, "cosine", nfe, guidance=w, frames=len(mu))
    mels: dict[str, list[Tensor]] = {"incremental": [], "prefix": []}
    times: dict[str, list[float]] = {name: [] for name in mels}
    again = 0
    with streams.open(len(mu), spks=spks, noise=noise) as stream, torch.no_grad():
        for end in range(chunk, len(mu) + 1, chunk):

            def incremental(end: int = end) -> None:
                stream.feed(mu[end - chunk : end])
                mels["incremental"].append(stream.drain())

            def prefix(end: int = end) -> None:
                cond = model.prepare(
                    torch.zeros_like(mu[None, :end]),
                    mu=mu[None, :end],
                    spks=spks[None],
                    guided=w is not None,
                    streaming=True,
                )
                mel = sampler.sample(model, noise[None, :end], cond, "cosine", nfe=nfe, guidance=w)
                mels["prefix"].append(mel[0, end - chunk :])

            for name, contender in (("incremental", incremental), ("prefix", prefix)):
                times[name].append(milliseconds(contender, device))
            again += nfe * streams.branches * end
        frames = {"incremental": streams.frames_evaluated, "prefix": again}
        difference = error(torch.cat(mels["incremental"]), torch.cat(mels["prefix"]))
        return Run(times, difference, frames, stream.nbytes)


def checked(run: Run) -> Run:
    if not run.difference <= BOUND:
        raise ArithmeticError(f"the results differ by {run.difference:.1e}, relative RMS")
    return run


def measure(model: Any, nfe: int, w: float | None, seconds: int, rounds: int) -> dict[str, Any]:
    runs = [checked(run(model, nfe, w, seconds)) for _ in range(rounds)]

    def median(of: Callable[[list[float]], float]) -> dict[str, float]:
        return {
            name: statistics.median(of(one.blocks[name]) for one in runs) for name in runs[0].blocks
        }

    total = median(sum)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "attention_layers": model.cache_sizes.layers,
        "nfe": nfe,
        "guided": w is not None,
        "seconds": seconds,
        "frames_evaluated": runs[0].frames,
        "stream_bytes": runs[0].nbytes,
        "ms": total,
        "last_block_ms": median(lambda blocks: blocks[-1]),
        "max_relative_rms": max(one.difference for one in runs),
        "ratio": total["prefix"] / total["incremental"],
    }


HEADER = (
    f"{'model':<8}{'layers':>7}{'steps':>12}{'audio':>7}{'frames evaluated':>22}{'MB':>9}"
    f"{'seconds':>18}{'':>8}{'last block, ms':>18}"
)


def line(row: dict[str, Any]) -> str:
    frames, ms, last = row["frames_evaluated"], row["ms"], row["last_block_ms"]
    steps = f"{row['nfe']}{' guided' if row['guided'] else ''}"
    seconds = f"{ms['incremental'] / 1e3:.2f} / {ms['prefix'] / 1e3:.2f}"
    return (
        f"{row['model']:<8}{row['attention_layers']:>7}{steps:>12}{row['seconds']:>5} s"
        f"{frames['incremental']:>11} / {frames['prefix']:<8}{row['stream_bytes'] / 1e6:>9.1f}"
        f"{seconds:>18}{row['ratio']:>7.2f}x"
        f"{last['incremental']:>10.0f} / {last['prefix']:.0f}"
    )


def parser() -> argparse.ArgumentParser:
    found = facts.parser(__doc__, rounds=1)
    found.add_argument("--seconds", type=int, nargs="+", default=[5, 10, 30])
    found.add_argument("--nfe", type=int, nargs="+", default=list(STEPS), choices=STEPS)
    found.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--quick", action="store_true", help="tiny models, 2 and 3 s")
    found.set_defaults(device="cpu", dtype="float32")
    return found


def main() -> int:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    found = facts.Report("streaming", args, threads=args.threads, quick=args.quick)
    print(f"{HEADER}\n(incremental / solving the prefix again)")
    for name in args.models:
        for nfe in args.nfe:
            w = STEPS[nfe]
            with found.attempt(f"{name}, {nfe} steps"):
                model = build((QUICK if args.quick else MODELS)[name][nfe], w is None, args)
                checked(run(model, nfe, w, 3))
                for seconds in [2, 3] if args.quick else args.seconds:
                    row = {"model": name, **measure(model, nfe, w, seconds, args.rounds)}
                    found.add(row, line(row))
    return found.finish()


if __name__ == "__main__":
    sys.exit(main())
