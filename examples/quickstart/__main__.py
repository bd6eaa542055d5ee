"""The whole method in one run: teacher, student, O3S, audio, on two CPU cores in six minutes.

python -m examples.quickstart --seed 0 --minutes 6 --out out/demo
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import imf_kernels
from examples.quickstart import experiment, metrics
from examples.quickstart.audio import griffin_lim, log_mel, write_wav
from examples.quickstart.corpus import build_corpus
from examples.quickstart.model import load_teacher
from examples.quickstart.report import Example, write_report
from examples.quickstart.split import Split
from imf_kernels import grids
from imf_kernels.files import replacing

EXAMPLES = 3
HEARD = (
    "teacher 32 uniform",
    "student 3 o3s",
    "student 2 o3s",
    "student 1 uniform",
    "teacher_unguided 2 uniform",
    "teacher_unguided 1 uniform",
)
SEEN = (
    "teacher 32 uniform",
    "teacher 2 uniform",
    "teacher 1 uniform",
    "student 3 uniform",
    "student 2 uniform",
    "student 1 uniform",
)
REST = 140.0
"""Seconds that corpus, search, measurement and audio take on two CPU cores."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="quickstart", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of corpus, training and noise")
    parser.add_argument(
        "--minutes",
        type=float,
        default=6.0,
        help="budget of the run on two cores; all but the distillation takes two of them",
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    if not args.minutes > 0:
        parser.error(f"--minutes: expected a number > 0, got {args.minutes}")
    args.out.mkdir(parents=True, exist_ok=True)
    results = run(args.seed, args.minutes, args.out, args.device)
    with replacing(args.out / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1))


def run(seed: int, minutes: float, out: Path, device: torch.device) -> dict[str, Any]:
    """Distil, search, measure; write WAVs, figures and the report, and return the results."""
    console = Console()
    clock = Clock(console)
    torch.manual_seed(seed)
    installed = imf_kernels.backends()
    extension = "C++ extension" if installed["cpp"] else "pure Python, no C++ extension"
    console.print(f"imf_kernels {imf_kernels.__version__}, {extension}, seed {seed}, {device}")

    teacher = load_teacher().to(device)
    with clock.part("speaking the corpus"):
        corpus = build_corpus(seed, teacher.symbols)
        dev = Split(corpus.dev, _seed(seed, "dev"), device)
        test = Split(corpus.test, _seed(seed, "test"), device)
    with clock.part("distilling") as progress:
        updates = experiment.plan_updates(
            teacher,
            corpus.train,
            seconds=max(60 * minutes - REST, 6 * minutes),
            most=max(round(experiment.UPDATES * minutes / 6), 1),
        )
        student = experiment.distil_student(
            teacher, corpus.train, updates, _seed(seed, "training"), progress
        )
    with clock.part("searching the grids (O3S)") as progress:
        fine = dev.solve(teacher, grids.uniform(experiment.FINE), experiment.GUIDANCE)
        reference = dev.scored(fine)
        wanted = (("student", 2), ("student", 3), ("teacher", 4))
        searches = {}
        for done, (name, nfe) in enumerate(wanted):
            guided = name == "teacher"
            searches[name, nfe] = experiment.search_grid(
                teacher if guided else student,
                dev,
                reference,
                nfe,
                experiment.GUIDANCE if guided else None,
            )
            searches[name, nfe].save(out / f"o3s_{name}_nfe{nfe}.json")
            progress(done + 1, len(wanted))
        searches["student", 3].plot(out / "o3s.png")
    with clock.part("measuring") as progress:
        grids_found = {key: search.grid for key, search in searches.items()}
        rows, mels = experiment.measure(teacher, student, test, grids_found, seed, progress)
    with clock.part("making audio"):
        examples, resynthesis = render(test, mels, out)

    results = {
        "rows": rows,
        "claims": experiment.claims(rows),
        "machine": machine(device),
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "imf_kernels": imf_kernels.__version__,
        },
        "backends": installed,
        "timings": clock.seconds,
        "training": {
            "updates": updates,
            "batch_size": experiment.BATCH_SIZE,
            "teacher_nfe": experiment.TEACHER_NFE,
            "guidance": experiment.GUIDANCE,
            "utterances": len(corpus.train),
        },
        "o3s": {
            f"{name} {nfe}": {
                "grid": search.grid.tolist(),
                "start": search.evaluations[0].value,
                "best": search.value,
                "evaluations": len(search.evaluations),
                "stopped": search.stopped,
            }
            for (name, nfe), search in searches.items()
        },
        "resynthesis_mcd": resynthesis,
    }
    page = write_report(out, results, examples)
    show(console, results)
    console.print(f"{sum(clock.seconds.values()):.0f} s in all; open {page}")
    return results


def _seed(seed: int, use: str) -> int:
    """A seed of its own for each use, so that none shares another's noise."""
    return zlib.crc32(f"{seed} {use}".encode())


class Clock:
    """Names, shows and times the parts of a run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[experiment.Progress]:
        start = time.perf_counter()
        columns = (
            TextColumn(f"{name:<26}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task(name, total=1)
            yield lambda done, total: bar.update(task, completed=done, total=total)
            bar.update(task, completed=bar.tasks[0].total)
        self.seconds[name] = round(time.perf_counter() - start, 1)


def render(
    test: Split, mels: dict[str, list[torch.Tensor]], out: Path
) -> tuple[list[Example], dict[str, float]]:
    """WAV files of a few utterances, and how far resynthesised audio is from the true mels (MCD).

    The truth's own resynthesis is the floor that Griffin-Lim sets.
    """
    folder = out / "audio"
    folder.mkdir(exist_ok=True)
    middle = len(test.utterances) // 2
    chosen = range(middle, middle + EXAMPLES)
    solved = {"truth": [u.mel for u in test.utterances], **mels}
    examples = []
    again: dict[str, list[torch.Tensor]] = {label: [] for label in ("truth", *HEARD)}
    for number, index in enumerate(chosen):
        utterance, wavs = test.utterances[index], {}
        for label in ("truth", *HEARD):
            audio = griffin_lim(solved[label][index])
            wavs[label] = folder / f"{number}_{label.replace(' ', '_')}.wav"
            write_wav(wavs[label], audio)
            again[label].append(log_mel(audio)[: len(utterance.mel)])
        shown = {label: solved[label][index] for label in ("truth", *SEEN)}
        examples.append(Example(utterance.text, shown, wavs, test.prompts[index]))
    truth = [test.utterances[index].mel for index in chosen]
    return examples, {label: metrics.mcd(mels_, truth) for label, mels_ in again.items()}


def machine(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def show(console: Console, results: dict[str, Any]) -> None:
    columns = ("mcd", "frechet", "sharpness", "c2st", "to_teacher", "seconds_per_audio_second")
    table = Table("model", "nfe", "grid", *columns, title="test split")
    for row in results["rows"]:
        table.add_row(
            row["model"], str(row["nfe"]), row["grid"], *(f"{row[key]:.3f}" for key in columns)
        )
    console.print(table)
    for claim in results["claims"]:
        mark = "[green]holds[/]" if claim["holds"] else "[red]does not hold[/]"
        console.print(f"{claim['claim']}: {claim['value']:.3f}, limit {claim['limit']:.3f}: {mark}")


if __name__ == "__main__":
    main()
