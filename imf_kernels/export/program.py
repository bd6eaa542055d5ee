"""What is exported: `prepare`, every evaluation and every Euler step of one grid, as one graph.

The fused ops are traced as their plain-PyTorch references: kernels of Python cannot go along, and
compilers fuse what they see. Rows, frames and text tokens stay free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from imf_kernels import checks, grids
from imf_kernels.dispatch import backend
from imf_kernels.models import Baked, CausalUNet, DiT, StepTables, StepTokenDiT
from imf_kernels.solver import euler

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Student = Baked | DiT | CausalUNet


class Exportable(nn.Module):
    """A module of tensors to one tensor, all named.

    Attributes:
        dims: The dimensions of every input, in order: "rows", "frames" and "tokens" are free.
        output: What the result is called.
        dtype: The weights'; the error against eager that is allowed depends on it.
    """

    output: ClassVar[str]
    dims: Mapping[str, tuple[str | int, ...]]
    dtype: torch.dtype

    def example(self, lengths: Sequence[int]) -> dict[str, Tensor]:
        """Random inputs for rows of these lengths, the same at every call."""
        raise NotImplementedError


class Solve(Exportable):
    """`mel = solve(noise, prompt, lengths, ...)`, as `sampler.sample` of a student's one grid.

    The inputs after the noise `(B, N, C)` are `model.inputs`, in their order; a prompt has all N
    frames.

    Args:
        student: A student, baked or not, or a teacher's model (without guidance).
        grid: Times, or a name with `nfe`; None: the first of a baked student.
        streaming: Block-causal attention over blocks of `config.chunk` frames.

    Raises:
        ValueError, TypeError: what cannot be exported, and why; not a grid.
    """

    output = "mel"

    def __init__(
        self,
        student: Student,
        grid: str | Tensor | Sequence[float] | None = None,
        nfe: int | None = None,
        *,
        streaming: bool = False,
    ) -> None:
        super().__init__()
        _check(student)
        self.streaming = streaming
        if grid is None:
            if not isinstance(student, Baked):
                raise ValueError("grid: expected times or a name for a student that is not baked")
            grid = student.grids[0]
        times = grids.make(grid, nfe).cpu()
        if isinstance(student, DiT):
            student = Baked.of(student, [times])
        self.model: Any
        if isinstance(student, Baked):
            self.model = student.model
            tables = student.at(times)
        else:
            self.model = student
            known = times.to(student.last.weight.device)
            tables = student.tables(known[:-1], known[1:])
        self.dtype = self.model.dtype
        self.dims = {
            "noise": ("rows", "frames", self.model.channels),
            **{name: spec.dims for name, spec in self.model.inputs.items()},
        }
        self.dt: Tensor
        self.blocks: Tensor
        self.final: Tensor
        self.register_buffer("dt", times.diff().to(tables.blocks.device)[:, None])
        self.register_buffer("blocks", tables.blocks)
        self.register_buffer("final", tables.final)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The state at time 1, float32 `(B, N, C)`; beyond each row's length it stays noise."""
        noise, *given = inputs
        conditions = dict(zip(self.model.inputs, given, strict=True))
        cond = self.model.prepare(**conditions, streaming=self.streaming)
        cond = self.model.lay_out(cond, noise.shape[0])
        tables = StepTables(self.blocks, self.final)
        return euler(
            lambda k, x: self.model.evaluate(x, tables.at(k), cond),
            noise,
            self.dt.expand(-1, noise.shape[0]),
            lengths=cond["lengths"],
            model_dtype=self.dtype,
            accumulate=False,
        ).x

    def example(self, lengths: Sequence[int]) -> dict[str, Tensor]:
        frames = max(lengths)
        sizes = {"rows": len(lengths), "frames": frames, "tokens": max(frames // 2, 1)}
        generator = torch.Generator().manual_seed(frames)
        made = {}
        for name, dims in self.dims.items():
            shape = [sizes[dim] if isinstance(dim, str) else dim for dim in dims]
            made[name] = torch.randn(shape, generator=generator).to(self.blocks.device)
        made["lengths"] = torch.tensor(lengths, device=self.blocks.device)
        made["prompt"][:, frames // 3 :] = 0.0
        if "text" in made:
            vocab = self.model.text_embed.config.vocab
            ids = torch.randint(vocab, made["text"].shape, generator=generator)
            made["text"] = ids.to(self.blocks.device)
        return made


def program(
    student: Student | Exportable,
    grid: str | Tensor | Sequence[float] | None = None,
    nfe: int | None = None,
    *,
    streaming: bool = False,
    rows: int = 8,
    frames: int = 4096,
) -> ExportedProgram:
    """The whole solve as a `torch.export` program of ATen operations; see `Solve`.

    Args:
        rows: At most this many rows; 1: always one.
        frames: At most this many frames, and text tokens: 30 or more. A batch has 4 frames or more.

    Raises:
        ValueError, TypeError: what cannot be exported, and why; not a grid.
    """
    return trace(subject_of(student, grid, nfe, streaming=streaming), rows, frames)


def subject_of(student: Student | Exportable, *arguments: Any, **options: Any) -> Exportable:
    """What is exportable as it is, or the solve of a student."""
    if isinstance(student, Exportable):
        return student
    return Solve(student, *arguments, **options)


def trace(subject: Exportable, rows: int = 8, frames: int = 4096) -> ExportedProgram:
    """The program of anything exportable, its named dimensions free."""
    from torch.export import export

    checks.positive_int("rows", rows)
    checks.whole("frames", frames, max(TRACED))
    inputs = subject.example(TRACED[: min(rows, 2)])
    with torch.no_grad(), backend("reference"):
        shapes = (tuple(free_dims(subject, rows, frames)),)  # of `*inputs`
        return export(subject, tuple(inputs.values()), dynamic_shapes=shapes)


def free_dims(subject: Exportable, rows: int, frames: int) -> list[dict[int, Any]]:
    """Each input's free dimensions, as `torch.export` wants them."""
    from torch.export import Dim

    free = {
        "frames": Dim("frames", min=LEAST, max=frames),
        "tokens": Dim("tokens", min=1, max=frames),
    }
    if rows > 1:
        free["rows"] = Dim("rows", min=1, max=rows)
    return [
        {i: free[dim] for i, dim in enumerate(dims) if isinstance(dim, str) and dim in free}
        for dims in subject.dims.values()
    ]


LEAST = 4
"""Frames of the shortest batch: no fewer than a lone row's convolutions have taps."""
TRACED = (30, 22)
"""Lengths of the rows that are traced, none of them special."""


def _check(student: Any) -> None:
    if not isinstance(student, Student):
        raise TypeError(
            f"student: expected a Baked, a DiT or a CausalUNet, got {type(student).__name__}"
        )
    model = student.model if isinstance(student, Baked) else student
    if isinstance(model, StepTokenDiT):
        raise ValueError(
            "student: expected one without step tokens, which stand between the frames of rows, "
            f"got counts {model.counts}"
        )
    if isinstance(model, DiT) and model.config.fp8:
        raise ValueError(
            "student: expected one without FP8, whose products are kernels of this package alone, "
            f"got {model.config.fp8}"
        )
