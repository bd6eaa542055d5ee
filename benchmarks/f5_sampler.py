"""F5-TTS's own sampler against this library's, on the CPU, with the same weights in one process.

    python -m benchmarks.f5_sampler --out benchmarks/results/cpu/f5_sampler.json

Needs PyPI's `f5-tts` (`make bench-cpu` installs it). Sizes of F5TTS_v1_Small with random weights,
float32, 2 threads, 5 s of speech, 1.6 s of them the prompt. Two comparisons, contenders in turn:

    equal      3 guided evaluations each (and 3 unguided), the results equal to 1e-4
    default    the client's 32 guided evaluations against a student's 3 unguided ones, both with
               everything that a call does: text tower, prompt, noise

Freed activations are kept by the process for all contenders alike: `make bench-cpu` sets
MALLOC_TRIM_THRESHOLD_, without which the C library gives them back and faults them in again.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import imf_kernels
from benchmarks import f5_client, facts
from benchmarks.timing import interleaved
from imf_kernels import grids, guidance, sampler
from imf_kernels.models import DiT

SIZES = {
    "small": {"dim": 768, "depth": 18, "heads": 12, "text_dim": 512, "conv_layers": 4},
    "tiny": {"dim": 64, "depth": 2, "heads": 1, "text_dim": 32, "conv_layers": 2},
}
FRAMES_A_SECOND = 93.75
PROMPT_SHARE = 0.32
STRENGTH = 2.0  # the client's cfg_strength


class Contenders:
    """The client and this library on the same weights, prompt and text."""

    def __init__(self, size: str, seconds: float) -> None:
        torch.manual_seed(0)
        client = f5_client.load()
        net = client.DiT(ff_mult=2, text_num_embeds=2545, mel_dim=100, **SIZES[size])
        for parameter in net.parameters():
            if not parameter.any():  # an untrained one would answer 0
                torch.nn.init.normal_(parameter, std=0.02)
        self.client = client.CFM(transformer=net, mel_spec_kwargs={"n_mel_channels": 100}).eval()
        self.model = DiT.from_state_dict(net.state_dict(), "f5_v1").eval()
        self.frames = round(seconds * FRAMES_A_SECOND)
        self.prompt = torch.randn(1, round(PROMPT_SHARE * self.frames), 100)
        self.text = torch.randint(0, 2545, (1, round(14 * seconds)))

    def theirs(self, nfe: int, strength: float) -> Tensor:
        with torch.inference_mode():
            mel, _ = self.client.sample(
                self.prompt,
                self.text,
                self.frames,
                steps=nfe,
                cfg_strength=strength,
                sway_sampling_coef=-1,
                seed=0,
            )
        return mel

    def ours(self, nfe: int, strength: float) -> Tensor:
        with torch.inference_mode():
            torch.manual_seed(0)
            noise = torch.randn(1, self.frames, 100)
            prompt = torch.zeros(1, self.frames, 100)
            prompt[:, : self.prompt.shape[1]] = self.prompt
            cond = self.model.prepare(prompt, text=self.text, guided=strength > 0)
            w = guidance.from_f5(strength) if strength > 0 else None
            mel = sampler.sample(self.model, noise, cond, grids.sway(nfe), guidance=w)
            mel[:, : self.prompt.shape[1]] = self.prompt
        return mel


def run(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    pair = Contenders(args.size, args.seconds)
    cpu = torch.device("cpu")
    rows = []
    for strength in (STRENGTH, 0.0):
        error = float((pair.theirs(3, strength) - pair.ours(3, strength)).abs().max())
        times = interleaved(
            {
                "client": lambda s=strength: pair.theirs(3, s),
                "ours": lambda s=strength: pair.ours(3, s),
            },
            cpu,
            args.rounds,
            warm_ups=1,
        )
        kind = "equal, guided" if strength else "equal, unguided"
        rows.append(_row(kind, times, error))
    times = interleaved(
        {"client": lambda: pair.theirs(args.nfe, STRENGTH), "ours": lambda: pair.ours(3, 0.0)},
        cpu,
        max(args.rounds // 3, 1),
        warm_ups=1,
    )
    rows.append(_row(f"default, {args.nfe} guided to 3", times, None))
    return {
        "cpu": facts.cpu_name(),
        "threads": args.threads,
        "size": args.size,
        "seconds": args.seconds,
        "malloc": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
        "versions": facts.versions("torch", "f5-tts", "torchdiffeq", "x-transformers"),
        "commit": facts.commit(),
        "backends": imf_kernels.backends(),
        "command": shlex.join(["python", "-m", "benchmarks.f5_sampler", *sys.argv[1:]]),
        "rows": rows,
    }


def _row(kind: str, times: dict[str, Any], error: float | None) -> dict[str, Any]:
    wrong = error is not None and not error <= 1e-4
    ratio = times["client"].median / times["ours"].median
    return {
        "comparison": kind,
        "ms": {name: value._asdict() for name, value in times.items()},
        "max_abs_difference": error,
        "ratio": None if wrong else ratio,
    }


def line(row: dict[str, Any]) -> str:
    ms = row["ms"]
    ratio = "WRONG" if row["ratio"] is None else f"{row['ratio']:.2f}x"
    return (
        f"{row['comparison']:<26}{ms['client']['median']:>10.0f} ms"
        f"{ms['ours']['median']:>10.0f} ms{ratio:>10}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nfe", type=int, default=32, help="of the client's default")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    args = parser.parse_args()
    results = run(args)
    print(f"{'':<26}{'F5-TTS':>13}{'ours':>13}")
    for row in results["rows"]:
        print(line(row))
    facts.write(args.out, results)


if __name__ == "__main__":
    main()
