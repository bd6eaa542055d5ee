"""A student baked for known grids: its step tables, and a model without what they replace."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from imf_kernels import checks
from imf_kernels import grids as time_grids
from imf_kernels.files import replacing
from imf_kernels.models.config import DiTConfig
from imf_kernels.models.dit import DiT
from imf_kernels.models.step_tables import StepTables
from imf_kernels.version import __version__

KIND = "dit"
FORMAT = 1


class Baked:
    """A DiT for G grids of the same NFE, which no longer holds its adaLN weights.

    A snapshot: later changes of the student do not reach it.

    Attributes:
        model: `DiT` with `config.baked`, in eval mode.
        grids: Float32 `(G, NFE + 1)`, on the CPU.
        tables: `StepTables` with a leading dimension G.
        nbytes_before: Bytes of the student's weights; `nbytes` are those of this.
    """

    def __init__(self, model: DiT, grids: Tensor, tables: StepTables, nbytes_before: int) -> None:
        self.model, self.grids, self.tables = model, grids, tables
        self.nbytes_before = nbytes_before

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        student: DiT,
        grids: Sequence[str | Tensor | Sequence[float]],
        nfe: int | None = None,
    ) -> Baked:
        """Bake a student (or a teacher's model, guided or not).

        Args:
            grids: Times, or names with `nfe`, all of the same NFE.

        Raises:
            ValueError: no grid, an invalid one, or grids of different NFE.
            TypeError: not a DiT.
        """
        if not isinstance(student, DiT):
            raise TypeError(f"student: expected a DiT, got {type(student).__name__}")
        if isinstance(grids, str | Tensor) or not grids:
            raise ValueError(f"grids: expected a list of one grid or more, got {grids!r}")
        if student.config.baked:
            raise ValueError("student: expected a model with its adaLN weights, got a baked one")
        made_grids = [time_grids.make(grid, nfe, name="grids").cpu() for grid in grids]
        if len({len(grid) for grid in made_grids}) > 1:
            counts = [len(grid) - 1 for grid in made_grids]
            raise ValueError(f"grids: expected grids of the same NFE, got {counts}")
        times = torch.stack(made_grids)
        device = student.proj_out.weight.device
        made = [student.tables(grid[:-1], grid[1:]) for grid in times.to(device)]
        blocks, final = (torch.stack(parts) for parts in zip(*made, strict=True))
        return cls(student.baked(), times, StepTables(blocks, final), _bytes_of(student))

    @property
    def nfe(self) -> int:
        return self.grids.shape[1] - 1

    @property
    def nbytes(self) -> int:
        """Resident bytes of weights and tables."""
        return _bytes_of(self.model) + self.tables.nbytes

    def index(self, grid: Tensor) -> int:
        """Which of the grids this is.

        Raises:
            ValueError: none of them.
        """
        same = (self.grids == grid.cpu()).all(dim=1).nonzero()
        if not len(same):
            raise ValueError(
                f"grid: expected one of the {len(self.grids)} baked grids "
                f"{self.grids.tolist()}, got {grid.tolist()}"
            )
        return int(same[0])

    def at(self, grid: Tensor) -> StepTables:
        """The tables of one grid."""
        index = self.index(grid)
        return StepTables(self.tables.blocks[index], self.tables.final[index])

    def to(self, device: torch.device | str) -> Baked:
        """On another device; the model itself moves."""
        tables = self.tables.to(device)
        return Baked(self.model.to(device), self.grids, tables, self.nbytes_before)

    def save(self, path: str | Path) -> None:
        """Write as safetensors, atomically; grids, model kind and versions are its metadata."""
        from safetensors.torch import save_file

        tensors = {f"model.{k}": v.contiguous() for k, v in self.model.state_dict().items()}
        tensors["tables.blocks"], tensors["tables.final"] = map(Tensor.contiguous, self.tables)
        metadata = {
            "kind": KIND,
            "format": str(FORMAT),
            "config": json.dumps(asdict(self.model.config)),
            "grids": json.dumps(self.grids.tolist()),
            "nbytes_before": str(self.nbytes_before),
            "imf_kernels": __version__,
            "torch": torch.__version__,
        }
        with replacing(Path(path)) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Baked:
        """Read what `save` wrote.

        Raises:
            ValueError: not a baked model of this format, the error names the file; or no such
                device, which it then names.
        """
        from safetensors import SafetensorError, safe_open

        device = checks.device("device", device)
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                _expect(metadata)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            model = DiT(DiTConfig.from_dict(json.loads(metadata["config"])))
            weights = {
                name.removeprefix("model."): tensor
                for name, tensor in tensors.items()
                if name.startswith("model.")
            }
            model.to(device=device, dtype=weights["proj_out.weight"].dtype)
            model.load_state_dict(weights)
            grids = torch.tensor(json.loads(metadata["grids"]), dtype=torch.float32)
            tables = StepTables(tensors["tables.blocks"], tensors["tables.final"])
            nbytes_before = int(metadata["nbytes_before"])
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"path: expected a saved baked model, got {path}: {error}") from error
        return cls(model.eval(), grids, tables, nbytes_before)


def _bytes_of(model: DiT) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def _expect(metadata: Mapping[str, str]) -> None:
    for name, wanted in (("kind", KIND), ("format", str(FORMAT))):
        if metadata.get(name) != wanted:
            raise ValueError(f"{name}: expected {wanted!r}, got {metadata.get(name)!r}")
