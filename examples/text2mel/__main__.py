"""The F5 side of the method: teacher, students, O3S, measured by what a recogniser hears.

python -m examples.text2mel --seed 0 --out out/text2mel
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import imf_kernels
from examples.quickstart.__main__ import Clock, machine
from examples.quickstart.corpus import build_corpus
from examples.quickstart.split import Split
from examples.text2mel import experiment
from examples.text2mel.data import continuation
from examples.text2mel.model import TEACHER, load_teacher
from examples.text2mel.recogniser import train_recogniser
from examples.text2mel.summary import table
from imf_kernels.files import replacing


def main() -> None:
    parser = argparse.ArgumentParser(prog="text2mel", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of corpus, training and noise")
    parser.add_argument("--updates", type=int, default=800, help="of each student")
    parser.add_argument("--teacher", type=Path, default=TEACHER)
    parser.add_argument("--out", type=Path, default=Path("out/text2mel"))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    if args.updates < 1:
        parser.error(f"--updates: expected an integer > 0, got {args.updates}")
    if not args.teacher.exists():
        parser.error(f"--teacher: expected a file of train_teacher.py, got {args.teacher}")
    args.out.mkdir(parents=True, exist_ok=True)
    results = run(args.seed, args.updates, args.teacher, args.out, args.device)
    with replacing(args.out / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1))


def run(
    seed: int, updates: int, teacher_path: Path, out: Path, device: torch.device
) -> dict[str, Any]:
    """Distil, search, measure; print the table, and return the results."""
    console = Console()
    clock = Clock(console)
    torch.manual_seed(seed)
    loaded, symbols = load_teacher(teacher_path)
    teacher = loaded.to(device)
    with clock.part("speaking the corpus"):
        corpus = build_corpus(seed, symbols)
    with clock.part("training the recogniser"):
        recogniser = train_recogniser(corpus.train, len(symbols), seed)
    with clock.part("distilling") as progress:
        students = experiment.distil_students(teacher, corpus.train, updates, seed, progress)
    models = {"teacher": teacher} | {f"student, {k}": model for k, model in students.items()}
    with clock.part("searching the grids (O3S)") as progress:
        dev = experiment.Judge(Split(corpus.dev, seed, device, continuation), recogniser, teacher)
        searches = experiment.search_grids(models, dev, progress)
    with clock.part("measuring") as progress:
        test = experiment.Judge(
            Split(corpus.test, seed + 1, device, continuation), recogniser, teacher
        )
        found = {key: search.grid for key, search in searches.items()}
        rows = experiment.measure(models, found, test, seed, progress)
    reached = rows[0]["phonemes"]
    results = {
        "rows": rows,
        "gate": {
            "claim": f"phoneme accuracy of the teacher at {experiment.FINE} steps",
            "value": reached,
            "limit": experiment.GATE,
            "holds": reached >= experiment.GATE,
        },
        "ceiling": test.phoneme_accuracy(test.truth),
        "machine": machine(device),
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "imf_kernels": imf_kernels.__version__,
        },
        "timings": clock.seconds,
        "training": {
            "updates": updates,
            "batch_size": experiment.BATCH_SIZE,
            "teacher_nfe": experiment.TEACHER_NFE,
            "guidance": experiment.GUIDANCE,
            "utterances": len(corpus.train),
        },
        "o3s": {
            " ".join(map(str, key)): {
                "grid": search.grid.tolist(),
                "start": search.evaluations[0].value,
                "best": search.value,
                "evaluations": len(search.evaluations),
                "stopped": search.stopped,
            }
            for key, search in searches.items()
        },
    }
    for (name, nfe, kind), search in searches.items():
        search.save(out / f"{kind}_{name}_nfe{nfe}.json".replace(", ", "_").replace(" ", "_"))
    console.print(table([results]), soft_wrap=True)
    console.print(f"what the recogniser hears of the true mels: {results['ceiling']:.3f}")
    holds = "holds" if results["gate"]["holds"] else "does not hold"
    console.print(f"{results['gate']['claim']}: {reached:.3f}, gate {experiment.GATE}: {holds}")
    return results


if __name__ == "__main__":
    main()
