"""What the velocity models have in common: the doors of `model(x, t, r, cond)`, and where rows lie.

A family computes `modulation` (or `tables` for a known grid) from the times and `velocity` from
frames; here a batch becomes frames, padded or packed, and frames become a batch again.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from imf_kernels import checks
from imf_kernels.models.conditioning import Conditioning, Layout
from imf_kernels.models.linears import FusedLinears
from imf_kernels.models.scope import CacheSizes, Extension
from imf_kernels.models.step_tables import Modulation, StepTables
from imf_kernels.models.time_embedding import GuidanceEmbedding
from imf_kernels.rows import Rows


class Estimator(nn.Module):
    """Velocity `v(x, t)` of a flow-matching teacher, or mean velocity `u(x, t, r)` of a student."""

    root: ClassVar[str]
    """A key of every client's state dict, after a prefix of the client's."""

    checkpoint_activations = False
    """Whether training recomputes the blocks' activations instead of keeping them."""

    guidance_embed: GuidanceEmbedding | None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.register_state_dict_post_hook(with_storage_of_its_own)

    # -- a family's own -------------------------------------------------------------------------

    @property
    def last(self) -> Any:
        """The layer that the velocity comes from."""
        raise NotImplementedError

    def modulation(self, t: Tensor, r: Tensor) -> Modulation:
        """All that depends on the times `(R,)`, with gradients."""
        raise NotImplementedError

    def tables(self, t: Tensor, r: Tensor) -> StepTables:
        """The same without gradients, for NFE intervals at once; see `step_tables`."""
        raise NotImplementedError

    def velocity(
        self,
        x: Tensor,
        conditions: Tensor,
        modulation: Modulation,
        rows: Rows,
        cond: Conditioning,
    ) -> Tensor:
        """State `(T, C)` and conditions `(branches, T, D)` to `(branches * T, C)`.

        `rows` are those of all branches. What it says of frames of no row means nothing.
        """
        raise NotImplementedError

    @property
    def cache_sizes(self) -> CacheSizes:
        """What `extend` keeps of the frames that it has evaluated.

        Raises:
            ValueError: a model whose frames depend on all later ones.
        """
        raise NotImplementedError

    def extend(
        self, x: Tensor, conditions: Tensor, modulation: Modulation, extension: Extension
    ) -> Tensor:
        """The velocity of new frames alone, as with the streaming mask over whole rows.

        Exact if each row has been extended by whole blocks of `config.chunk` frames before. Without
        gradients.

        Args:
            x: State of the new frames `(T, C)`, the rows behind one another.
            conditions: What `prepare` makes of these frames, `(branches, T, D)`.
            modulation: Of one row for all, or of every row of every branch.
            extension: From a `Cache`, of the rows of all branches, conditional ones first.

        Returns:
            `(branches * T, C)` in the model's dtype.
        """
        raise NotImplementedError

    # -- common ---------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the blocks compute in: the weights'."""
        return self.last.weight.dtype

    @property
    def channels(self) -> int:
        """Mel channels C."""
        return self.config.channels

    def keep_weights_apart(self) -> None:
        """Never again move weights that are read as one next to each other.

        For `fully_shard`, which gathers each into a storage of its own and would go on doing so
        where nobody reads. Objectives call it for a student that is sharded.
        """
        for module in self.modules():
            for value in vars(module).values():
                if isinstance(value, FusedLinears):
                    value.movable = False

    def shards(self) -> list[nn.Module]:
        """The modules that `fully_shard` may take by themselves: their weights are read by their
        own forward alone."""
        return []

    def student(self, diagonal: float = 1.0, *, guidance: bool = False) -> Self:
        """A copy that also takes `r`, through a mixer `[D 0]`, D = `diagonal` times the identity.

        With the identity it equals this model for every r. It is trainable and in training mode,
        whatever this model is.

        Args:
            guidance: Make a student whose `prepare` is told the guidance w, for `IntMeanFlow` with
                `guidance` drawn. An embedding of w, 0 until it is trained, is part of what
                `prepare` makes of every frame; evaluations know nothing of it.
        """
        switches = {"mixer_diagonal": diagonal, "guidance": guidance or self.config.guidance}
        student = type(self)(replace(self.config, mixer=True, **switches))
        student.to(device=self.last.weight.device, dtype=self.dtype)
        student.load_state_dict(self.state_dict())
        student.checkpoint_activations = self.checkpoint_activations
        return student

    def check_guidance(self, w: Tensor | float | None, rows: int) -> None:
        """Raises unless w is what `prepare` of this model takes: None, or a number or `(B,)`."""
        if not self.config.guidance:
            if w is not None:
                raise ValueError(
                    "guidance: expected None for a model that is not told it "
                    f"(`model.student(guidance=True)`), got {w}"
                )
        elif isinstance(w, Tensor):
            checks.shape("guidance", w, rows)
            checks.floating("guidance", w)
        elif isinstance(w, bool) or not isinstance(w, int | float) or not math.isfinite(w):
            raise ValueError(
                f"guidance: expected a finite number or a tensor (B,) for this student, got {w!r}"
            )

    def add_guidance(self, conditions: Tensor, w: Tensor | float | None, rows: Rows) -> Tensor:
        """Conditions `(branches, T, D)`, with the embedding of w for a model that is told it."""
        count = rows.lengths.shape[0]
        self.check_guidance(w, count)
        if self.guidance_embed is None or w is None:
            return conditions
        if not isinstance(w, Tensor):
            w = torch.full((count,), w, dtype=torch.float32, device=conditions.device)
        e = self.guidance_embed(w).to(conditions.dtype)
        return conditions + e[rows.row_of.clamp(min=0)]

    def forward(self, x: Tensor, t: Tensor, r: Tensor, cond: Conditioning) -> Tensor:
        """The velocity at `(x, t)`, or with a mixer the mean velocity over `[t, r]`.

        Args:
            x: State `(B, N, C)`, any floating dtype.
            t, r: Times, float32 `(B,)`; `r` is not used without a mixer.
            cond: From `prepare`, B rows, or 2B when guided: the state is then shared by both
                branches, not doubled by the caller.

        Returns:
            `(R, N, C)` in the model's dtype, R = `cond.rows`; zero beyond each row's length.
        """
        _check(cond)
        rows = x.shape[0]
        checks.shape("t", t, rows)
        checks.shape("r", r, rows)
        if cond.rows == 2 * rows:
            t, r = t.repeat(2), r.repeat(2)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.evaluate(x, self.modulation(t, r), cond)
        return self.evaluate(x, self.tables(t[None], r[None]).at(0), cond)

    def evaluate(self, x: Tensor, modulation: Modulation, cond: Conditioning) -> Tensor:
        """`forward` with all that depends on `t, r` given: one step of `tables`, or live.

        `modulation` has one row for all, or `cond.rows`.
        """
        _check(cond)
        batch, frames = x.shape[0], _frames(cond)
        branches = _branches(cond, batch)
        checks.shape("x", x, batch, frames, self.channels)
        layout = cond.layout
        if layout is None or layout.batch != batch:
            layout = _layout(cond, batch)
        rows, x = layout.rows, x.to(self.dtype)
        # selected, never multiplied by 0: beyond a row's length anything may stand, NaN included
        if layout.branch is not None:
            conditions = cond["packed"].unflatten(0, (branches, -1))
            v = self.velocity(layout.branch.pack(x), conditions, modulation, rows, cond)
            return rows.unpack(v, frames)
        outside: Any = layout.outside
        conditions = cond["conditions"].view(branches, batch * frames, -1)
        x = x.masked_fill(outside[:batch], 0.0).flatten(0, 1)
        v = self.velocity(x, conditions, modulation, rows, cond)
        return v.unflatten(0, outside.shape[:2]).masked_fill(outside, 0.0)

    def lay_out(self, cond: Conditioning, batch: int) -> Conditioning:
        """`cond` with its layout, for all evaluations of one solve of `batch` rows.

        Without it every evaluation makes its own: 7 operations, of packed rows 8, guided 15.
        """
        _check(cond)
        return Conditioning(cond, cond.specs, _layout(cond, batch))


