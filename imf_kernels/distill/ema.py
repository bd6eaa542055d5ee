"""The exponential moving average of a student's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from imf_kernels.distill.parallel import local


class Ema:
    """Averages of parameters, float32, from what they are at the first update on.

    Of a sharded parameter each rank averages its own part.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters, self.averages = list(parameters), list[Tensor]()
        self._average = get_ema_multi_avg_fn(decay)

    def begin(self) -> None:
        """Let the averages be the parameters as they are now."""
        self.averages = [value.to(torch.float32, copy=True) for value in self._values()]

    @torch.no_grad()
    def update(self) -> None:
        if self.averages:
            self._average(self.averages, [value.float() for value in self._values()], 0)
        else:
            self.begin()

    @torch.no_grad()
    def assign(self) -> None:
        """Let the parameters be their averages, if there are any yet."""
        if self.averages:
            for value, average in zip(self._values(), self.averages, strict=True):
                value.copy_(average)

    @contextlib.contextmanager
    def assigned(self) -> Iterator[None]:
        """Within, the parameters are their averages, if there are any yet."""
        before = [value.clone() for value in self._values()]
        self.assign()
        try:
            yield
        finally:
            for value, own in zip(self._values(), before, strict=True):
                value.copy_(own)

    def _values(self) -> list[Tensor]:
        return [local(parameter) for parameter in self.parameters]
