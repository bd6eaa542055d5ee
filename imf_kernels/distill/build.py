"""A run's objects, from its config: teacher, student, objective, batches, callbacks."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imf_kernels import graphs, models
from imf_kernels.data import Loader, Utterance, Utterances
from imf_kernels.distill import schema, start
from imf_kernels.distill.config import Config, DataSection, HeldOut, ModelSection, StudentSection
from imf_kernels.distill.document import Kept
from imf_kernels.distill.held_out import Extra, FineSolves
from imf_kernels.distill.logs import JsonLines, Progress, TensorBoard
from imf_kernels.distill.lora import add_lora
from imf_kernels.distill.parallel import connect
from imf_kernels.distill.previews import Previews
from imf_kernels.distill.schema import ConfigError
from imf_kernels.distill.trainer import Trainer
from imf_kernels.distill.validation import Validation
from imf_kernels.objectives.batch import Batch
from imf_kernels.teacher import Teacher

HELD_OUT_BATCHES = 16


@dataclass(frozen=True)
class Run:
    """What a config makes. `held_out` are batches on the device, the same on all ranks, `shown` is
    the one of previews, `about` tells of the data."""

    config: Config
    accelerator: Any
    teacher: Teacher
    student: Any
    objective: Any
    loader: Loader
    held_out: list[Batch]
    shown: Batch | None
    vocoder: Any
    solves: FineSolves
    extra: Extra | None
    about: str

    def trainer(self) -> Trainer:
        config = self.config
        return Trainer(
            self.student,
            self.objective,
            self.loader,
            config.folder,
            config.training,
            callbacks=_callbacks(self),
        )


def build(config: Config) -> Run:
    """Load and make everything, on this rank's device.

    Raises:
        ConfigError: naming the section of what cannot be made.
    """
    settings, section = config.training, config.data
    accelerator = connect(settings.timeout)
    device = accelerator.device
    model = teacher_model(config.model)
    torch.manual_seed(settings.seed)  # for weights that begin at random
    student = student_of(config.model, model).to(device)
    teacher = _teacher(config, model, device)
    target, rest, path = config.named_class("objective")
    objective = schema.make(target, rest, path, fixed={"teacher": teacher})

    target, rest, path = config.named_class("dataset")
    utterances: Utterances = schema.make(target, rest, path)
    start.check_texts(utterances, model)
    train, held = split(utterances, section.held_out, section.exclude)
    _check_channels(train, model)
    target, rest, path = config.named_class("collate")
    collate = schema.make(target, rest, path)
    finish = _finish(config.model, device)
    budget = {
        "frames": section.frames,
        "max_rows": section.max_rows,
        "packed": section.packed,
        "drop_long": section.drop_long,
    }
    options: Any = {"device": device, "finish": finish, "seed": settings.seed, **budget}
    ranks = {"rank": accelerator.process_index, "ranks": accelerator.num_processes}
    with schema.naming("data", budget):
        loader = Loader(train, collate, workers=section.workers, **ranks, **options)
        if held is not None:
            options["frames"] = _held_out_frames(held.frames, section)
        held_loader = None if held is None else Loader(held, collate, **options)
        held_out = [] if held_loader is None else list(_epoch(held_loader))
    shown = None
    if config.previews is not None and held is not None:
        rows = [held[i] for i in range(min(config.previews.items, len(held)))]
        shown = collate(rows, torch.Generator().manual_seed(settings.seed)).to(device)
        shown = shown if finish is None else finish(shown)
    steps = 32 if config.validation is None else config.validation.steps
    solves = FineSolves(teacher, config.folder / "solves", steps=steps, seed=settings.seed)
    return Run(
        config=config,
        accelerator=accelerator,
        teacher=teacher,
        student=student,
        objective=objective,
        loader=loader,
        held_out=held_out,
        shown=shown,
        vocoder=_vocoder(config, utterances),
        solves=solves,
        extra=_extra(config.model, objective),
        about=start.about(utterances, loader, held_loader),
    )


def _extra(section: ModelSection, objective: Any) -> Extra | None:
    """What a student is told, beyond a batch's conditions."""
    steps, told = getattr(objective, "steps", None), {}
    if section.student.guidance:
        told["guidance"] = section.guidance
    if steps is None and not told:
        return None
    return lambda nfe: told if steps is None else {**told, steps: nfe}


# -- models ---------------------------------------------------------------------------------------


def teacher_model(section: ModelSection) -> Any:
    """The teacher's velocity model as it is loaded, frozen, in eval mode."""
    if section.build is not None:
        model = schema.make(section.build, section.arguments, "model.arguments")
    else:
        model = _load(section.family, section.checkpoint, "model.checkpoint")
    return model.eval().requires_grad_(False)


