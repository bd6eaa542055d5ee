"""A run as a YAML document: what its sections are, and how it is read.

The sections are classes, and a document is read by their annotations (`schema`): keys that nobody
knows, values of other types and files that are not there are errors with their path in the
document. `objective`, `data.dataset` and `data.collate` name a class, whose own arguments stand
beside the name. `docs/distilling.md` shows one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from imf_kernels import checks, grids, o3s
from imf_kernels.distill import schema
from imf_kernels.distill.schema import ConfigError
from imf_kernels.distill.settings import Settings
from imf_kernels.models import checkpoints

Document = dict[str, Any]

OBJECTIVES = {
    "int_mean_flow": "imf_kernels.objectives:IntMeanFlow",
    "split_mean_flow": "imf_kernels.objectives:SplitMeanFlow",
    "ds_flow": "imf_kernels.objectives:DSFlow",
    "mean_flow": "imf_kernels.objectives:MeanFlow",
}
DATASETS = {
    "audio_folder": "imf_kernels.data:AudioFolder",
    "f5_prepared": "imf_kernels.data:F5Prepared",
    "cosyvoice_parquet": "imf_kernels.data:CosyVoiceParquet",
}
COLLATES = {
    "infilling": "imf_kernels.data:Infilling",
    "continuation": "imf_kernels.data:Continuation",
}
SEARCHED = {"metric", "nfe", "higher_is_better", "resume", "save_to", "callback"}
"""Arguments of `o3s.search` that come from elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """See `lora.add_lora`."""

    rank: int = 16
    alpha: int | None = None
    targets: tuple[str, ...] = ("attention", "feed_forward")


@dataclass(frozen=True, kw_only=True)
class StepTokens:
    """See `models.StepTokenDiT`."""

    counts: tuple[int, ...] = (1, 2, 4)
    tokens: int = 1


