"""Objectives: a student and a batch in, a loss and values to log out."""

from imf_kernels.objectives.batch import Batch
from imf_kernels.objectives.int_mean_flow import IntMeanFlow
from imf_kernels.objectives.intervals import Intervals
from imf_kernels.objectives.rollouts import RolloutCache, Target, TeacherRollout

__all__ = ["Batch", "IntMeanFlow", "Intervals", "RolloutCache", "Target", "TeacherRollout"]
