"""Where a solve's time goes, by torch.profiler: by ranges, then by kernels.

    python -m benchmarks.profile --model f5_base --nfe 3 --device cpu --seconds 5

    count, total, mean   of each range (`imf_kernels.profiling.SPANS`), on the host
    share                of the outermost ranges' time
    self                 without the ranges inside it
    device               of the kernels launched within, and of those outside of ranges inside it

On a GPU the eager solve is followed by the same request to a `GraphSampler`. Then comes what one
evaluation launches (on the CPU, which has no kernels, its operations), and what its operations take
beside the floor of each: the longer of its FLOPs and bytes at the rates that a long product and a
long copy reach here.

`--nsight` does the same solves without torch.profiler, for nsys and ncu to look at; `--operations`
prints the table of docs/profiling.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import count, facts
from benchmarks.launches import by_operation, launches
from benchmarks.timing import Ceilings, Run, synchronize
from benchmarks.workload import PROMPT_SECONDS, SIZES, build, request
from imf_kernels import profiling, sampler
from imf_kernels.graphs import GraphSampler

NAMES = {f"{profiling.DOMAIN}::{name}": name for name in profiling.SPANS}


def ranges(run: Run, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """What is known of each range in `rounds` calls, times in milliseconds of one call."""
    run()
    synchronize(device)
    cuda = device.type == "cuda"
    profiling.enable("torch")
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as trace:
        for _ in range(rounds):
            run()
        synchronize(device)
    profiling.disable()
    rows = {name: dict.fromkeys(("count", *TIMES), 0.0) for name in profiling.SPANS}
    whole = 0.0
    for event in trace.events():
        if event.name not in NAMES or event.device_type != DeviceType.CPU:
            continue  # a GPU's timeline repeats ranges
        host, on_device = event.cpu_time_total / 1e3, event.device_time_total / 1e3
        within = event.cpu_parent
        while within is not None and within.name not in NAMES:
            within = within.cpu_parent
        row = rows[NAMES[event.name]]
        row["count"] += 1
        for key, ms in zip(TIMES, (host, host, on_device, on_device), strict=True):
            row[key] += ms
        if within is None:
            whole += host
        else:
            outer = rows[NAMES[within.name]]
            outer["self"] -= host
            outer["device self"] -= on_device
    return [
        {
            "range": name,
            "count": int(row["count"]) / rounds,
            **{key: row[key] / rounds for key in TIMES},
            "mean": row["total"] / row["count"],
            "share": row["total"] / whole,
        }
        for name, row in rows.items()
        if row["count"]
    ]


TIMES = ("total", "self", "device", "device self")


def table(title: str, rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{title} (milliseconds of one call)",
        f"{'range':<14}{'count':>7}{'total':>10}{'mean':>10}{'share':>8}{'self':>10}"
        f"{'device':>10}{'self':>10}",
    ]
    lines += [
        f"{row['range']:<14}{row['count']:>7g}{row['total']:>10.3f}{row['mean']:>10.3f}"
        f"{row['share']:>8.1%}{row['self']:>10.3f}{row['device']:>10.3f}{row['device self']:>10.3f}"
        for row in rows
    ]
    return "\n".join([*lines, ""])


def launched(found: dict[str, Any]) -> str:
    lines = [f"one evaluation: {found['count']:g} launches, {found['copies']:g} copies"]
    lines += [f"{'count':>7}{'us':>10}{'share':>8}  name"]
    lines += [
        f"{row['count']:>7g}{row['us']:>10.0f}{row['share']:>8.1%}  {row['name'][:70]}"
        for row in found["top"]
    ]
    return "\n".join([*lines, ""])


def beside_floors(rows: list[dict[str, Any]]) -> str:
    lines = ["one evaluation, by operation", f"{'count':>7}{'us':>10}{'floor':>10}{'':>8}  name"]
    total = {key: sum(row[key] for row in rows) for key in ("count", "us", "floor")}
    for row in (*rows, {"name": "all", **total}):
        times = f"{row['us'] / row['floor']:.1f}x" if row["floor"] else ""
        lines.append(
            f"{row['count']:>7}{row['us']:>10.0f}{row['floor']:>10.0f}{times:>8}  {row['name']}"
        )
    return "\n".join([*lines, ""])


def operations() -> str:
    """Markdown: what one unguided evaluation from step tables dispatches, at the public depths."""
    found = {
        "DiT (22 blocks)": count.ours("f5_v1", False, count.FRAMES, dim=64, heads=1, depth=22),
        "CausalUNet": count.ours("cosyvoice2", False, count.FRAMES, depth=4),
    }
    names = {name: None for each in found.values() for name, _ in each.by_name.most_common()}
    lines = [f"| operation | {' | '.join(found)} |", "|---" * (1 + len(found)) + "|"]
    for name in names:
        cells = " | ".join(str(each.by_name[name] or "") for each in found.values())
        lines.append(f"| `{name.removeprefix('imf_kernels.')}` | {cells} |")
    cells = " | ".join(str(each.operations) for each in found.values())
    return "\n".join([*lines, f"| all | {cells} |"])


def parser() -> argparse.ArgumentParser:
    found = facts.parser(__doc__, rounds=3)
    found.set_defaults(dtype=None)
    found.add_argument("--model", default="f5_base", choices=tuple(SIZES))
    found.add_argument("--nfe", type=int, default=3)
    found.add_argument("--seconds", type=float, default=5.0, help="generated")
    found.add_argument("--prompt", type=float, default=PROMPT_SECONDS, help="seconds before them")
    found.add_argument(
        "--guidance", type=float, nargs="?", const=2.0, help="w, without a number 2: a teacher"
    )
    found.add_argument("--nsight", action="store_true", help="only solve, with NVTX ranges")
    found.add_argument("--operations", action="store_true", help="only that table")
    return found


def main() -> int:
    args = parser().parse_args()
    if args.operations:
        print(operations())
        return 0
    device = torch.device(args.device)
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    found = facts.Report("profile", args)
    with torch.no_grad():
        model, rate = build(args.model, device, getattr(torch, args.dtype))
        prompt = round(args.prompt * rate)
        frames = prompt + round(args.seconds * rate)
        noise, given = request(model, 1, frames, prompt)
        cond = model.lay_out(model.prepare(**given, guided=args.guidance is not None), 1)
        grid = torch.tensor([0.0, 1.0], device=device)
        modulation = model.tables(grid[:1], grid[1:]).at(0)

        def evaluate() -> Any:
            return model.evaluate(noise, modulation, cond)

        def eager() -> Any:
            fresh = model.prepare(**given, guided=args.guidance is not None)
            return sampler.sample(model, noise, fresh, nfe=args.nfe, guidance=args.guidance)

        solves: dict[str, Callable[[], Any]] = {"eager": eager}
        if device.type == "cuda":
            graphs = GraphSampler(model, args.nfe, [(1, frames)], args.guidance)
            graphs.warm_up()
            solves["graphs"] = lambda: graphs.sample(noise, conditions=given)
        if args.nsight:
            eager()
            profiling.enable("nvtx")
            for solve in solves.values():
                for _ in range(args.rounds):
                    solve()
                synchronize(device)
            return 0

        for name, solve in solves.items():
            title = f"{args.model}, {frames} frames, NFE {args.nfe}, {name}"
            rows = ranges(solve, device, args.rounds)
            found.add({"what": name, "frames": frames, "ranges": rows}, table(title, rows))
        seen = launches(evaluate, device, most=20)
        found.add({"what": "evaluation", "frames": frames, "kernels": seen}, launched(seen))
        ceilings = Ceilings.measure(device, getattr(torch, args.dtype))
        each = by_operation(evaluate, device, ceilings)
        row = {"what": "operations", "frames": frames, "ceilings": ceilings._asdict()}
        found.add({**row, "operations": each}, beside_floors(each))
    return found.finish()


if __name__ == "__main__":
    sys.exit(main())