@dataclass(frozen=True, kw_only=True)
class StudentSection:
    """What the student is, other than a copy of the teacher with a mixer.

    Attributes:
        checkpoint: Begin with these weights, of the teacher's family but any size.
        family: Of that checkpoint, if it is F5-TTS's other one.
        sizes: Begin with random weights of other sizes (`depth: 12`, fields of the model's config);
            F5's text tower stays the teacher's.
        diagonal: D of the mixer's initial `[D 0]`.
        guidance: Tell it w, which `objective.guidance` then draws; validation, previews and O3S
            tell it the teacher's.
        step_tokens: Tell a DiT its number of steps in place of times; `ds_flow` trains these, and
            everything else may ask for no others.
        lora: Train adapters only.
        checkpoint_activations: Compute the blocks' activations twice instead of keeping them.
    """

    checkpoint: str | None = None
    family: Literal["f5_v0", "f5_v1"] | None = None
    sizes: Mapping[str, Any] | None = None
    diagonal: float = 1.0
    guidance: bool = False
    step_tokens: StepTokens | None = None
    lora: Lora | None = None
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        if self.checkpoint is not None and self.sizes is not None:
            raise ValueError(
                "sizes: expected none beside a checkpoint, which has its own, got some"
            )
        if self.family is not None and self.checkpoint is None:
            raise ValueError("family: expected none without a checkpoint, got one")
        others = (self.checkpoint, self.sizes, self.lora, self.guidance or None)
        if self.step_tokens is not None and (self.diagonal != 1 or others.count(None) < 4):
            raise ValueError(
                "step_tokens: expected neither checkpoint, sizes, diagonal, guidance nor lora "
                "beside it, got some"
            )


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The teacher, and what its student is to be.

    Attributes:
        family: One of the clients', whose checkpoint it is.
        checkpoint: A file, or "hf://owner/repo/folder/file". CosyVoice's `flow.pt` holds the token
            encoder as well.
        build: In place of a family "package.module:function", which returns a velocity model with
            `prepare` and a `student()` to train; `arguments` are its own.
        guidance: w that is distilled.
        teacher_dtype: What the family's teacher is frozen and evaluated in; None: bfloat16 under
            `training.precision: bf16`, else float32. Your own model keeps the dtype it is built in.
        graphs: Its rollouts through CUDA graphs, as `graphs.GraphTeacher`: "default", or buckets
            `[rows, frames]` (with `data.packed` `[rows, total, frames]`). Without CUDA they run
            eagerly.
        student: See `StudentSection`.
    """

    guidance: float
    family: Literal["f5_v0", "f5_v1", "cosyvoice2", "cosyvoice3"] | None = None
    checkpoint: str | None = None
    build: Callable[..., Any] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    teacher_dtype: Literal["float32", "bfloat16"] | None = None
    graphs: Literal["default"] | tuple[tuple[int, ...], ...] | None = None
    student: StudentSection = field(default_factory=StudentSection)

    def __post_init__(self) -> None:
        checks.number("guidance", self.guidance)
        if (self.family is None) == (self.build is None):
            raise ValueError("family: expected one of family and build, got both or none")
        if self.family is not None and self.checkpoint is None:
            raise ValueError("checkpoint: expected a file of the family's, got nothing")
        if self.build is None and self.arguments:
            raise ValueError("arguments: expected none without build, got some")
        if self.build is not None and (self.checkpoint or self.student.sizes):
            raise ValueError("build: expected neither checkpoint nor sizes beside it, got some")
        if self.student.family is not None and self.family not in ("f5_v0", "f5_v1"):
            raise ValueError("student.family: expected none but beside F5-TTS's own, got one")
        if self.student.step_tokens is not None and self.family == "cosyvoice2":
            raise ValueError("student.step_tokens: expected none for cosyvoice2, no DiT, got some")
        if self.build is not None and self.teacher_dtype is not None:
            raise ValueError("teacher_dtype: expected none beside build, got one")


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The utterances of validation, previews and O3S, which training does not see.

    Attributes:
        names: Their names, or a file of names, a line each.
        share: In place of names: about this share of the utterances, chosen by a hash of each name,
            and so the same ones whatever is added or removed.
        items: At most so many of them are evaluated; the others are left out of training too. So
            `share` times the dataset is to be no more than about `items`.
    """

    names: tuple[str, ...] | str | None = None
    share: float | None = None
    items: int = 64

    def __post_init__(self) -> None:
        if (self.names is None) == (self.share is None):
            raise ValueError("names: expected one of names and share, got both or none")
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"share: expected a number in (0, 1), got {self.share}")
        checks.positive_int("items", self.items)


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """What is trained on.

    Attributes:
        dataset: `kind` (audio_folder, f5_prepared, cosyvoice_parquet, or "package.module:function"
            for your own `Utterances`) and its arguments.
        collate: `kind` (infilling, continuation, or your own) and its arguments; by default the
            family's.
        frames, max_rows, packed, drop_long: What a batch of one rank may hold, see `data.Budget`.
        workers: Processes that read ahead, of each rank.
        held_out: See `HeldOut`.
        exclude: Names of utterances that are neither trained on nor held out, such as damaged ones;
            or a file of names, a line each.
    """

    dataset: Mapping[str, Any]
    frames: int
    max_rows: int | None = None
    packed: bool = False
    drop_long: bool = False
    workers: int = 0
    collate: Mapping[str, Any] = field(default_factory=dict)
    held_out: HeldOut | None = None
    exclude: tuple[str, ...] | str = ()


@dataclass(frozen=True, kw_only=True)
class ValidationSection:
    """See `validation.Validation`; `steps` are those of the teacher's fine solve."""

    every: int = 1000
    nfe: tuple[int, ...] = (1, 2, 3, 4)
    grid: str = "uniform"
    steps: int = 32

    def __post_init__(self) -> None:
        checks.choice("grid", self.grid, tuple(grids.NAMED))


@dataclass(frozen=True, kw_only=True)
class PreviewsSection:
    """See `previews.Previews`; `vocoder` is "package.module:function", or "griffin_lim"."""

    every: int = 5000
    items: int = 3
    nfe: tuple[int, ...] = (1, 2, 3)
    vocoder: Literal["griffin_lim"] | Callable[..., Any] | None = None
    rate: int = 24_000


