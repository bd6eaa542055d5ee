"""The trainer: any objective on any number of ranks, in runs that nothing can break."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imf_kernels.distill import guard, saves, stops
from imf_kernels.distill.ema import Ema
from imf_kernels.distill.optimization import adamw, schedule, train_mode, trainable
from imf_kernels.distill.parallel import Spread, connect, from_all, gathered, scattered
from imf_kernels.distill.plain import Objective
from imf_kernels.distill.settings import Settings
from imf_kernels.objectives.batch import Batch
from imf_kernels.version import __version__

FORMAT = 1


class Evaluated(NamedTuple):
    """One batch of an update, after its backward pass."""

    batch: Batch
    loss: Tensor
    info: Mapping[str, Tensor]


class Trainer:
    """Trains a student's trainable parameters on an objective, and saves what it takes to go on.

    A run is a function of its settings, its seed and its batches: before each batch the trainer
    seeds torch's generators from its place in the run, so that an objective without a generator of
    its own draws the same on any path that leads there. What an objective keeps from call to call
    is saved for each rank if it has `state_dict()` and `load_state_dict()` (a flat dict of tensors
    and numbers). An attribute `progress` is set before every update, from 0 towards 1.

    Interrupted and resumed, it ends with the same bits wherever the device's kernels give the same
    bits twice (`torch.use_deterministic_algorithms`).

    An update whose loss or gradient norm is not finite, or explodes, changes nothing on any rank
    and is written down in `reports/`; `max_bad` of them in a row end the run.

    Callbacks are objects with any of these methods, called on every rank:
        started(trainer): before the first update of this process, what was saved loaded.
        updated(trainer, record): after every update. `record` holds floats: update, loss, norm, lr,
            seconds, frames (of all ranks), skipped (1 for a bad update), and the means over batches
            and ranks of the objective's scalars. All ranks are to log the same names.
        saved(trainer, path): after every checkpoint.
        ended(trainer): when the run is done or a signal has stopped it, but not after an error.

    Attributes:
        accelerator: `accelerate.Accelerator`.
        student, objective, folder, settings: As given; the student on its device.
        update: Updates done.

    Args:
        student: Trained in place; its trainable weights are float32.
        objective: `loss, info = objective(student, batch)`.
        batches: Called with the number of batches that this rank has taken before; yields this
            rank's batches from there on, on the accelerator's device, the same ones every time.
        folder: Of this run: `checkpoints/` and `reports/` are made there, all ranks see it.
        settings: See `Settings`.
        callbacks: See above.

    Raises:
        ImportError: accelerate is not installed.
        ValueError, TypeError: a student without trainable weights, or not of float32.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        batches: Callable[[int], Iterator[Batch]],
        folder: Path,
        settings: Settings,
        *,
        callbacks: Sequence[object] = (),
    ) -> None:
        for name, parameter in trainable(student).items():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"student: expected trainable weights in float32 (precision='bf16' computes in "
                    f"bfloat16), got {parameter.dtype} in {name}"
                )
        self.accelerator = connect(settings.timeout)
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        self.student, self.objective, self.batches = student, objective, batches
        self.folder, self.settings, self.callbacks = Path(folder), settings, tuple(callbacks)
        self.update = 0
        self._spread = Spread(student, self.accelerator, settings.parallel)
        self._parameters = trainable(student)
        self._optimizer = adamw(student, settings.lr, settings.weight_decay, settings.betas)
        decay = settings.ema_decay
        self._ema = None if decay is None else Ema(self._parameters.values(), decay)
        self._guard = guard.Guard(settings.explode)

    def run(self) -> nn.Module:
        """Train to the end, from the newest good checkpoint in `folder` if there is one.

        Returns:
            The student, in eval mode, with its average weights if those are kept; under "fsdp2" it
            stays in parts, and is whole in the last checkpoint.

        Raises:
            Stopped: SIGTERM or SIGINT has come: the update is done, and saved.
            FloatingPointError: `max_bad` bad updates in a row; names the report.
            OSError: a checkpoint cannot be written; the last good one is still there.
            ValueError: batches that end; settings that are not those of the run in `folder`.
            RankFailed: another rank has failed; the message is that rank's.
        """
        with stops.last_words(self.folder, self.rank, self.ranks), stops.Signals() as signals:
            with stops.together():
                if self.rank == 0:
                    saves.begin(self._checkpoints)
                    stops.forget(self.folder)
            self._resume()
            self._call("started")
            self._train(signals)
            self._call("ended")
            if self._ema is not None and self._ema.averages:
                self._ema.assign()
            return self.student.eval()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the student holds its average weights, if those are kept, and is in eval mode."""
        self._spread.reshard()
        with contextlib.nullcontext() if self._ema is None else self._ema.assigned():
            self.student.eval()
            try:
                yield
            finally:
                self._spread.reshard()
                train_mode(self.student)

    def autocast(self) -> torch.autocast:
        """What the settings' precision computes in."""
        bfloat16 = self.settings.precision == "bf16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=bfloat16)

    # -- training -------------------------------------------------------------------------------

    def _train(self, signals: stops.Signals) -> None:
        settings, due = self.settings, False
        train_mode(self.student)
        source = iter(self.batches(self.update * settings.accumulate))
        while self.update < settings.updates:
            record, stop = self._step(source, signals)
            self._call("updated", record)
            due = due or self.update % settings.save_every == 0 or self.update == settings.updates
            if record["skipped"] or not (due or stop):
                continue  # saved after good updates only
            path, due = self._save(), False
            self._call("saved", path)
            if stop:
                self._call("ended")
                raise stops.Stopped(self.update, path, signals.asked or "another rank's signal")

    def _step(
        self, source: Iterator[Batch], signals: stops.Signals
    ) -> tuple[dict[str, float], bool]:
        """One update: its record, and whether any rank was asked to stop."""
        settings, begun = self.settings, time.perf_counter()
        lr = settings.lr * schedule(
            self.update, settings.updates, settings.warmup, settings.decay, settings.min_lr
        )
        if hasattr(self.objective, "progress"):
            self.objective.progress = self.update / settings.updates
        evaluated = [self._evaluate(source, i) for i in range(settings.accumulate)]
        norm = self.accelerator.clip_grad_norm_(list(self._parameters.values()), settings.clip)
        seen = self._reduced(evaluated, norm, signals.asked is not None)

        why = self._guard.judge(seen["loss"], seen["norm"])
        if why is None:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            if self._ema is not None:
                self._ema.update()
        self._optimizer.zero_grad()
        if why is not None:
            self._report(why, evaluated)
        self.update += 1
        stop = seen.pop("stop") > 0
        own = {"update": self.update, "lr": lr, "seconds": time.perf_counter() - begun}
        return {**seen, **own, "skipped": float(why is not None)}, stop

    def _evaluate(self, source: Iterator[Batch], i: int) -> Evaluated:
        """The update's i-th batch: its gradient is added to what there is."""
        accumulate = self.settings.accumulate
        position = self.update * accumulate + i
        batch = next(source, None)
        if batch is None:
            raise ValueError(
                f"batches: expected {self.settings.updates * accumulate} of them, got {position}"
            )
        torch.manual_seed(seed_of(self.settings.seed, position * self.ranks + self.rank))
        with self._spread.accumulating(i + 1 < accumulate):
            with self.autocast():
                loss, info = self.objective(self._spread.outer, batch)
            (loss / accumulate).backward()
        return Evaluated(batch, loss.detach(), info)

    def _reduced(self, evaluated: Sequence[Evaluated], norm: Any, stop: bool) -> dict[str, float]:
        """What all ranks have seen: one exchange, and the update's one wait for the device."""
        scalars: dict[str, list[Tensor]] = {}
        for one in evaluated:
            for name, value in one.info.items():
                if value.ndim == 0:
                    scalars.setdefault(name, []).append(value)
        scalars["loss"] = [one.loss for one in evaluated]
        values = {name: torch.stack(each).float().mean() for name, each in scalars.items()}
        values["frames"] = torch.stack([one.batch.lengths.sum() for one in evaluated]).sum()
        values["norm"] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        values["stop"] = torch.tensor(float(stop))
        device = self.accelerator.device
        names = sorted(values)
        seen = torch.stack([values[name].float().to(device, non_blocking=True) for name in names])
        sums = dict(zip(names, self.accelerator.reduce(seen, "sum").tolist(), strict=True))
        return {name: v if name == "frames" else v / self.ranks for name, v in sums.items()}

    def _report(self, why: str, evaluated: Sequence[Evaluated]) -> None:
        """Write down a bad update; end the run after too many."""
        ranks = from_all([guard.rows(*one) for one in evaluated])
        with stops.together():
            if self.rank == 0:
                update, reports = self.update + 1, self.folder / "reports"
                path = guard.report(reports, update, why, self._guard, ranks)
                if self._guard.in_a_row >= self.settings.max_bad:
                    raise FloatingPointError(
                        f"update {update}: {why}; {self._guard.in_a_row} bad updates in a row, "
                        f"the last of them in {path}"
                    )
                warnings.warn(f"update {update} skipped: {why}; see {path}", stacklevel=2)

    def _call(self, name: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            method = getattr(callback, name, None)
            if method is not None:
                method(self, *arguments)

    # -- checkpoints ----------------------------------------------------------------------------

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _save(self) -> Path:
        draft, main = saves.Draft(self._checkpoints, self.update), self.rank == 0
        try:
            with stops.together():
                if main:
                    draft.begin()
            with stops.together():
                if hasattr(self.objective, "state_dict"):
                    draft.add_flat(f"objective_{self.rank}", self.objective.state_dict())
            for files in from_all(draft.files):
                draft.files |= files
            parts = self._tensors()
            with stops.together():
                if main:
                    for name, tensors in parts.items():
                        draft.add_tensors(name, tensors)
                    draft.add("state.json", json.dumps(self._state(), indent=1).encode())
                    draft.publish(self.settings.keep)
        except BaseException:
            if main:
                draft.abandon()
            raise
        return draft.path

    def _state(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "update": self.update,
            "position": self.update * self.settings.accumulate,
            "ranks": self.ranks,
            "settings": self.settings.to_dict(),
            "guard": self._guard.state_dict(),
            "torch": torch.__version__,
            "imf_kernels": __version__,
        }

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """Whole tensors on the CPU, on the first rank; the others help to gather them."""

        def whole(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
            return {name: gathered(value, self.rank == 0) for name, value in tensors.items()}

        self._spread.reshard()
        parts = {"model": whole(self.student.state_dict())}
        if self._ema is not None:
            with self._ema.assigned():
                parts["ema"] = whole(self._parameters)
        state = self._optimizer.state
        parts["optimizer"] = whole(
            {f"{n}.{k}": v for n, p in self._parameters.items() for k, v in state[p].items()}
        )
        return parts

    def _resume(self) -> None:
        """Load the newest good checkpoint, if there is one."""
        found = None
        with stops.together():
            if self.rank == 0 and (path := saves.newest(self._checkpoints)) is not None:
                state = json.loads((path / "state.json").read_text())
                self._check(state)
                found = path, state
        found = from_all(found)[0]
        if found is not None:
            with stops.together():
                self._load(*found)

    def _check(self, state: Mapping[str, Any]) -> None:
        if state["format"] != FORMAT:
            raise ValueError(f"format: expected {FORMAT}, got {state['format']}")
        self.settings.check_resume(state["settings"])
        updates = state["settings"]["updates"]
        if hasattr(self.objective, "progress") and updates != self.settings.updates:
            raise ValueError(
                f"updates: expected {updates}, which the objective's progress is measured by, "
                f"got {self.settings.updates}"
            )
        for name, own in (("torch", torch.__version__), ("ranks", self.ranks)):
            if state[name] != own:
                warnings.warn(
                    f"{name}: the run was begun with {state[name]} and goes on with {own}: "
                    "not to the bit as it would have",
                    stacklevel=2,
                )

    def _load(self, path: Path, state: Mapping[str, Any]) -> None:
        if self._ema is not None:
            averages = saves.tensors(path, "ema")
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(scattered(averages[name], parameter))
            self._ema.begin()
        own, saved = self.student.state_dict(), saves.tensors(path, "model")
        self.student.load_state_dict(
            {name: scattered(value, own[name]) for name, value in saved.items()}
        )
        optimizer = saves.tensors(path, "optimizer")
        for key, value in optimizer.items():
            name, _, kind = key.rpartition(".")
            parameter = self._parameters[name]
            like = value if value.ndim == 0 else parameter  # "step" is of no shape, and everywhere
            self._optimizer.state[parameter][kind] = scattered(value, like)
        if hasattr(self.objective, "load_state_dict"):
            self.objective.load_state_dict(
                saves.flat(path, f"objective_{self.rank % state['ranks']}")
            )
        self.update = state["update"]
        self._guard.load_state_dict(state["guard"])


def seed_of(seed: int, index: int) -> int:
    """The seed of a run's `index`-th batch, counted over all ranks."""
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
