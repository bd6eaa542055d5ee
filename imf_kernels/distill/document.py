"""What a config says, defaults included: told, kept in the run's folder, held to on resuming."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imf_kernels.distill import saves, schema
from imf_kernels.distill.config import Config
from imf_kernels.distill.schema import ConfigError
from imf_kernels.distill.trainer import CHECKPOINTS
from imf_kernels.files import replacing

NAME = "config.yaml"
HELD = ("model", "objective", "data")
"""Sections that a run keeps; `Settings` sees to its own."""
FREE = (
    "model.student.checkpoint_activations",
    "data.workers",
    "data.held_out.items",
    "data.exclude",
)
"""What may be another there: it does not change where the run goes. But `exclude` does, without
which a run would meet a damaged utterance forever."""


class Kept:
    """A callback: keeps the config in `folder/config.yaml`."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def started(self, trainer: Any) -> None:
        if trainer.accelerator.is_main_process:
            with replacing(self.config.folder / NAME) as temporary:
                temporary.write_text(described(self.config))


def check_resume(config: Config) -> None:
    """Whether the run in the config's folder, if there is one, goes on as it was begun.

    Raises:
        ConfigError: naming the first value that would change its course.
    """
    path = config.folder / NAME
    if not path.exists() or not saves.names(config.folder / CHECKPOINTS):
        return
    import yaml

    begun, own = yaml.safe_load(path.read_text()), yaml.safe_load(described(config))
    for section in HELD:
        _compare(section, begun[section], own[section])


def _compare(path: str, begun: Any, own: Any) -> None:
    if path in FREE or begun == own:
        return
    if isinstance(begun, Mapping) and isinstance(own, Mapping):
        for key in {**begun, **own}:
            _compare(schema.inner(path, key), begun.get(key), own.get(key))
        return
    raise ConfigError(
        f"{path}: expected {_said(begun)}, with which this run was begun, got {_said(own)}; "
        "another run wants another folder"
    )


def _said(value: Any) -> str:
    return "nothing" if value is None else repr(value)


def described(config: Config) -> str:
    """All that a config says, defaults included, as YAML."""
    import yaml

    return yaml.safe_dump(_plain(config), sort_keys=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if callable(value):
        return schema.name_of(value)
    return value
