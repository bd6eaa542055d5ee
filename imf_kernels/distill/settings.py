"""A run's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from imf_kernels import checks
from imf_kernels.distill.optimization import DECAYS

FREE = ("save_every", "keep", "log_every", "max_bad", "parallel", "timeout")
"""What may be another when a run is resumed: it does not change where the run goes."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that `Trainer` is told.

    Attributes:
        updates: Optimizer steps of the whole run, those that are skipped included.
        lr: Peak learning rate, reached after `warmup` updates.
        decay: From there on: "cosine", "linear" or "constant", to the share `min_lr` of the peak.
        betas, weight_decay: AdamW's.
        clip: Gradient norm limit.
        accumulate: Batches of each rank per update; the update's loss is their mean.
        ema_decay: Keep the exponential moving average of the weights, with this decay; None: don't.
        precision: "no": float32; "bf16": the student under autocast. Its weights are float32 in
            both; a teacher has a dtype of its own.
        parallel: With several ranks "ddp", or "fsdp2": weights, gradients and optimizer in parts.
        seed: Of all random draws.
        save_every: Updates between checkpoints; one more is written at the end.
        keep: Checkpoints that stay, the newest; 0: all.
        log_every: Updates between a callback's lines.
        max_bad: So many bad updates in a row stop the run.
        explode: A loss or gradient norm more than this many times its median is bad.
        timeout: Minutes after which a rank that waits for another gives up.
    """

    updates: int
    lr: float = 1e-4
    warmup: int = 0
    decay: str = "cosine"
    min_lr: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    accumulate: int = 1
    ema_decay: float | None = None
    precision: Literal["no", "bf16"] = "no"
    parallel: str = "ddp"
    seed: int = 0
    save_every: int = 1000
    keep: int = 3
    log_every: int = 50
    max_bad: int = 10
    explode: float = 100.0
    timeout: float = 30.0

    def __post_init__(self) -> None:
        for name in ("updates", "accumulate", "save_every", "log_every", "max_bad"):
            checks.positive_int(name, getattr(self, name))
        for name in ("warmup", "keep", "seed"):
            _natural(name, getattr(self, name))
        if self.warmup > self.updates:
            raise ValueError(
                f"warmup: expected an integer in [0, {self.updates}], got {self.warmup}"
            )
        for name in ("lr", "clip", "timeout"):
            checks.number(name, getattr(self, name))
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        checks.number("min_lr", self.min_lr, 0, 1)
        checks.number("weight_decay", self.weight_decay, 0)
        if not self.explode > 1:
            raise ValueError(f"explode: expected a number > 1, got {self.explode}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {self.betas}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected a number in [0, 1), got {self.ema_decay}")
        checks.choice("decay", self.decay, DECAYS)
        checks.choice("precision", self.precision, ("no", "bf16"))
        checks.choice("parallel", self.parallel, ("ddp", "fsdp2"))
        object.__setattr__(self, "betas", tuple(self.betas))  # a file's list

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {"betas": list(self.betas)}

    def check_resume(self, saved: Mapping[str, Any]) -> None:
        """Whether a run that was begun with `saved` goes on with these settings as it would have.

        Raises:
            ValueError: naming the first setting that would change its course.
        """
        own, begun = self.to_dict(), {**Settings(updates=1).to_dict(), **saved}
        for name, value in own.items():
            if name in FREE or value == begun[name]:
                continue
            if name == "updates" and self.decay == "constant" and value > begun[name]:
                continue
            hint = " (it may grow where decay is 'constant')" if name == "updates" else ""
            raise ValueError(
                f"{name}: expected {begun[name]!r}, with which this run was begun{hint}, "
                f"got {value!r}; another run wants another folder"
            )


def _natural(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}: expected an integer >= 0, got {value!r}")
