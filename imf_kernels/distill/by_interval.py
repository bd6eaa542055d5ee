"""The error of an update's rows by the length of their intervals."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

PARTS = 4


def sums(info: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For each part of [0, 1]: the `row_error` of rows whose `interval` lies there, and how many.

    Empty where the objective does not tell both. To be added up by name over batches and ranks,
    then given to `means`.
    """
    error, interval = info.get("row_error"), info.get("interval")
    if error is None or interval is None or error.shape != interval.shape:
        return {}
    part = (interval * PARTS).long().clamp(0, PARTS - 1)
    inside = part[:, None] == torch.arange(PARTS, device=part.device)
    errors = torch.where(inside, error.float()[:, None], 0.0).sum(0)
    return {
        f"{kind} {k}": each[k]
        for kind, each in (("error", errors), ("rows", inside.sum(0)))
        for k in range(PARTS)
    }


def means(added: dict[str, float]) -> dict[str, float]:
    """Take what `sums` named out of `added`: the mean errors by name, of parts that had rows."""
    found = {}
    for k in range(PARTS):
        error, rows = added.pop(f"error {k}", 0.0), added.pop(f"rows {k}", 0.0)
        if rows:
            found[f"error/{k / PARTS:.2f}-{(k + 1) / PARTS:.2f}"] = error / rows
    return found
