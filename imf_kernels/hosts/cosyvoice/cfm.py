"""The host's decoder: its sampler and its loss, around an estimator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imf_kernels import checks, grids, guidance, masks, sampler
from imf_kernels.graphs import DEFAULT, GraphSampler
from imf_kernels.hosts.cosyvoice.estimator import Estimator, Model, lengths_of, prepare
from imf_kernels.hosts.replays import Replays
from imf_kernels.objectives import Batch

NOISE_FRAMES = 15000


class CFM(nn.Module):
    """In the place of `flow.decoder`: solves over any grid, and trains or distils.

    A teacher is guided, a student (with a mixer) is not. State, grid and noise are float32 in any
    dtype of the flow, a row among others is the row alone, and no random state is touched (but by
    noise that is "drawn").

    Args:
        estimator: An `Estimator`, or its model.
        grid: A named grid, or times from 0 to 1 such as O3S finds.
        nfe: Steps of a named grid, whatever number the caller asks for (the flow always asks for
            10); None: the caller's number.
        inference_cfg_rate: The host's guidance c, w = 1 + c; 0 for none. A student that is told its
            guidance is told this.
        training_cfg_rate: Share of the rows that flow-matching training drops the conditions of.
        sigma_min: Of the host's flow-matching path.
        noise: The table that noise is taken from, `[1, C, L]`; "table": CosyVoice's, of the seed 0;
            "drawn": no table, torch's random state, as Chatterbox has it.
        objective: `loss, info = objective(model, batch)`, such as `IntMeanFlow`: `compute_loss` is
            then the distillation's. It and its teacher are outside of the module tree.
        returns: "tuple", `(mel, None)`, or "tensor", as the first versions of the host had it.
        training_times: How flow-matching training draws t: "uniform", or "cosine" (before 2026).
        streaming: Of calls that leave it open, as all of an older host do.

    The arguments are attributes, and may be assigned later.
    """

    def __init__(
        self,
        estimator: Estimator | Model,
        *,
        grid: str | Tensor | Sequence[float] = "cosine",
        nfe: int | None = None,
        inference_cfg_rate: float = 0.7,
        training_cfg_rate: float = 0.2,
        sigma_min: float = 1e-6,
        noise: Tensor | str = "table",
        objective: Callable[[Any, Batch], tuple[Tensor, Any]] | None = None,
        returns: str = "tuple",
        training_times: str = "uniform",
        streaming: bool = False,
    ) -> None:
        if not math.isfinite(inference_cfg_rate):
            raise ValueError(
                f"inference_cfg_rate: expected a finite number, got {inference_cfg_rate}"
            )
        for name, share in (("training_cfg_rate", training_cfg_rate), ("sigma_min", sigma_min)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {share}")
        checks.choice("returns", returns, ("tuple", "tensor"))
        checks.choice("training_times", training_times, ("uniform", "cosine"))
        grids.make(grid, 1 if nfe is None and isinstance(grid, str) else nfe)
        super().__init__()
        self.estimator = estimator if isinstance(estimator, Estimator) else Estimator(estimator)
        self.grid, self.nfe = grid, nfe
        self.inference_cfg_rate = inference_cfg_rate
        self.training_cfg_rate = training_cfg_rate
        self.sigma_min = sigma_min
        channels = self.model.config.channels
        self.rand_noise: Any
        if isinstance(noise, str):
            checks.choice("noise", noise, ("table", "drawn"))
            self.rand_noise = host_noise(channels) if noise == "table" else None
        else:
            checks.shape("noise", noise, 1, channels, "L")
            self.rand_noise = noise
        self.objective = objective
        self.returns = returns
        self.training_times = training_times
        self.streaming = streaming
        self._replays = Replays()

    @property
    def model(self) -> Model:
        """The estimator's model, which objectives and graphs take."""
        if not isinstance(self.estimator, Estimator):
            raise TypeError(
                f"estimator: expected an Estimator, got {type(self.estimator).__name__}"
            )
        return self.estimator.model

    def capture(
        self,
        nfe: int | None = None,
        *,
        buckets: Iterable[tuple[int, ...]] = DEFAULT,
        slots: int = 1,
    ) -> GraphSampler:
        """Replay later solves from CUDA graphs; elsewhere than on CUDA they run as before.

        Those of `nfe` evaluations that are not streaming. After a change of weights call the
        sampler's `refresh()`.

        Args:
            nfe: None: this object's own, or that of its times; 10 where it has none.
            buckets, slots: See `graphs.GraphSampler`, which this returns.
        """
        if nfe is None and self.nfe is None:
            nfe = 10 if isinstance(self.grid, str) else len(self.grid) - 1
        nfe = self.nfe if nfe is None else nfe
        return self._replays.capture(self.model, nfe, self._w, buckets, slots)

    @property
    def _w(self) -> float | None:
        """Of a teacher's solves; a student has its guidance within."""
        if not self.inference_cfg_rate or self.model.config.mixer:
            return None
        return guidance.from_cosyvoice(self.inference_cfg_rate)

    @property
    def _told(self) -> float | None:
        """What a student is told that is told its guidance."""
        if not self.model.config.guidance:
            return None
        return guidance.from_cosyvoice(self.inference_cfg_rate)

    @torch.no_grad()
    def forward(
        self,
        mu: Tensor,
        mask: Tensor,
        n_timesteps: int | None = None,
        temperature: float = 1.0,
        spks: Any = None,
        cond: Any = None,
        streaming: bool | None = None,
        noised_mels: Tensor | None = None,
        meanflow: bool = False,
        *,
        noise: Tensor | None = None,
    ) -> Any:
        """Solve from noise to mels.

        Args:
            mu: Token features, floating `[B, C, T]`; left as it is.
            mask: Ones over each row's frames, then zeros, `[B, 1, T]`.
            n_timesteps: Steps, where `nfe` and the grid leave it open.
            temperature: Factor of the noise.
            spks: Speaker features `[B, C]`.
            cond: Prompt mel `[B, C, T]`, zero where frames are to be generated.
            streaming: Block-causal attention; None: this object's own.
            noised_mels: Chatterbox's noise of the frames after the prompt, `[B, C, S]`.
            meanflow: Chatterbox's; whether a model takes r is the model's own.
            noise: Noise at time 0, `[B, C, T]`; None: for every row the first T frames of the
                table, or drawn.

        Returns:
            Float32 `[B, C, T]`, zero beyond each row's frames; see `returns`.

        Raises:
            ValueError, TypeError: naming the argument, the expected and the given value.
        """
        x = self._noise(mu, noise) * temperature
        if noised_mels is not None:
            checks.shape("noised_mels", noised_mels, *x.shape[:2], "S")
            x = torch.cat([x[:, :, : x.shape[2] - noised_mels.shape[2]], noised_mels.float()], 2)
        if streaming is None:
            streaming = self.streaming
        w, lengths, x = self._w, lengths_of(mask), x.mT.contiguous()
        nfe = n_timesteps if self.nfe is None and isinstance(self.grid, str) else self.nfe
        grid = grids.make(self.grid, nfe)
        graphs = None if streaming else self._replays.of(self.model, grid, w)
        if graphs is None:
            guided, told = w is not None, self._told
            given = prepare(self.model, mask, mu, spks, cond, streaming, guided, told)
            mel = sampler.sample(self.model, x, given, grid, guidance=w)
        else:
            said = {"prompt": cond.mT, "mu": mu.mT, "spks": spks, "lengths": lengths}
            if self._told is not None:
                said["guidance"] = self._told
            mel = graphs.sample(x, grid=grid, conditions=said, guidance=w)
        inside = masks.inside(lengths, mel.shape[1])
        mel = mel.masked_fill(~inside[:, :, None], 0.0).mT
        return mel if self.returns == "tensor" else (mel, None)

    def _noise(self, mu: Tensor, noise: Tensor | None) -> Tensor:
        """Float32 `[B, C, T]`."""
        checks.shape("mu", mu, "B", self.model.config.channels, "T")
        rows, channels, frames = mu.shape
        if noise is None and self.rand_noise is None:
            noise = torch.randn_like(mu)
        elif noise is None:
            table = self.rand_noise = self.rand_noise.to(mu.device)
            if frames > table.shape[2]:
                raise ValueError(
                    f"mu: expected no more than the noise table's {table.shape[2]} frames, "
                    f"got {frames}: give noise"
                )
            noise = table[:, :, :frames].expand(rows, -1, -1)
        checks.shape("noise", noise, rows, channels, frames)
        return noise.float()

    def compute_loss(
        self,
        x1: Tensor,
        mask: Tensor,
        mu: Tensor,
        spks: Any = None,
        cond: Any = None,
        streaming: bool | None = None,
    ) -> tuple[Tensor, Any]:
        """The host's flow-matching loss and `y`, or the objective's loss and info.

        Args:
            x1: Mels `[B, C, T]`; mask, mu, spks, cond and streaming as in `forward`.
        """
        checks.shape("spks", spks, *x1.shape[:2])
        checks.shape("cond", cond, *x1.shape)
        if streaming is None:
            streaming = self.streaming
        if self.objective is not None:
            # nothing is dropped, and the conditions are data
            conditions = {"prompt": cond.detach().mT, "mu": mu.detach().mT, "spks": spks.detach()}
            batch = Batch(
                x1.mT.float().contiguous(), lengths_of(mask), conditions | {"streaming": streaming}
            )
            return self.objective(self.model, batch)
        # the host's draws, in its order
        t = torch.rand([len(mu), 1, 1], device=mu.device, dtype=mu.dtype)
        if self.training_times == "cosine":
            t = 1 - torch.cos(t * 0.5 * torch.pi)
        z = torch.randn_like(x1)
        remains = 1 - self.sigma_min
        y, u = (1 - remains * t) * z + t * x1, x1 - remains * z
        if self.training_cfg_rate > 0:
            kept = torch.rand(len(mu), device=x1.device) > self.training_cfg_rate
            mu, cond = mu * kept[:, None, None], cond * kept[:, None, None]
            spks = spks * kept[:, None]
        v = self.estimator(y, mask, mu, t.flatten(), spks, cond, streaming=streaming)
        error = F.mse_loss(v * mask, u * mask, reduction="sum")
        return error / (mask.sum() * u.shape[1]), y


def host_noise(channels: int) -> Tensor:
    """The host's table `[1, C, 15000]`: what its `torch.manual_seed(0)` leads to on the CPU."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn([1, channels, NOISE_FRAMES], generator=generator)