def _teacher(config: Config, model: Any, device: torch.device) -> Teacher:
    """Its model goes to the device, in the dtype that it is evaluated in."""
    section = config.model
    if section.family is not None:
        followed = "bfloat16" if config.training.precision == "bf16" else "float32"
        model.to(getattr(torch, section.teacher_dtype or followed))
    model.to(device)
    if section.graphs is None:
        return Teacher(model, section.guidance)
    with schema.naming("model.graphs"):
        buckets = graphs.DEFAULT if section.graphs == "default" else section.graphs
        return graphs.GraphTeacher(model, section.guidance, buckets)


def student_of(section: ModelSection, teacher: Any) -> Any:
    """A trainable student: of its own weights, of its own sizes, or the teacher's copy."""
    said = section.student
    options: dict[str, Any] = {"diagonal": said.diagonal} if said.diagonal != 1 else {}
    options |= {"guidance": True} if said.guidance else {}  # your own need not know these
    tokens = said.step_tokens
    with schema.naming("model.student", ("checkpoint", "family", "sizes", "lora")):
        if said.checkpoint is not None:
            family = said.family or section.family
            student = _load(family, said.checkpoint, "model.student.checkpoint")
            student = student if student.config.mixer else student.student(**options)
            student.requires_grad_(True)
        elif said.sizes is not None:
            student = _resized(teacher, said)
        elif tokens is not None:
            student = models.StepTokenDiT.of(teacher, tokens.counts, tokens.tokens)
        else:
            student = teacher.student(**options)
        if said.checkpoint_activations:
            student.checkpoint_activations = True
        if said.lora is not None:
            return add_lora(student, said.lora.rank, said.lora.alpha, said.lora.targets)
    tower = getattr(student, "text_embed", None)
    if isinstance(tower, nn.Module):  # only the estimator and its mixer train
        tower.requires_grad_(False)
    return student


def counts(model: nn.Module) -> tuple[int, int]:
    """Parameters that are trained, and frozen ones."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, free in sizes if free), sum(n for n, free in sizes if not free)


def _load(family: str | None, path: str | None, where: str) -> Any:
    assert path is not None
    with schema.naming(where):
        if family == "cosyvoice2":
            return models.load_cosyvoice2(path)
        if family == "cosyvoice3":
            return models.load_cosyvoice3(path)
        return models.load_f5(path, family)


def _resized(teacher: Any, said: StudentSection) -> Any:
    """A student of random weights; F5's text tower is the teacher's, which stays frozen."""
    fixed = {"mixer", "mixer_diagonal", "guidance", "baked", "fp8", "text", "channels"}
    kept = {name: getattr(teacher.config, name) for name in ("dim", "depth", "heads")}
    given = schema.arguments(
        type(teacher.config),
        {**kept, **(said.sizes or {})},
        "model.student.sizes",
        hidden=fixed,
    )
    switches = {"mixer": True, "mixer_diagonal": said.diagonal, "guidance": said.guidance}
    student = type(teacher)(replace(teacher.config, **given, **switches))
    if getattr(student, "text_embed", None) is not None:
        student.text_embed.load_state_dict(teacher.text_embed.state_dict())
    return student


def _check_channels(utterances: Utterances, model: Any) -> None:
    wanted, given = getattr(model, "channels", None), utterances[0].mel.shape[1]
    if wanted is not None and wanted != given:
        raise ConfigError(f"data.dataset: expected mels of {wanted} channels, got {given}")


def _finish(section: ModelSection, device: torch.device) -> Any:
    """What is done with batches on the device: CosyVoice's tokens become features there."""
    if section.family not in ("cosyvoice2", "cosyvoice3"):
        return None
    from imf_kernels.data import Encoded

    assert section.checkpoint is not None
    with schema.naming("model.checkpoint"):
        return Encoded(models.load_token_encoder(section.checkpoint).to(device))


# -- data -----------------------------------------------------------------------------------------


