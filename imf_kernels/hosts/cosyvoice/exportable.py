"""A student's estimator with the names of the file that CosyVoice's TensorRT engine is made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imf_kernels.export import Exportable
from imf_kernels.hosts.cosyvoice.baked import BakedEstimator, tolerance


class ExportableEstimator(Exportable):
    """What `export.onnx` writes as `flow.decoder.estimator.fp32.onnx`, for hosts of one grid.

    Names and shapes are those of the host's own file: two rows, a free number of frames. As of the
    `BakedEstimator`, times that are none of the grid's answer NaN.

    Args:
        estimator: The student at its grid.
        host_dtype: Of the host's times, which reach the file as float32. The default also takes
            those of a float32 host.

    Raises:
        ValueError: a grid whose times a host of that dtype cannot tell apart.
    """

    output = "estimator_out"

    def __init__(self, estimator: BakedEstimator, host_dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.estimator = estimator
        self.dtype, self.within = estimator.dtype, tolerance(estimator.grid, host_dtype)
        channels = estimator.model.channels
        mel = (2, channels, "frames")
        mask, spks = (2, 1, "frames"), (2, channels)
        self.dims = {"x": mel, "mask": mask, "mu": mel, "t": (2,), "spks": spks, "cond": mel}

    def forward(self, *inputs: Tensor) -> Tensor:
        """`x, mask, mu, t, spks, cond` to the velocity, float32 `(2, C, N)`."""
        return self.estimator(*inputs, within=self.within)

    def example(self, lengths: Sequence[int]) -> dict[str, Tensor]:
        frames, times = max(lengths), self.estimator.times
        generator = torch.Generator().manual_seed(frames)
        made = {}
        for name, dims in self.dims.items():
            shape = [frames if isinstance(dim, str) else dim for dim in dims]
            made[name] = torch.randn(shape, generator=generator).to(times.device)
        made["mask"] = torch.ones_like(made["mask"])
        made["mask"][..., min(lengths) :] = 0
        made["t"] = times[frames % len(times)].expand(2).contiguous()
        return made
