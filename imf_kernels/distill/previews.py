"""Previews: what the student's mels look and sound like, beside the truth and the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imf_kernels import checks
from imf_kernels.distill.held_out import Extra, FineSolves, student_mel
from imf_kernels.distill.logs import TensorBoard
from imf_kernels.files import replacing
from imf_kernels.objectives.batch import Batch

Vocoder = Callable[[Tensor], Any]
"""A mel `(C, n)`, as the model has it, to samples `(m,)`."""


class Previews:
    """Spectrograms, and with a vocoder sounds, of a few fixed utterances.

    A callback of the `Trainer`: every `every` updates, and after the last, into `folder/previews`,
    and into TensorBoard if one is given.

    Args:
        batch: The utterances.
        solves: Of the teacher.
        every: Updates between.
        nfe: Numbers of steps, on the uniform grid.
        vocoder, rate: For sounds, and their samples a second (needs `soundfile`).
        tensorboard: Where they are shown besides.
        extra: See `held_out.Extra`.
    """

    name = "previews"

    def __init__(
        self,
        batch: Batch,
        solves: FineSolves,
        *,
        every: int = 5000,
        nfe: Sequence[int] = (1, 2, 3),
        vocoder: Vocoder | None = None,
        rate: int | None = None,
        tensorboard: TensorBoard | None = None,
        extra: Extra | None = None,
    ) -> None:
        checks.positive_int("every", every)
        if (vocoder is None) != (rate is None):
            raise ValueError(f"rate: expected one with a vocoder, none without, got {rate}")
        self.batch, self.solves, self.every, self.nfe = batch, solves, every, tuple(nfe)
        self.vocoder, self.rate, self.tensorboard, self.extra = vocoder, rate, tensorboard, extra

    def updated(self, trainer: Any, record: dict[str, float]) -> None:
        if trainer.update % self.every and trainer.update != trainer.settings.updates:
            return
        columns = self.mels(trainer)  # on all ranks, as sharded weights want it
        if trainer.accelerator.is_main_process:
            folder = Path(trainer.folder) / self.name
            folder.mkdir(parents=True, exist_ok=True)
            self._show(folder, trainer.update, columns)
            if self.vocoder is not None:
                self._play(folder, trainer.update, columns)

    def mels(self, trainer: Any) -> dict[str, list[Tensor]]:
        """By column ("truth", "teacher", "nfe 1", ...) the utterances' mels `(n, C)`."""
        batch = self.batch.to(trainer.accelerator.device)
        noise = self.solves.noise(batch)
        columns = {"truth": batch.x1, "teacher": self.solves.of(batch)}
        with trainer.averaged():
            for steps in self.nfe:
                mel = student_mel(trainer.student, noise, batch, steps, extra=self.extra)
                columns[f"nfe {steps}"] = mel
        lengths = batch.lengths.tolist()
        given = (~batch.counted("span"))[:, :, None]  # the prompt is the speaker's own

        def rows(mel: Tensor) -> list[Tensor]:
            mel = torch.where(given, batch.x1, mel).cpu()
            return [row[:n] for row, n in zip(mel, lengths, strict=True)]

        return {name: rows(mel) for name, mel in columns.items()}

    def _show(self, folder: Path, update: int, columns: dict[str, list[Tensor]]) -> None:
        import numpy
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        rows = len(columns["truth"])
        figure = Figure((3.2 * len(columns), 1.8 * rows), layout="constrained")
        panels = figure.subplots(rows, len(columns), squeeze=False)
        for j, (name, mels) in enumerate(columns.items()):
            panels[0, j].set_title(name)
            for i, mel in enumerate(mels):
                truth = columns["truth"][i]
                panels[i, j].imshow(
                    mel.T.numpy(), origin="lower", aspect="auto", vmin=truth.min(), vmax=truth.max()
                )
                panels[i, j].set_axis_off()
        canvas = FigureCanvasAgg(figure)
        with replacing(folder / f"{update:08d}.png") as temporary:
            figure.savefig(temporary, dpi=80, format="png")
        if self.tensorboard is not None and self.tensorboard.writer is not None:
            canvas.draw()
            image = numpy.asarray(canvas.buffer_rgba())[:, :, :3]
            self.tensorboard.writer.add_image(self.name, image, update, dataformats="HWC")

    def _play(self, folder: Path, update: int, columns: dict[str, list[Tensor]]) -> None:
        import soundfile

        assert self.vocoder is not None
        assert self.rate is not None
        for name, mels in columns.items():
            for i, mel in enumerate(mels):
                samples = torch.as_tensor(self.vocoder(mel.T.contiguous())).float().flatten().cpu()
                label = f"{i}_{name.replace(' ', '')}"
                path = folder / f"{update:08d}_{label}.wav"
                with replacing(path) as temporary:
                    soundfile.write(temporary, samples.numpy(), self.rate, format="WAV")
                if self.tensorboard is not None and self.tensorboard.writer is not None:
                    self.tensorboard.writer.add_audio(
                        f"{self.name}/{label}", samples.clamp(-1, 1), update, self.rate
                    )
