"""Distillation: a plain loop, and the trainer for long runs on many devices.

`distill` is a template around an objective. `Trainer` adds ranks, accumulation, bfloat16, callbacks
and checkpoints that survive anything; it stands on Hugging Face accelerate (extra `train`).
"""

from imf_kernels.distill.optimization import schedule
from imf_kernels.distill.plain import distill
from imf_kernels.distill.settings import Settings
from imf_kernels.distill.stops import RankFailed, Stopped
from imf_kernels.distill.trainer import Trainer

__all__ = ["RankFailed", "Settings", "Stopped", "Trainer", "distill", "schedule"]
