"""One student, trained and measured, as a JSON file that is made once."""

from __future__ import annotations

import functools
import json
import platform
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.compare_objectives.methods import Method
from examples.compare_objectives.training import peak_bytes, train
from examples.quickstart.corpus import build_corpus
from examples.quickstart.data import training_batches
from examples.quickstart.experiment import BATCH_SIZE, FINE, GUIDANCE, numbers
from examples.quickstart.model import Token2Mel, load_teacher
from examples.quickstart.split import Split
from imf_kernels import grids
from imf_kernels.files import replacing
from imf_kernels.models import StepTokenDiT

CPU = torch.device("cpu")
STEPS = (1, 2, 3, 4)


def kept(path: Path, settings: dict[str, Any], make: Callable[[], dict[str, Any]]) -> Any:
    """What the file holds, or what `make` returns, written there: a run that ends can go on.

    Raises:
        ValueError: the file is of other settings.
    """
    settings = json.loads(json.dumps(settings))
    if path.exists():
        found = json.loads(path.read_text())
        if found["settings"] != settings:
            raise ValueError(
                f"{path}: expected results of {settings}, got some of {found['settings']}; "
                "take another folder, or remove the file"
            )
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"
    result = {"settings": settings, **make(), "machine": machine, "torch": torch.__version__}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    return json.loads(path.read_text())


class Study:
    """The quickstart's teacher and the corpus of a seed, with one split that students solve.

    Args:
        seed: Of corpus, training and noise.
        split: "dev" for choices; "test" for results, which the fine grid and the peak belong to.
    """

    def __init__(self, seed: int, split: str) -> None:
        self.seed, self.final = seed, split == "test"
        self.teacher = load_teacher()
        self.corpus = build_corpus(seed, self.teacher.symbols)
        self.split = Split(getattr(self.corpus, split), self._seed(split), CPU)

    def _seed(self, use: str) -> int:
        return zlib.crc32(f"{self.seed} {use}".encode())

    @functools.cached_property
    def reference(self) -> list[Tensor]:
        """The guided teacher's fine solve, its scored frames."""
        fine = self.split.solve(self.teacher, grids.uniform(FINE), GUIDANCE)
        return self.split.scored(fine)

    def measure(
        self, model: Token2Mel, steps: Sequence[int], guidance: float | None = None
    ) -> list[dict[str, Any]]:
        """The five numbers at each number of steps, but those that step tokens do not know."""
        tokens = isinstance(model.estimator, StepTokenDiT)
        rows = []
        for nfe in steps:
            if tokens and nfe not in model.estimator.counts:
                continue
            told = {"steps": nfe} if tokens else {}
            mels = self.split.solve(model, grids.uniform(nfe), guidance, **told)
            scored = self.split.scored(mels)
            five = numbers(scored, self.split.truth, self.reference, self.seed)
            rows.append({"nfe": nfe, **five})
        return rows

    def untrained(self, guidance: float | None) -> dict[str, Any]:
        """The teacher itself, in the form of `trained`."""
        rows = self.measure(self.teacher, (*STEPS, FINE), guidance)
        ends = {"budgets": ["seconds", "updates"], "updates": 0, "seconds": 0.0, "rows": rows}
        return {"snapshots": [ends]}

    def trained(self, method: Method, updates: int, seconds: float | None = None) -> dict[str, Any]:
        """Train a student for both budgets (see `train`) and measure it along the way."""
        generator = torch.Generator().manual_seed(self._seed("training"))
        student = method.student_of(self.teacher)
        objective = method.objective_of(self.teacher, updates, generator)
        batches = training_batches(self.corpus.train, BATCH_SIZE, generator, CPU)
        snapshots = train(
            student,
            objective,
            batches,
            lr=method.lr,
            decay=method.decay,
            ema=method.ema,
            ramp=method.ramp,
            updates=updates,
            seconds=seconds,
        )
        found = []
        for snapshot in snapshots if self.final else snapshots[-1:]:
            student = method.student_of(self.teacher)
            student.load_state_dict(snapshot.weights)
            steps = (*STEPS, FINE) if snapshot.budgets and self.final else STEPS
            rows = self.measure(student.eval(), steps)
            found.append({**snapshot.facts, "rows": rows})
        return {
            "snapshots": found,
            "parameters": {"teacher": parameters(self.teacher), "student": parameters(student)},
            "peak_bytes": self.peak(method) if self.final else None,
            "held_bytes": cache.nbytes if (cache := getattr(objective, "cache", None)) else 0,
        }

    def peak(self, method: Method) -> int:
        """Bytes that an update holds, from rollout to gradients, on utterances of middle length.

        The most of three, in which DSFlow takes all its step counts.
        """
        alone = method.but(reuse=1) if "reuse" in method.options else method
        generator = torch.Generator().manual_seed(0)
        student = alone.student_of(self.teacher)
        objective = alone.objective_of(self.teacher, 1, generator)
        by_length = sorted(self.corpus.train, key=lambda u: len(u.mel))
        middle = by_length[max(len(by_length) - BATCH_SIZE, 0) // 2 :][:BATCH_SIZE]
        batch = next(training_batches(middle, BATCH_SIZE, generator, CPU))

        def updates() -> None:
            for _ in range(3):
                objective(student, batch)[0].backward()
                student.zero_grad()

        objective(student, batch)  # the first call also checks
        return peak_bytes(updates)


def parameters(model: Token2Mel) -> int:
    """Of the velocity model, without the frozen encoder."""
    return sum(p.numel() for p in model.estimator.parameters())
