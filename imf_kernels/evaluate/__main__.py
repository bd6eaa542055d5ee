"""Score a folder of generated speech against a list.

python -m imf_kernels.evaluate generated/ --list meta.lst --metrics wer,sim_o,utmos,mcd \\
    --weights weights/ --out scores.json
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imf_kernels.evaluate import SCORERS, evaluate, read_list


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        entries = read_list(options.list, options.audio)
        with contextlib.ExitStack() as ends:
            bar = Progress(*columns, console=Console(stderr=True))
            task = bar.add_task("scoring", total=len(entries))

            def progress(done: int, total: int) -> None:
                if not bar.live.is_started:  # not before what may be refused at the door
                    ends.enter_context(bar)
                bar.update(task, completed=done, total=total)

            report = evaluate(
                options.generated,
                entries,
                options.metrics.split(","),
                out=options.out,
                weights=options.weights,
                language=options.language,
                device=options.device,
                workers=options.workers,
                allow_missing=options.allow_missing,
                progress=progress,
            )
    except ImportError as error:
        sys.exit(f"{error}: pip install '.[eval]'")
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    Console().print(table(report))


def table(report: dict[str, Any]) -> Any:
    """The means, as a `rich` table."""
    from rich.table import Table

    out = Table("metric", "mean", "utterances", "better")
    for name, metric in report["metrics"].items():
        better = "higher" if SCORERS[name].higher_is_better else "lower"
        out.add_row(name, f"{metric['mean']:.4f}", str(metric["count"]), better)
    if report["missing"]:
        out.caption = f"{len(report['missing'])} generated files are missing"
    return out


def _parser() -> argparse.ArgumentParser:
    weights = "; ".join(f"{k}: {' or '.join(s.weights)}" for k, s in SCORERS.items() if s.weights)
    hub = ", ".join(name for name, scorer in SCORERS.items() if scorer.hub is not None)
    parser = argparse.ArgumentParser(
        prog="python -m imf_kernels.evaluate",
        description="Score a folder of generated speech against a list.",
    )
    add = parser.add_argument
    add("generated", type=Path, help="folder of NAME.wav or NAME.flac")
    add("--list", type=Path, required=True, help="meta.lst, LibriSpeech-PC's .lst, .csv or .jsonl")
    add("--audio", type=Path, help="folder of the list's recordings (default: the list's own)")
    add("--metrics", required=True, help=f"with commas between: {', '.join(SCORERS)}")
    add("--weights", type=Path, help=f"folder of networks ({weights}); {hub}: by default the hub's")
    add("--out", type=Path, required=True, help="report, JSON; what it holds is not scored again")
    add("--language", default="en", help="en or zh")
    add("--device", default="cpu", help="cpu, cuda, or several: cuda:0,cuda:1")
    add("--workers", type=int, default=1, help="processes")
    add("--allow-missing", action="store_true", help="count missing files instead of stopping")
    return parser


if __name__ == "__main__":
    main()
