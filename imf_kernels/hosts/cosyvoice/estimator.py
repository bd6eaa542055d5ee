"""The host's estimator: its seven arguments, its layout `[R, C, T]`, its state dict."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from imf_kernels import checks, masks
from imf_kernels.models import CausalUNet, Conditioning, DiT
from imf_kernels.models.estimator import with_storage_of_its_own
from imf_kernels.profiling import span

Model = DiT | CausalUNet


class Estimator(nn.Module):
    """A model in the place of `flow.decoder.estimator`, for the host's Euler loop and training.

    Parameters, buffers and state dict have the host's names, a student's its
    `time_embed_mixer.weight` besides; a teacher's state dict loads strictly into either. Every call
    prepares anew: the host refills the same tensors, and only reading them would tell whether they
    changed. `CFM` prepares once per solve.

    Attributes:
        model: The model, which shares all its layers with this.
        guidance: w of a student that is told it, whose host does not tell its estimator.
    """

    def __init__(self, model: Model, guidance: float | None = None) -> None:
        if not isinstance(model, Model):
            raise TypeError(f"model: expected a DiT or a CausalUNet, got {type(model).__name__}")
        super().__init__()
        self.guidance = guidance
        self._held = (model,)  # no child of ours, or it would stand in every name
        self._modules = model._modules  # the one dictionary: what is replaced here is there too
        self.register_state_dict_post_hook(with_storage_of_its_own)
        self.train(model.training)

    @property
    def model(self) -> Model:
        return self._held[0]

    @property
    def dtype(self) -> torch.dtype:
        """The weights'."""
        return self.model.dtype

    @property
    def static_chunk_size(self) -> int:
        """Frames per block of streaming attention, where hosts read and assign it."""
        return self.model.config.chunk

    @static_chunk_size.setter
    def static_chunk_size(self, frames: int) -> None:
        checks.positive_int("static_chunk_size", frames)
        self.model.config = replace(self.model.config, chunk=frames)

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        mu: Tensor,
        t: Tensor,
        spks: Tensor,
        cond: Tensor,
        streaming: bool = False,
        *,
        r: Tensor | None = None,
    ) -> Tensor:
        """The velocity at `(x, t)`, or a student's mean velocity over `[t, r]`.

        Args:
            x, mu, cond: State, token features, prompt mel, floating `[R, C, T]`. Guided rows are
                rows like any other.
            mask: Ones over each row's frames, then zeros, `[R, 1, T]`.
            t: Times, floating `[R]`, or a single one of all rows.
            spks: Speaker features `[R, C]`.
            streaming: Block-causal attention.
            r: As `t` (Chatterbox); None: `t`, where the mean velocity is the velocity.

        Returns:
            Float32 `[R, C, T]`, zero beyond each row's frames: `x + dt v` is then a float32 state,
            whatever the host's dtype.
        """
        given = prepare(self.model, mask, mu, spks, cond, streaming, told=self.guidance)
        start = times("t", t, len(x))
        end = start if r is None else times("r", r, len(x))
        with span("evaluation"):
            v = self.model(x.mT.contiguous(), start, end, given)
        return v.mT.float().contiguous()


def prepare(
    model: Model,
    mask: Tensor,
    mu: Tensor,
    spks: Any,
    cond: Any,
    streaming: bool,
    guided: bool = False,
    told: float | None = None,
) -> Conditioning:
    """`model.prepare` of the host's tensors; errors speak of these.

    `told` is the w of a student that is told it.
    """
    checks.shape("mu", mu, "R", model.config.channels, "T")
    rows, channels, frames = mu.shape
    checks.shape("mask", mask, rows, 1, frames)
    checks.shape("spks", spks, rows, channels)
    checks.shape("cond", cond, rows, channels, frames)
    return model.prepare(
        cond.mT,
        lengths_of(mask),
        mu=mu.mT,
        spks=spks,
        guided=guided,
        streaming=streaming,
        guidance=told,
    )


def lengths_of(mask: Tensor) -> Tensor:
    """Each row's frames, int64 `[R]`, of a mask `[R, 1, T]`; a half precision sum would round."""
    inside = mask[:, 0] != 0
    lengths = inside.sum(dim=1)
    if checks.readable(mask) and not torch.equal(inside, masks.inside(lengths, mask.shape[2])):
        raise ValueError("mask: expected ones, then zeros, in every row, got zeros in between")
    return lengths


def times(name: str, t: Tensor, rows: int) -> Tensor:
    """A time for each row, float32 `[R]`, of `[R]` or of a single one."""
    if t.numel() == 1:
        t = t.reshape(1).expand(rows)
    checks.shape(name, t, rows)
    return t.float()
