"""What is seen to and told before a run trains, so that nothing is found out after it."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from imf_kernels.data import AudioFolder, F5Prepared, Loader, Mel, Utterances
from imf_kernels.distill import saves, schema
from imf_kernels.distill.config import Config
from imf_kernels.distill.schema import ConfigError
from imf_kernels.distill.trainer import CHECKPOINTS

BYTES = 256


class GoesOn:
    """A callback: says where a run goes on."""

    def started(self, trainer: Any) -> None:
        if trainer.update and trainer.accelerator.is_main_process:
            print(f"goes on after update {trainer.update}", flush=True)


def check_places(config: Config) -> None:
    """Whether the run's folder and its student can be written. Nothing is left there.

    Raises:
        ConfigError: naming the one that cannot.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    _expect_writable("folder", config.folder)
    path = config.output.path
    if path.is_dir():
        raise ConfigError(f"output.path: expected a file, got a folder: {path}")
    _expect_writable("output.path", path.parent)


def _expect_writable(path: str, folder: Path) -> None:
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(
            f"{path}: expected a folder that can be written, got {folder}: {error.strerror}"
        ) from error


def check_texts(utterances: Utterances, model: Any) -> None:
    """Whether the texts' ids are the model's: F5-TTS has a row for each token, and one more.

    Raises:
        ConfigError: no tokenizer, or one of another number of tokens.
    """
    tower = getattr(getattr(model, "config", None), "text", None)
    if tower is None or not isinstance(utterances, AudioFolder | F5Prepared):
        return
    tokenizer = utterances.tokenizer
    if tokenizer is None:
        raise ConfigError(
            "data.dataset.tokenizer: expected char, pinyin or byte for the texts of F5-TTS, "
            "got nothing"
        )
    name, known = ("tokenizer", BYTES)
    if tokenizer.vocab is not None:
        name, known = "vocab", len(tokenizer.vocab)
    if known != tower.vocab:
        raise ConfigError(
            f"data.dataset.{name}: expected the checkpoint's {tower.vocab} tokens, got {known}"
        )


def about(utterances: Any, train: Loader, held: Loader | None) -> str:
    """The data in two lines: how much there is, and what is left out."""
    budget, mel = train.budget, getattr(utterances, "mel", None)
    frames = budget.total
    length = f"{frames} frames"
    if isinstance(mel, Mel):
        length += f", {frames * mel.hop / mel.rate / 3600:.3g} hours"
    short = getattr(utterances, "left_out", 0)
    aside = 0 if held is None else held.budget.left_out
    out = f"left out: {short} for their length, {budget.left_out + aside} for data.frames"
    said = f"data: {budget.count} utterances ({length}), "
    said += f"{0 if held is None else held.budget.count} utterances held out; {out}\n"
    return said + f"{len(train)} batches an epoch for each of {budget.ranks} ranks"


def goes_on(config: Config) -> str | None:
    """Where the run in the config's folder goes on, if there is one.

    Raises:
        ConfigError: it cannot, with these settings or these files.
    """
    with schema.naming(""):
        path = saves.newest(config.folder / CHECKPOINTS)
    if path is None:
        return None
    with schema.naming("training", vars(config.training)):
        config.training.check_resume(json.loads((path / "state.json").read_text())["settings"])
    return f"goes on after update {saves.update_of(path)} ({path.name})"
