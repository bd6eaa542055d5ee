"""Objectives: a student and a batch in, a loss and values to log out."""

from imf_kernels.objectives.batch import Batch
from imf_kernels.objectives.ds_flow import DSFlow
from imf_kernels.objectives.int_mean_flow import IntMeanFlow
from imf_kernels.objectives.intervals import Intervals, LogitNormal
from imf_kernels.objectives.mean_flow import MeanFlow
from imf_kernels.objectives.rollouts import RolloutCache, Target, TeacherRollout
from imf_kernels.objectives.split_mean_flow import SplitMeanFlow

__all__ = [
    "Batch",
    "DSFlow",
    "IntMeanFlow",
    "Intervals",
    "LogitNormal",
    "MeanFlow",
    "RolloutCache",
    "SplitMeanFlow",
    "Target",
    "TeacherRollout",
]
