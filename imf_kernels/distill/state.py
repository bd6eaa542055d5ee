"""All that a run changes, and how it is saved and loaded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imf_kernels.distill import saves, stops
from imf_kernels.distill.ema import Ema
from imf_kernels.distill.guard import Guard
from imf_kernels.distill.optimization import adamw, trainable
from imf_kernels.distill.parallel import Spread, from_all, gathered, scattered
from imf_kernels.distill.settings import Settings
from imf_kernels.profiling import spanned
from imf_kernels.version import __version__

FORMAT = 1


class State:
    """A student on its ranks, the averages of its weights, its optimizer, the guard's memory, what
    the objective keeps, and the number of updates done.

    Methods are called by all ranks.
    """

    def __init__(
        self, student: nn.Module, objective: Any, settings: Settings, accelerator: Any
    ) -> None:
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self.student, self.objective, self.settings = student, objective, settings
        self.spread = Spread(student, accelerator, settings.parallel)
        self.parameters = trainable(student)
        self.optimizer = adamw(student, settings.lr, settings.weight_decay, settings.betas)
        decay = settings.ema_decay
        self.ema = None if decay is None else Ema(self.parameters.values(), decay)
        self.guard = Guard(settings.explode)
        self.update = 0

    # -- saving ---------------------------------------------------------------------------------

    @spanned("checkpoint")
    def save(self, folder: Path) -> Path:
        """Write a checkpoint into `folder`, the first rank nearly all of it.

        Raises:
            OSError: it cannot be written; nothing of it is left.
            RankFailed: another rank cannot write its part.
        """
        draft, main = saves.Draft(folder, self.update), self.rank == 0
        try:
            with stops.together():
                if main:
                    draft.begin()
            with stops.together():
                if hasattr(self.objective, "state_dict"):
                    draft.add_flat(f"objective_{self.rank}", self.objective.state_dict())
            for files in from_all(draft.files):
                draft.files |= files
            self._add_tensors(draft)
            with stops.together():
                if main:
                    draft.add("state.json", json.dumps(self._told(), indent=1).encode())
                    draft.publish(self.settings.keep)
        except BaseException:
            if main:
                draft.abandon()
            raise
        return draft.path

    def _told(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "update": self.update,
            "position": self.update * self.settings.accumulate,
            "ranks": self.ranks,
            "settings": self.settings.to_dict(),
            "guard": self.guard.state_dict(),
            "torch": torch.__version__,
            "imf_kernels": __version__,
        }

    def _add_tensors(self, draft: saves.Draft) -> None:
        """Write whole tensors on the first rank, whose memory needs room for one file of them at
        a time; the others help to gather them."""

        def add(name: str, tensors: Mapping[str, Tensor]) -> None:
            whole: Any = {k: gathered(value, self.rank == 0) for k, value in tensors.items()}
            with stops.together():
                if self.rank == 0:
                    draft.add_tensors(name, whole)

        self.spread.reshard()
        add("model", self.student.state_dict())
        if self.ema is not None:
            with self.ema.assigned():
                add("ema", self.parameters)
        moments = self.optimizer.state
        add(
            "optimizer",
            {f"{n}.{k}": v for n, p in self.parameters.items() for k, v in moments[p].items()},
        )

    # -- loading --------------------------------------------------------------------------------

    def load_newest(self, folder: Path) -> None:
        """Load the newest checkpoint in `folder` that is whole, if there is one.

        Raises:
            ValueError: it is of a run with other settings, or all of them are damaged.
        """
        found = None
        with stops.together():
            if self.rank == 0 and (path := saves.newest(folder)) is not None:
                told = json.loads((path / "state.json").read_text())
                self._check(told)
                found = path, told
        found = from_all(found)[0]
        if found is not None:
            with stops.together():
                self._load(*found)

    def _check(self, told: Mapping[str, Any]) -> None:
        if told["format"] != FORMAT:
            raise ValueError(f"format: expected {FORMAT}, got {told['format']}")
        self.settings.check_resume(told["settings"])
        updates, progress = told["settings"]["updates"], getattr(self.objective, "progress", None)
        if progress is not None and updates != self.settings.updates:
            raise ValueError(
                f"updates: expected {updates}, which the objective's progress is measured by, "
                f"got {self.settings.updates}"
            )
        for name, own in (("torch", torch.__version__), ("ranks", self.ranks)):
            if told[name] != own:
                warnings.warn(
                    f"{name}: the run was begun with {told[name]} and goes on with {own}: "
                    "not to the bit as it would have",
                    stacklevel=2,
                )

    @torch.no_grad()
    def _load(self, path: Path, told: Mapping[str, Any]) -> None:
        if self.ema is not None:
            averages = saves.tensors(path, "ema")
            for name, parameter in self.parameters.items():
                parameter.copy_(scattered(averages[name], parameter))
            self.ema.begin()
        own, saved = self.student.state_dict(), saves.tensors(path, "model")
        self.student.load_state_dict({k: scattered(v, own[k]) for k, v in saved.items()})
        for name, value in saves.tensors(path, "optimizer").items():
            parameter_name, _, kind = name.rpartition(".")
            parameter = self.parameters[parameter_name]
            if value.shape == parameter.shape:
                value = scattered(value, parameter)
            else:  # "step", a number on the parameter's device
                value = value.to(parameter.device, copy=True)
            self.optimizer.state[parameter][kind] = value
        if hasattr(self.objective, "load_state_dict"):
            name = f"objective_{self.rank % told['ranks']}"
            self.objective.load_state_dict(saves.flat(path, name))
        self.guard.load_state_dict(told["guard"])
        self.update = told["update"]
