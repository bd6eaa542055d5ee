"""The trainer: any objective on any number of ranks, in runs that nothing can break."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imf_kernels import seeds
from imf_kernels.distill import by_interval, guard, lock, saves, stops
from imf_kernels.distill.optimization import schedule, train_mode, trainable
from imf_kernels.distill.parallel import connect, from_all
from imf_kernels.distill.plain import Objective
from imf_kernels.distill.settings import Settings
from imf_kernels.distill.state import State
from imf_kernels.objectives.batch import Batch

CHECKPOINTS = "checkpoints"


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
    and numbers). An attribute `progress`, if it is not None, is set before every update, from 0
    towards 1.

    Interrupted and resumed, it ends with the same bits wherever the device's kernels give the same
    bits twice (`torch.use_deterministic_algorithms`).

    An update whose loss or gradient norm is not finite, or explodes, changes nothing on any rank
    and is written down in `reports/`; `max_bad` of them in a row end the run.

    Callbacks are objects with any of these methods, called on every rank::

        started(trainer): before the first update of this process, what was saved loaded.
        begun(trainer, record): thereafter, if the run has no update yet; `record` holds update: 0.
        updated(trainer, record): after every update. `record` holds floats: update, loss, norm, lr,
            seconds, frames (of all ranks), skipped (1 for a bad update), the means over batches and
            ranks of the objective's scalars (of those that are not NaN), and where it tells of its
            rows error/0.00-0.25 and so on, by their intervals' length. All ranks are to log the
            same names.
        saved(trainer, path): after every checkpoint.
        ended(trainer): when the run is done or a signal has stopped it, but not after an error.

    Attributes:
        accelerator: `accelerate.Accelerator`.
        student, objective, folder, settings: As given; the student on its device.

    Args:
        student: Trained in place, all that requires gradients (of F5-TTS's models freeze
            `text_embed`, as the command does, for the estimator alone); these weights are float32.
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
        self.student, self.batches = student, batches
        self.objective: Any = objective
        self.folder, self.settings, self.callbacks = Path(folder), settings, tuple(callbacks)
        self._state = State(student, objective, settings, self.accelerator)

    @property
    def update(self) -> int:
        """Updates done."""
        return self._state.update

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
            Locked: another process trains in `folder`.
        """
        with contextlib.ExitStack() as within:
            with stops.together():
                if self.rank == 0:
                    within.enter_context(lock.held(self.folder))
                    saves.begin(self.folder / CHECKPOINTS)
                    stops.forget(self.folder)
            within.enter_context(stops.last_words(self.folder, self.rank, self.ranks))
            signals = within.enter_context(stops.Signals())
            self._state.load_newest(self.folder / CHECKPOINTS)
            self._call("started")
            if self.update == 0:
                self._call("begun", {"update": 0})
            self._train(signals)
            self._call("ended")
            if self._state.ema is not None:
                self._state.ema.assign()
            return self.student.eval()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the student holds its average weights, if those are kept, and is in eval mode."""
        spread, ema = self._state.spread, self._state.ema
        spread.reshard()
        with contextlib.nullcontext() if ema is None else ema.assigned():
            self.student.eval()
            try:
                yield
            finally:
                spread.reshard()
                train_mode(self.student)

    def autocast(self) -> torch.autocast:
        """What the settings' precision computes in."""
        bfloat16 = self.settings.precision == "bf16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=bfloat16)

    # -- training -------------------------------------------------------------------------------

    def _train(self, signals: stops.Signals) -> None:
        settings = self.settings
        train_mode(self.student)
        source = iter(self.batches(self.update * settings.accumulate))
        while self.update < settings.updates:
            record, stop = self._step(source, signals)
            self._call("updated", record)
            due = self.update % settings.save_every == 0 or self.update == settings.updates
            if not (due or stop):
                continue
            path = self._state.save(self.folder / CHECKPOINTS)
            self._call("saved", path)
            if stop:
                self._call("ended")
                raise stops.Stopped(self.update, path, signals.asked or "another rank's signal")

    def _step(
        self, source: Iterator[Batch], signals: stops.Signals
    ) -> tuple[dict[str, float], bool]:
        """One update: its record, and whether any rank was asked to stop."""
        settings, state, begun = self.settings, self._state, time.perf_counter()
        lr = settings.lr * schedule(
            self.update, settings.updates, settings.warmup, settings.decay, settings.min_lr
        )
        if getattr(self.objective, "progress", None) is not None:
            self.objective.progress = self.update / settings.updates
        evaluated = [self._evaluate(source, i) for i in range(settings.accumulate)]
        norm = self.accelerator.clip_grad_norm_(list(state.parameters.values()), settings.clip)
        seen = self._reduced(evaluated, norm, signals.asked is not None)
        stop = seen.pop("stop") > 0

        why = state.guard.judge(seen["loss"], seen["norm"])
        if why is None:
            state.optimizer.param_groups[0]["lr"] = lr
            state.optimizer.step()
            if state.ema is not None:
                state.ema.update()
        state.optimizer.zero_grad()
        state.update += 1
        if why is not None:
            self._report(why, evaluated, seen)
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
        torch.manual_seed(seeds.seed(self.settings.seed, position * self.ranks + self.rank))
        spread, losses, infos = self._state.spread, [], []
        parts = [partial(self.objective, spread.outer, batch)]
        if hasattr(self.objective, "by_target"):  # the activations of one target at a time
            with self.autocast():
                parts = self.objective.by_target(spread.outer, batch)
        for k, part in enumerate(parts, 1):
            with spread.accumulating(more=i + 1 < accumulate or k < len(parts)):
                with self.autocast():
                    loss, info = part()
                (loss / (accumulate * len(parts))).backward()
            losses.append(loss.detach())
            infos.append(info)
        return Evaluated(batch, torch.stack(losses).mean(), _merged(infos))

    def _reduced(self, evaluated: Sequence[Evaluated], norm: Any, stop: bool) -> dict[str, float]:
        """What all ranks have seen: one exchange, and the update's one wait for the device."""
        added = {"frames": [one.batch.lengths.sum() for one in evaluated]}
        for one in evaluated:
            sums = _known(one.info) | by_interval.sums(one.info)
            for name, value in sums.items():
                added.setdefault(name, []).append(value)
        values = {"loss": torch.stack([one.loss for one in evaluated]).float().mean()}
        values["norm"] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        values["stop"] = torch.tensor(float(stop))
        values = {name: value / self.ranks for name, value in values.items()}
        values |= {name: torch.stack(each).sum() for name, each in added.items()}
        device = self.accelerator.device
        names = sorted(values)
        seen = torch.stack([values[name].float().to(device, non_blocking=True) for name in names])
        told = dict(zip(names, self.accelerator.reduce(seen, "sum").tolist(), strict=True))
        errors = by_interval.means(told)
        return _means(told) | errors

    def _report(self, why: str, evaluated: Sequence[Evaluated], seen: Mapping[str, float]) -> None:
        """Write down a bad update; end the run after too many."""
        ranks = from_all([guard.rows(*one) for one in evaluated])
        with stops.together():
            if self.rank == 0:
                told = {"update": self.update, "why": why, **seen}
                path = guard.report(self.folder / "reports", told, self._state.guard, ranks)
                in_a_row = self._state.guard.in_a_row
                if in_a_row >= self.settings.max_bad:
                    raise FloatingPointError(
                        f"update {self.update}: {why}; {in_a_row} bad updates in a row, "
                        f"the last of them in {path}"
                    )
                warnings.warn(f"update {self.update} skipped: {why}; see {path}", stacklevel=2)

    def _call(self, name: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            method = getattr(callback, name, None)
            if method is not None:
                method(self, *arguments)


def _known(info: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scalars that an objective logs, and how many each is of: none where it is NaN."""
    found: dict[str, Tensor] = {}
    for name, value in info.items():
        if value.ndim == 0 and name != "loss":
            known = ~value.isnan()
            found |= {f"sum {name}": torch.where(known, value.float(), 0.0), f"of {name}": known}
    return found


def _means(told: Mapping[str, float]) -> dict[str, float]:
    """With the means of what `_known` named, added up; without those of nothing."""
    found = {}
    for name, value in told.items():
        kind, _, of = name.partition(" ")
        if not of:
            found[name] = value
        elif kind == "sum" and told[f"of {of}"]:
            found[of] = value / told[f"of {of}"]
    return found


def _merged(infos: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What is told of the parts of a batch, as of the whole: rows behind one another."""
    merged = {}
    for name in infos[0]:
        each = [info[name] for info in infos]
        merged[name] = torch.stack(each).nanmean() if each[0].ndim == 0 else torch.cat(each)
    return merged
