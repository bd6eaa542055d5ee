"""How sure the ratio of two medians is."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
FEWEST = 6
"""Rounds; the span of fewer holds their median with less than 95 % (of n: 1 - 2^(1 - n))."""


class Ratio(NamedTuple):
    """A ratio of medians, and its 95 % interval: 0 to infinity where rounds are too few."""

    value: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        return math.isfinite(self.high)


def ratio(above: np.ndarray, below: np.ndarray, *, paired: bool) -> Ratio:
    """The median of `above` over that of `below`, seconds `(rounds,)` each.

    The interval is that of a percentile bootstrap over the rounds, always the same for the same
    rounds. It covers how much rounds of one run scatter. It does not cover what differs from run to
    run, and meets all rounds of one alike: clocks, temperature, neighbours on the machine, memory
    layout. Two runs of the same code may well differ by more than their interval says.

    Args:
        paired: Whether the k-th rounds of both were measured side by side, as the contenders of
            one row are. Where they are as many, they are then drawn together, so that a slow
            moment, which met both, does not count as a difference.
    """
    value = float(np.median(above) / np.median(below))
    if min(len(above), len(below)) < FEWEST:
        return Ratio(value, 0.0, math.inf)
    draw = np.random.default_rng(0)
    first = second = draw.integers(len(above), size=(RESAMPLES, len(above)))
    if not paired or len(above) != len(below):
        second = draw.integers(len(below), size=(RESAMPLES, len(below)))
    found = np.median(above[first], axis=1) / np.median(below[second], axis=1)
    low, high = np.quantile(found, (0.025, 0.975))
    return Ratio(value, float(low), float(high))
