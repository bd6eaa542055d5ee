"""Flows whose velocity, mean velocity and Euler sums are known in closed form.

A `Flow` is a `VelocityModel` as a teacher holds it; `flow.student()` is the student that has
learnt its mean velocity exactly. Channels and frames do not see each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


def per_row(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype)[:, None, None]


def expm1_ratio(z: Tensor) -> Tensor:
    """`(exp(z) - 1) / z`, 1 at z = 0."""
    safe = torch.where(z == 0, 1.0, z)
    return torch.where(z == 0, 1.0, torch.expm1(safe) / safe)


class Flow:
    """The instantaneous velocity; `asked` collects the `(t, r)` of every evaluation."""

    asked: list[tuple[Tensor, Tensor]]

    def prepare(self, lengths: Tensor, guided: bool = False) -> dict[str, Tensor]:
        return {"lengths": lengths.repeat(2) if guided else lengths}

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, cond: object) -> Tensor:
        self.asked.append((t, r))
        return self.velocity(x, t)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        return self.mean_velocity(x, t, t)

    def mean_velocity(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        raise NotImplementedError

    def carry(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """The flow map: the state at r of what is x at t."""
        return x + per_row(r - t, x) * self.mean_velocity(x, t, r)

    def student(self) -> MeanVelocity:
        return MeanVelocity(self)


@dataclass
class MeanVelocity:
    """A student equal to a flow's mean velocity; it knows no guidance."""

    flow: Flow

    def prepare(self, lengths: Tensor) -> dict[str, Tensor]:
        return {"lengths": lengths}

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, cond: object) -> Tensor:
        return self.flow.mean_velocity(x, t, r)


@dataclass
class Linear(Flow):
    """`dx/dt = a x + b`; a = 0 is a constant velocity, exact at any number of steps."""

    a: float
    b: float
    asked: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def mean_velocity(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return (self.a * x + self.b) * expm1_ratio(self.a * per_row(r - t, x))

    def euler_mean_velocity(self, steps: int) -> tuple[float, float]:
        """Slope and offset of the mean velocity that n uniform Euler steps over [0, 1] give."""
        slope = (1 + self.a / steps) ** steps - 1
        return slope, slope * self.b / self.a

    def mixed(self, other: Linear, w: float) -> Linear:
        return Linear(other.a + w * (self.a - other.a), other.b + w * (self.b - other.b))


@dataclass
class Gaussian(Flow):
    """The marginal flow from N(0, 1) at 0 to N(mean, std^2) at 1 under straight interpolation.

    `x_t` is N(t mean, sigma_t^2), `sigma_t^2 = (1 - t)^2 + t^2 std^2`, and the flow keeps
    `(x_t - t mean) / sigma_t`.
    """

    mean: float
    std: float
    asked: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def sigma(self, t: Tensor) -> Tensor:
        return ((1 - t).square() + t.square() * self.std**2).sqrt()

    def mean_velocity(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        t, r = per_row(t, x), per_row(r, x)
        # (sigma_r - sigma_t) / (r - t), without the difference that vanishes at r = t
        slope = ((1 + self.std**2) * (t + r) - 2) / (self.sigma(t) + self.sigma(r))
        return self.mean + slope * (x - t * self.mean) / self.sigma(t)

    def mixed(self, other: Gaussian, w: float) -> Gaussian:
        assert self.std == other.std
        return Gaussian(other.mean + w * (self.mean - other.mean), self.std)


@dataclass
class Guided(Flow):
    """Two flows as the branches of classifier-free guidance, told apart by the conditioning."""

    conditional: Flow
    unconditional: Flow
    asked: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.asked.append((t, r))
        branches = [self.conditional.velocity(x, t)]
        if cond["lengths"].shape[0] == 2 * x.shape[0]:
            branches.append(self.unconditional.velocity(x, t))
        return torch.cat(branches)

    def at(self, w: float) -> Flow:
        """The guided flow, itself of a closed form."""
        return self.conditional.mixed(self.unconditional, w)


FLOWS = {
    "linear": Linear(-1.2, 0.7),
    "gaussian": Gaussian(1.5, 0.4),
    "constant": Linear(0.0, -0.8),
}
GUIDED = {
    "linear": Guided(Linear(-1.2, 0.7), Linear(-0.4, 0.1)),
    "gaussian": Guided(Gaussian(1.5, 0.4), Gaussian(0.5, 0.4)),
}


def times(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def relative_error(got: Tensor, want: Tensor) -> float:
    want = want.double()
    return float((got.double() - want).norm() / want.norm())
