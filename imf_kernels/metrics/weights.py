"""Where a metric's weights are: on disk, or on the hub."""

from __future__ import annotations

import os

from imf_kernels.models.checkpoints import HUB


def pretrained(metric: str, weights: str | os.PathLike[str]) -> str:
    """A folder, or "hf://owner/repo", as `from_pretrained` of `transformers` takes it.

    Raises:
        FileNotFoundError: neither; the error names the metric.
    """
    name = os.fspath(weights)
    return name.removeprefix(HUB) if name.startswith(HUB) else existing(metric, name)


def existing(metric: str, weights: str | os.PathLike[str]) -> str:
    """A file or folder that is there.

    Raises:
        FileNotFoundError: it is not; the error names the metric.
    """
    name = os.fspath(weights)
    if not os.path.exists(name):
        raise FileNotFoundError(f"metric {metric!r}: expected weights at {name}, got none")
    return name