def _check(cond: Any) -> None:
    if not isinstance(cond, Conditioning):
        raise TypeError(f"cond: expected what `prepare` returned, got {type(cond).__name__}")


def _branches(cond: Conditioning, batch: int) -> int:
    if cond.rows not in (batch, 2 * batch):
        raise ValueError(f"x: expected {cond.rows} rows, or half of it when guided, got {batch}")
    return cond.rows // max(batch, 1)


def _frames(cond: Conditioning) -> int:
    """Of every padded row."""
    return cond["rope" if "rope" in cond else "frames"].shape[0]


def _layout(cond: Conditioning, batch: int) -> Layout:
    lengths, frames, branches = cond["lengths"], _frames(cond), _branches(cond, batch)
    if "packed" in cond:
        total = cond["packed"].unflatten(0, (branches, -1)).shape[1]
        branch = Rows.packed(lengths[:batch], total, frames)
        return Layout(batch, branch.repeat(branches), branch=branch)
    rows = Rows.padded(lengths, frames)
    outside = (rows.row_of < 0).view(lengths.shape[0], frames, 1)
    return Layout(batch, rows, outside=outside)


def with_storage_of_its_own(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any
) -> None:
    """Copies of the weights that are slices of a fused storage: whoever saves a state dict may take
    such for one tensor under many names, and drop all but one. Parameters (`keep_vars`) stay."""
    for name, value in state_dict.items():
        ours = name.startswith(prefix) and type(value) is Tensor
        if ours and value.untyped_storage().nbytes() > value.nbytes:
            state_dict[name] = value.clone()


def checked_lengths(lengths: Tensor | None, batch: Tensor) -> Tensor:
    """Frames of each row of a batch `(B, N, ...)`, int64 on its device; None: all N."""
    rows, frames = batch.shape[:2]
    if lengths is None:
        return torch.full((rows,), frames, device=batch.device)
    checks.lengths("lengths", lengths, rows, frames)
    return lengths.to(device=batch.device, dtype=torch.int64)


def packed_rows(packed: bool | int, lengths: Tensor, frames: int) -> Rows | None:
    """The layout that `prepare(packed=...)` asks for, of one branch's rows; None: padded."""
    if packed is False:
        return None
    if packed is True:
        return Rows.packed(lengths, int(lengths.sum()), frames)
    checks.positive_int("packed", packed)
    if checks.readable(lengths) and packed < int(lengths.sum()):
        raise ValueError(
            f"packed: expected no fewer frames than lengths {lengths.tolist()} sum to, got {packed}"
        )
    return Rows.packed(lengths, packed, frames)
