"""Where a run tells how it goes: a progress bar, a file of JSON lines, TensorBoard.

Callbacks of the `Trainer`, on its first rank. They write every `log_every`-th record, and those in
which there is more than training to tell (validation, skipped updates), so they stand behind the
callbacks that add to records.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from imf_kernels.files import replacing


class Progress:
    """Loss, gradient norm, learning rate, frames a second and the time left.

    A bar on a terminal (needs `rich`), plain lines elsewhere.
    """

    def __init__(self) -> None:
        self.bar: Any = None
        self._last: tuple[float, float] | None = None

    def started(self, trainer: Any) -> None:
        if not _first(trainer):
            return
        from rich import progress
        from rich.console import Console

        console = Console(stderr=True)
        self._last = (time.perf_counter(), trainer.update)
        if not console.is_terminal:
            return
        self.bar = progress.Progress(
            progress.TextColumn("{task.completed}/{task.total}"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[told]}"),
            progress.TimeRemainingColumn(),
            console=console,
        )
        self.task = self.bar.add_task(
            "updates", total=trainer.settings.updates, completed=trainer.update, told=""
        )
        self.bar.start()

    def begun(self, trainer: Any, record: Mapping[str, float]) -> None:
        if not _first(trainer):
            return
        self._last = (time.perf_counter(), 0)  # what came before, validation, is no training
        if worth_telling(trainer, record):
            print(f"0/{trainer.settings.updates}  {told(record)}", flush=True)

    def updated(self, trainer: Any, record: Mapping[str, float]) -> None:
        if not _first(trainer):
            return
        if self.bar is not None:
            self.bar.update(self.task, completed=record["update"], told=told(record))
        elif worth_telling(trainer, record):
            total = trainer.settings.updates
            left = _clock(self._seconds_left(record["update"], total))
            print(f"{int(record['update'])}/{total}  {told(record)}  left {left}", flush=True)

    def ended(self, trainer: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _seconds_left(self, update: float, total: int) -> float:
        assert self._last is not None
        start, done = self._last
        return (time.perf_counter() - start) / max(update - done, 1) * (total - update)


class JsonLines:
    """`folder/log.jsonl`, a record a line. A run that resumes drops what lies beyond its start, so
    the file tells of one run, each update once."""

    name = "log.jsonl"

    def __init__(self) -> None:
        self._spared, self._cut = _Spared(), False

    def started(self, trainer: Any) -> None:
        if not _first(trainer):
            return
        path = self._path(trainer)
        with self._spared(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            held = read(path) if trainer.update > 0 else []
            kept = [record for record in held if record["update"] <= trainer.update]
            with replacing(path) as temporary:
                temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def begun(self, trainer: Any, record: Mapping[str, float]) -> None:
        self.updated(trainer, record)

    def updated(self, trainer: Any, record: Mapping[str, float]) -> None:
        if not (_first(trainer) and worth_telling(trainer, record)):
            return
        path, line = self._path(trainer), json.dumps(_plain(record)) + "\n"
        if self._cut:
            line = "\n" + line
        self._cut = True
        with self._spared(path):
            with path.open("a") as file:
                file.write(line)
            self._cut = False

    def _path(self, trainer: Any) -> Path:
        return Path(trainer.folder) / self.name


class TensorBoard:
    """`folder/tensorboard`, a curve a name (needs `tensorboard`).

    `writer` is there for others' images and sounds; on other ranks it is None.
    """

    def __init__(self) -> None:
        self.writer: Any = None
        self._spared = _Spared()

    def started(self, trainer: Any) -> None:
        if not _first(trainer):
            return
        from torch.utils.tensorboard import SummaryWriter

        path = self._path(trainer)
        with self._spared(path):
            beyond = trainer.update + 1 if trainer.update > 0 else 0
            self.writer = SummaryWriter(str(path), purge_step=beyond)

    def begun(self, trainer: Any, record: Mapping[str, float]) -> None:
        self.updated(trainer, record)

    def updated(self, trainer: Any, record: Mapping[str, float]) -> None:
        if self.writer is None or not worth_telling(trainer, record):
            return
        writer, self.writer = self.writer, None  # one that has failed fails again
        with self._spared(self._path(trainer)):
            for name, value in record.items():
                if name != "update":
                    tag = name if "/" in name else f"train/{name}"
                    writer.add_scalar(tag, value, int(record["update"]))
            self.writer = writer

    def ended(self, trainer: Any) -> None:
        if self.writer is not None:
            with self._spared(self._path(trainer)):
                self.writer.close()
            self.writer = None

    def _path(self, trainer: Any) -> Path:
        return Path(trainer.folder) / "tensorboard"


def read(path: str | Path) -> list[dict[str, float]]:
    """The records of a `log.jsonl`; lines that a kill or a full disk has cut off are left out."""
    path = Path(path)
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


class _Spared:
    """A run goes on where its log cannot be written, which is warned of once."""

    def __init__(self) -> None:
        self.warned = False

    @contextlib.contextmanager
    def __call__(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.warned:
                why = error.strerror or error
                warnings.warn(f"{path}: {why}: the run goes on, its log has gaps", stacklevel=3)
            self.warned = True


def worth_telling(trainer: Any, record: Mapping[str, float]) -> bool:
    update = int(record["update"])
    return (
        (update > 0 and update % trainer.settings.log_every == 0)
        or update == trainer.settings.updates
        or bool(record.get("skipped", 0))
        or any("/" in name for name in record)
    )


def told(record: Mapping[str, float]) -> str:
    """A record in a line."""
    parts = []
    if "loss" in record:  # not before the first update
        parts += [f"loss {record['loss']:.4g}", f"norm {record['norm']:.3g}"]
        parts += [f"lr {record['lr']:.2e}"]
    if record.get("seconds"):
        parts.append(f"{record['frames'] / record['seconds']:,.0f} frames/s")
    parts += [f"{name} {value:.4g}" for name, value in record.items() if name.startswith("val/")]
    return "  ".join(parts)


def _plain(record: Mapping[str, float]) -> dict[str, float | None]:
    """What JSON knows: no NaN, no infinity."""
    return {
        name: value if not isinstance(value, float) or math.isfinite(value) else None
        for name, value in record.items()
    }


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _first(trainer: Any) -> bool:
    return trainer.accelerator.is_main_process
