"""Evaluations remembered on disk, by the weights, the grid, and what else a value depends on."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from imf_kernels.files import replacing
from imf_kernels.graphs import GraphSampler
from imf_kernels.models import StepTokenDiT, state_dicts
from imf_kernels.o3s.metric import Metric, ranks_of


class DiskCache:
    """A folder with a small JSON file for every evaluation.

    An evaluation is paid once, whoever asks: a search that was killed at any moment and is started
    again repeats its decisions from here, and so does another on the same grids. Each file is
    written atomically as soon as its value is known, so processes may share the folder. Files that
    are damaged are ignored with a warning, and written anew. Delete any of them as you like.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def wrap(
        self,
        metric: Metric,
        *,
        model: nn.Module | GraphSampler | str,
        name: str,
        **settings: Any,
    ) -> Metric:
        """The metric, which is asked only for what the folder does not hold.

        Ranks that evaluate a metric together (`sharded`) wrap it together. Rank 0 reads and writes
        and tells the others; their folders are not used. The folder is made, if need be.

        Args:
            model: Whose weights the values are of. They are hashed here, so wrap anew after
                changing them; or any name of the weights.
            name: Of the metric and its development set, such as "sim_o@dev-v1".
            settings: All else that a value depends on, such as `guidance` and the noise's `seed`:
                what JSON holds.

        Raises:
            TypeError: a model without weights, or settings that JSON does not hold.
            ValueError: a baked model, which no other grid can be asked of; or ranks that do not
                agree about the weights, the name or the settings; by the metric, about the grid.
            OSError: the folder cannot be made; by the metric, an evaluation cannot be written.
            RuntimeError: by the metric: PyTorch has counted a change of the weights (fused
                optimizers and writes to `p.data` are not counted).
        """
        return _Cached(self, metric, model, name, settings)

    def read(self, key: dict[str, Any]) -> float | None:
        """The value under a key, if it is there and sound."""
        path = self.path(key)
        try:
            held = json.loads(path.read_text())
            value = held.pop("value")
            if _text(held) != _text(key) or not isinstance(value, float):
                raise ValueError(f"expected a number for {_text(key)}")
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            warnings.warn(f"ignored a damaged evaluation, {path}: {error}", stacklevel=2)
            return None
        return value

    def write(self, key: dict[str, Any], value: float) -> None:
        with replacing(self.path(key)) as temporary:
            temporary.write_text(json.dumps({"value": value, **key}, indent=1))

    def path(self, key: dict[str, Any]) -> Path:
        return self.folder / f"{hashlib.sha256(_text(key).encode()).hexdigest()[:32]}.json"


class _Cached:
    """See `DiskCache.wrap`."""

    def __init__(
        self,
        cache: DiskCache,
        metric: Metric,
        model: nn.Module | GraphSampler | str,
        name: str,
        settings: dict[str, Any],
    ) -> None:
        self.cache, self.metric, self.ranks = cache, metric, ranks_of(metric)
        self.model = model.model if isinstance(model, GraphSampler) else model
        self.version = _version(self.model)
        self.ranks.first(lambda: cache.folder.mkdir(parents=True, exist_ok=True))
        self.key = json.loads(
            self.ranks.same(
                "model, name, settings", lambda: _text(_key(self.model, name, settings))
            )
        )

    def __call__(self, grid: Tensor) -> float:
        key = {**self.key, "grid": self.ranks.same("grid", lambda: self.asked(grid))}
        value = self.ranks.first(lambda: self.cache.read(key))
        if value is None:
            value = float(self.metric(grid))
            self.ranks.first(lambda: self.cache.write(key, value))
        return value

    def asked(self, grid: Tensor) -> list[float]:
        if _version(self.model) != self.version:
            raise RuntimeError(
                "model: expected the weights that were wrapped, got an in-place change. Wrap anew."
            )
        return grid.tolist()


def _key(model: Any, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """All of a key but the grid."""
    try:
        _text(settings)
    except (TypeError, ValueError) as error:
        raise TypeError(f"settings: expected what JSON holds, got {settings}: {error}") from error
    return {"name": name, "settings": settings, "weights": _identity(model)}


def _identity(model: Any) -> str:
    """A name as it is; of a model, a hash of its weights and of what it makes of them."""
    if isinstance(model, str):
        return model
    weights = model.state_dict() if isinstance(model, nn.Module) else None
    if weights is None or not all(type(value) is Tensor for value in weights.values()):
        raise TypeError(
            f"model: expected a module with dense weights, whole on every rank, or a name of them, "
            f"got {type(model).__name__}"
        )
    config = getattr(model, "config", None)
    said = f"{type(model).__qualname__} {config if is_dataclass(config) else ''}"
    if isinstance(model, StepTokenDiT):  # which has no times, not one grid's
        said += f" {model.counts}"
    elif getattr(config, "baked", False):
        raise ValueError("model: expected a student with its time conditioning, got a baked one")
    return state_dicts.fingerprint(said, weights)


def _version(model: Any) -> int:
    """Rises with every change of the weights that PyTorch counts."""
    weights = model.parameters() if isinstance(model, nn.Module) else ()
    return sum(weight._version for weight in weights if not weight.is_inference())


def _text(key: Any) -> str:
    """Canonical JSON."""
    return json.dumps(key, sort_keys=True, allow_nan=False)