class Subset:
    """Some of a dataset's utterances: `indices`, integers `(len,)`."""

    def __init__(self, utterances: Utterances, indices: Tensor) -> None:
        self.utterances, self.indices = utterances, indices.int()
        self.frames = torch.as_tensor(utterances.frames, dtype=torch.int32)[self.indices]
        self.names = _Names(utterances.names, self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Utterance:
        return self.utterances[int(self.indices[index])]


class _Names(Sequence[str]):
    """Some of a dataset's names, looked up when they are asked for."""

    def __init__(self, names: Sequence[str], indices: Tensor) -> None:
        self.names, self.indices = names, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.names[int(self.indices[index])]


def split(
    utterances: Utterances, held_out: HeldOut | None, exclude: Sequence[str] | str = ()
) -> tuple[Any, Any]:
    """What is trained on, and what is held out; by names alone, whatever their order.

    Raises:
        ConfigError: names that are not there; nothing on one of the sides.
    """
    path, names = "data.held_out", utterances.names
    left = ~_among(utterances, exclude, "data.exclude")
    if held_out is None:
        return (utterances if bool(left.all()) else Subset(utterances, left.nonzero()[:, 0])), None
    if held_out.share is not None:
        path, chosen = f"{path}.share", _shares(names) < held_out.share
    else:
        path = f"{path}.names"
        chosen = _among(utterances, held_out.names or (), path)
    held, kept = (left & chosen).nonzero()[:, 0], (left & ~chosen).nonzero()[:, 0]
    if not len(held) or not len(kept):
        raise ConfigError(
            f"{path}: expected some utterances held out and some not, got {len(held)} and "
            f"{len(kept)}"
        )
    held = held[_shares(_Names(names, held)).argsort(stable=True)]
    return Subset(utterances, kept), Subset(utterances, held[: held_out.items])


def _without(utterances: Any) -> str:
    out = getattr(utterances, "left_out", 0)
    return f" (which min_seconds and max_seconds have left without {out} others)" if out else ""


def _among(utterances: Utterances, said: Sequence[str] | str, path: str) -> Tensor:
    """Bool `(len,)`: which of the names are said, one by one or by a file of them."""
    if isinstance(said, str):
        said = [line for line in Path(said).read_text(encoding="utf-8").splitlines() if line]
    names, chosen = utterances.names, set(said)
    if not chosen:
        return torch.zeros(len(names), dtype=torch.bool)
    if missing := chosen.difference(names):
        raise ConfigError(
            f"{path}: expected names of the dataset{_without(utterances)}, "
            f"got {sorted(missing)[:3]}"
        )
    return torch.frombuffer(bytearray(name in chosen for name in names), dtype=torch.bool)


def _shares(names: Sequence[str]) -> Tensor:
    """Of each name a number in [0, 1)."""
    return torch.frombuffer(array("d", map(_share_of, names)), dtype=torch.float64)


def _share_of(name: str) -> float:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _held_out_frames(lengths: Tensor, section: DataSection) -> int:
    """What a held-out batch may have: no more than training's, and so little that there are some
    `HELD_OUT_BATCHES` for the ranks to share; the same on any number of them."""
    kept = lengths[lengths <= section.frames]
    if not len(kept) or (len(kept) < len(lengths) and not section.drop_long):
        return section.frames  # which is what the error is to tell
    share = -(-int(kept.sum()) // HELD_OUT_BATCHES)
    return max(int(kept.max()), min(share, section.frames))


def _epoch(loader: Loader) -> Any:
    return islice(loader(0), len(loader))


# -- callbacks ------------------------------------------------------------------------------------


def _callbacks(run: Run) -> list[object]:
    """Those that add to records first."""
    config, board = run.config, TensorBoard()
    callbacks: list[object] = [start.GoesOn()]
    if config.validation is not None:
        said = config.validation
        with schema.naming("validation", ("every", "nfe")):
            callbacks.append(
                Validation(
                    run.held_out,
                    run.solves,
                    every=said.every,
                    nfe=said.nfe,
                    grid=said.grid,
                    extra=run.extra,
                )
            )
    shown = config.previews
    if shown is not None and run.shown is not None:
        with schema.naming("previews", ("every", "nfe", "rate")):
            callbacks.append(
                Previews(
                    run.shown,
                    run.solves,
                    every=shown.every,
                    nfe=shown.nfe,
                    vocoder=run.vocoder,
                    rate=None if run.vocoder is None else shown.rate,
                    tensorboard=board,
                    extra=run.extra,
                )
            )
    return [*callbacks, Kept(config), Progress(), JsonLines(), board]


def _vocoder(config: Config, utterances: Any) -> Any:
    named = None if config.previews is None else config.previews.vocoder
    if named != "griffin_lim":
        return named
    from imf_kernels.data import Mel
    from imf_kernels.distill.griffin_lim import GriffinLim

    mel = getattr(utterances, "mel", None)
    if not isinstance(mel, Mel):
        raise ConfigError(
            "previews.vocoder: expected a dataset with a `mel` for griffin_lim, got "
            f"{type(utterances).__name__}"
        )
    return GriffinLim(mel)
