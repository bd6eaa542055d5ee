"""What F5-TTS is given, as tensors: text as ids, noise by seeds, times."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from imf_kernels import checks, grids, masks
from imf_kernels.data import texts

BYTES = 256


def integer(name: str, value: int) -> int:
    """A Python integer, of a NumPy one or a 0-d tensor too."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None


def text_ids(
    text: Tensor | Sequence[str] | Sequence[Sequence[str]],
    vocab: Mapping[str, int] | None,
    known: int,
    rows: int,
    device: torch.device,
) -> Tensor:
    """Ids `(rows, L)`: of a vocabulary's entries (0 for unknown ones), or without one UTF-8 bytes,
    for a model that has as many ids as there are bytes.

    Raises:
        ValueError: ids of another shape, texts for another number of rows, or without a vocabulary
            for a model that wants one.
    """
    if isinstance(text, Tensor):
        checks.shape("text", text, rows, "L")
        return text.to(device)
    if isinstance(text, str) or not isinstance(text, Sequence) or len(text) != rows:
        raise ValueError(f"text: expected a list of {rows} texts, got {text!r}")
    if not all(isinstance(line, Sequence) for line in text):
        raise ValueError(f"text: expected texts, as strings or lists of tokens, got {text!r}")
    if vocab is None and known != BYTES:
        raise ValueError(
            "text: expected ids, or texts with a vocab_char_map (without one they are bytes, of "
            f"which there are {BYTES}, and this model has {known} ids), got {text!r}"
        )
    return texts.padded([texts.ids(line, vocab) for line in text]).to(device)


def noise(
    durations: Sequence[int],
    channels: int,
    seed: int | Sequence[int] | None,
    device: torch.device,
) -> Tensor:
    """Float32 `(B, N, channels)`, N the longest duration, 0 beyond each row's.

    A seed gives the numbers that `torch.manual_seed` and `torch.randn` of the row's own size would,
    on this kind of device, and leaves torch's random state alone; without one that state is used.

    Raises:
        ValueError: another number of seeds than rows.
        TypeError: a seed that is no integer.
    """
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(durations)
    if len(seeds) != len(durations):
        raise ValueError(f"seed: expected one, or one for each of {len(durations)} rows: {seed!r}")
    drawn = []
    for duration, own in zip(durations, seeds, strict=True):
        generator = None
        if own is not None:
            generator = torch.Generator(device).manual_seed(integer("seed", own))
        drawn.append(torch.randn(duration, channels, generator=generator, device=device))
    return pad_sequence(drawn, batch_first=True)


def times(steps: int, sway: float | None, epss: bool) -> Tensor:
    """The client's grid of `steps` evaluations, float32 `(steps + 1,)`."""
    checks.positive_int("steps", steps)
    return (grids.epss if epss else grids.sway)(steps, 0.0 if sway is None else sway)


def late_times(start: float, steps: int, sway: float | None, epss: bool) -> Tensor:
    """The same from a later start, for which there are fewer steps; sway moves the start as well.

    Raises:
        ValueError: a start outside `[0, 1)`, or no step left.
    """
    checks.number("t_inter", start, 0, 1)
    if start == 0:
        return times(steps, sway, epss)
    checks.positive_int("steps", steps)
    left = int(steps * (1 - start))
    if not (0 <= start < 1 and left):
        raise ValueError(f"t_inter: expected a time that leaves some of {steps} steps, got {start}")
    t = torch.linspace(start, 1, left + 1)
    return t if sway is None else t + sway * (torch.cos(torch.pi / 2 * t) - 1 + t)


def repeated(heard: Tensor, lens: Tensor, lengths: Tensor, frames: int) -> Tensor:
    """Each row's prompt moved to its own end: `(B, frames, C)`, 0 elsewhere.

    Args:
        heard: Prompts `(B, N, C)` of `lens` frames.
        lengths: Frames of each row, at which what is moved ends.
    """
    source = torch.arange(frames, device=lens.device) - lens[:, None]
    moved = (source >= 0) & (source < lens[:, None]) & masks.inside(lengths, frames)
    nothing = heard.shape[1]
    source = source.where(moved, nothing)[:, :, None].expand(-1, -1, heard.shape[2])
    return F.pad(heard, (0, 0, 0, 1)).gather(1, source)