@dataclass(frozen=True, kw_only=True)
class O3SSection:
    """The search of the student's grids, on the held-out utterances, after training.

    Attributes:
        nfe: Numbers of steps to search for.
        metric: "to_teacher" (root mean square distance over all frames), or
            "package.module:function", called with the generated and the reference mels, lists of
            `(n, C)` of the frames that count, and the utterances' names if it has a parameter
            `names`.
        over: "utterances": a metric of your own is called with one of them at a time, on the rank
            that solved it, and averaged; "set": with all at once, on rank 0 (Frechet distances).
        reference: What those are: the recordings ("truth"), or the teacher's fine solves.
        higher_is_better: The metric's direction.
        search: Other arguments of `o3s.search`: budget, tolerance, ...
    """

    nfe: tuple[int, ...] = (2, 3)
    metric: Literal["to_teacher"] | Callable[..., float] = "to_teacher"
    over: Literal["utterances", "set"] = "utterances"
    reference: Literal["truth", "teacher"] = "teacher"
    higher_is_better: bool = False
    search: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for nfe in self.nfe:
            checks.positive_int("nfe", nfe)


@dataclass(frozen=True, kw_only=True)
class OutputSection:
    """The student that is written at the end.

    Attributes:
        path: Its `.pt` or `.safetensors`; the side file is written beside it.
        nfe: Steps of its grid: the searched one if `o3s.nfe` has it, else `grid`'s.
        grid: A named grid.
        like: A client's file of which the estimator's weights are replaced (CosyVoice's flow.pt).
    """

    path: Path
    nfe: int = 2
    grid: str = "uniform"
    like: str | None = None

    def __post_init__(self) -> None:
        checks.positive_int("nfe", self.nfe)
        checks.choice("grid", self.grid, tuple(grids.NAMED))
        checkpoints.format_of(self.path)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. `folder` takes checkpoints, logs, reports and previews."""

    folder: Path
    model: ModelSection
    objective: Mapping[str, Any]
    data: DataSection
    training: Settings
    output: OutputSection
    validation: ValidationSection | None = None
    previews: PreviewsSection | None = None
    o3s: O3SSection | None = None

    def __post_init__(self) -> None:
        for name in ("validation", "previews", "o3s"):
            if getattr(self, name) is not None and self.data.held_out is None:
                raise ValueError(f"data.held_out: expected utterances for {name}, got nothing")
        self.named_class("objective")
        self.named_class("dataset")
        self.named_class("collate")
        self._check_search()
        self._check_step_tokens()
        _expect_file("model.checkpoint", self.model.checkpoint)
        _expect_file("model.student.checkpoint", self.model.student.checkpoint)
        _expect_file("output.like", self.output.like)
        if self.data.held_out is not None and isinstance(self.data.held_out.names, str):
            _expect_file("data.held_out.names", self.data.held_out.names)
        if isinstance(self.data.exclude, str):
            _expect_file("data.exclude", self.data.exclude)
        in_place = self.output.like is None and self.model.student.step_tokens is None
        if in_place and self.model.family in ("cosyvoice2", "cosyvoice3"):
            object.__setattr__(self.output, "like", self.model.checkpoint)

    def _check_search(self) -> None:
        """Search what costs nothing, so that no value is refused after the training."""
        options = self.search_options()
        for nfe in () if self.o3s is None else self.o3s.nfe:
            with schema.naming("o3s.search", options):
                o3s.search(lambda grid: 0.0, nfe, higher_is_better=False, **options)

    def _check_step_tokens(self) -> None:
        """A student that is told its number of steps is asked for no other, and is a file alone."""
        tokens = self.model.student.step_tokens
        if tokens is None:
            return
        asked = {"objective.counts": self.named_class("objective")[1]["counts"]}
        asked["output.nfe"] = [self.output.nfe]
        for name in ("validation", "previews", "o3s"):
            section = getattr(self, name)
            asked[f"{name}.nfe"] = () if section is None else section.nfe
        for path, counts in asked.items():
            if not set(counts) <= set(tokens.counts):
                raise ValueError(
                    f"{path}: expected counts of model.student.step_tokens, "
                    f"{list(tokens.counts)}, got {list(counts)}"
                )
        if self.output.like is not None or self.output.path.suffix != ".safetensors":
            raise ValueError(
                "output.path: expected a file .safetensors, and no `like`, for a student with step "
                f"tokens, got {self.output.path}, {self.output.like}"
            )

    def search_options(self) -> Document:
        """What `o3s.search` gives of `o3s.search`, the function's own defaults left out."""
        given = {} if self.o3s is None else self.o3s.search
        return schema.arguments(o3s.search, given, "o3s.search", hidden=SEARCHED)

    def named_class(self, which: str) -> tuple[Any, Document, str]:
        """What "objective", "dataset" or "collate" names, its arguments, and their path.

        Raises:
            ConfigError: no such class, or arguments that it does not have.
        """
        hidden = set[str]()
        if which == "objective":
            given, key, known, path = self.objective, "name", OBJECTIVES, "objective"
            hidden = {"teacher", "generator"}
        elif which == "dataset":
            given, key, known, path = self.data.dataset, "kind", DATASETS, "data.dataset"
        else:
            cosyvoice = self.model.family in ("cosyvoice2", "cosyvoice3")
            given = {"kind": "continuation" if cosyvoice else "infilling", **self.data.collate}
            key, known, path = "kind", COLLATES, "data.collate"
        name, rest = given.get(key), {k: v for k, v in given.items() if k != key}
        where = f"{path}.{key}"
        if not isinstance(name, str) or not (":" in name or name in known):
            wanted = ", ".join(known)
            raise ConfigError(
                f"{where}: expected one of {wanted} or 'package.module:function', got {name!r}"
            )
        target = schema.imported(known.get(name, name), where)
        tokens = self.model.student.step_tokens
        if which == "objective" and tokens is not None:
            if name in OBJECTIVES and name != "ds_flow":
                raise ConfigError(
                    f"{where}: expected ds_flow for a student with step tokens, got {name}"
                )
            rest = {"steps": "steps", "counts": tokens.counts, **rest}
        schema.arguments(target, rest, path, hidden=hidden)
        return target, rest, path


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a document (needs `pyyaml`).

    Args:
        path: A YAML file.
        overrides: "training.lr=1e-4": values, in YAML, in the place of the file's.

    Raises:
        ConfigError: naming what is wrong by its path in the document, or the file.
    """
    return parse(read(path, overrides))


def parse(document: Any) -> Config:
    """What a document says. Errors as `load`."""
    if not isinstance(document, Mapping):
        raise ConfigError(f"expected a document of sections, got {document!r}")
    return schema.make(Config, document, "")


def read(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """The document as it is written, with the overrides."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError("config: pip install '.[train]' (pyyaml)") from error
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"expected a YAML file, got {path}: {error.strerror}") from error
    try:
        document = yaml.safe_load(text)
        for override in overrides:
            name, equals, given = override.partition("=")
            if not (name and equals):
                raise ConfigError(f"--set: expected name=value, got {override!r}")
            _put(document, name, yaml.safe_load(given))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: expected YAML: {' '.join(str(error).split())}") from error
    return document


def _put(document: Any, name: str, given: Any) -> None:
    *parents, last = name.split(".")
    for i, parent in enumerate(parents):
        inside = document.get(parent)
        if inside is None:
            inside = document[parent] = {}
        if not isinstance(inside, dict):
            path = ".".join(parents[: i + 1])
            raise ConfigError(f"--set {name}: expected {path} to be a mapping, got {inside!r}")
        document = inside
    document[last] = given


def _expect_file(path: str, name: str | None) -> None:
    """Of the hub, nothing is asked yet."""
    if name is not None and not name.startswith(checkpoints.HUB) and not Path(name).is_file():
        raise ConfigError(f"{path}: expected a file, got none: {name}")
