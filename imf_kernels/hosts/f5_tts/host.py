"""The host: F5-TTS's `sample` and `forward` over this library's model and solver."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from imf_kernels import checks, grids, guidance, masks, sampler
from imf_kernels.data import collate, texts
from imf_kernels.graphs import DEFAULT, GraphSampler
from imf_kernels.hosts.f5_tts import inputs
from imf_kernels.hosts.replays import Replays
from imf_kernels.models import Conditioning, DiT
from imf_kernels.objectives import Batch, IntMeanFlow
from imf_kernels.profiling import span
from imf_kernels.solver import solve
from imf_kernels.teacher import Teacher

Objective = Callable[[Any, Batch], tuple[Tensor, dict[str, Tensor]]]

UNGUIDED = 1e-5
"""The `cfg_strength` below which the client asks for no guidance."""


class F5TTS(nn.Module):
    """Stands where F5-TTS's `CFM` does: in its inference utilities, `Trainer`, EMA, checkpoints.

    State and times are float32 whatever the weights' dtype, a batch equals its rows run alone, and
    nothing waits for the device within a solve. A student keeps its own schedule whatever its
    callers ask for: with `grid` (or `nfe`) given, `steps`, `sway_sampling_coef` and `use_epss` do
    not count, and a model with a mixer, or with `guidance` given, is never guided.

    Args:
        model: The DiT, of an F5 variant.
        mel_spec: Any callable of waves `(B, samples)`, on the model's device and at its rate, to
            mels `(B, C, N)`: F5's `MelSpec`, or of a `data.Mel` the function `lambda waves:
            torch.stack([mel(wave) for wave in waves]).mT`. None: mels only.
        vocab_char_map: Ids of the tokens that texts are made of; None: texts are UTF-8 bytes, for
            a model of 256 ids.
        objective: Makes `forward` a distillation loss: `loss, info = objective(student, Batch)`.
        frac_lengths_mask: Least and greatest share of a row that training infills.
        audio_drop_prob, cond_drop_prob: Of flow-matching training: how often a batch drops its
            prompt audio, and all conditions.
        prompt_drop_prob: Of distillation: how often a row drops its prompt audio, for teacher and
            student alike. Text is never dropped there.
        grid: Times, or with `nfe` a name ("uniform" if left out), that every `sample` takes.
        guidance: The w that is distilled into the model, if it is one.
        upstream_padding: F5's own padded batches, in which rows depend on the longest; for
            comparisons.

    Raises:
        ValueError, TypeError: naming the argument, the expected and the given value.
    """

    grid: Tensor | None

    def __init__(
        self,
        model: DiT,
        *,
        mel_spec: Callable[[Tensor], Tensor] | None = None,
        vocab_char_map: Mapping[str, int] | None = None,
        objective: Objective | None = None,
        frac_lengths_mask: tuple[float, float] = (0.7, 1.0),
        audio_drop_prob: float = 0.3,
        cond_drop_prob: float = 0.2,
        prompt_drop_prob: float = 0.0,
        grid: str | Tensor | Sequence[float] | None = None,
        nfe: int | None = None,
        guidance: float | None = None,
        upstream_padding: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, DiT) or model.config.text is None or model.config.baked:
            raise TypeError(f"model: expected a DiT of an F5 variant, got {_described(model)}")
        for name, share in (
            ("audio_drop_prob", audio_drop_prob),
            ("cond_drop_prob", cond_drop_prob),
            ("prompt_drop_prob", prompt_drop_prob),
        ):
            checks.number(name, share, 0, 1)
        collate.check_shares("frac_lengths_mask", frac_lengths_mask)
        if mel_spec is not None and not callable(mel_spec):
            raise TypeError(f"mel_spec: expected a callable of waves, got {mel_spec!r}")
        if guidance is not None:
            checks.number("guidance", guidance)
        self.transformer = model
        self.mel_spec = mel_spec
        self.vocab_char_map = vocab_char_map
        self.objective = objective
        self.frac_lengths_mask = frac_lengths_mask
        self.audio_drop_prob, self.cond_drop_prob = audio_drop_prob, cond_drop_prob
        self.prompt_drop_prob = prompt_drop_prob
        given = grid is not None or nfe is not None
        self.grid = grids.make("uniform" if grid is None else grid, nfe) if given else None
        self.guidance = guidance
        self.upstream_padding = upstream_padding
        self._replays = Replays()

    @property
    def num_channels(self) -> int:
        """Mel channels."""
        return self.transformer.config.channels

    @property
    def dim(self) -> int:
        return self.transformer.config.dim

    @property
    def device(self) -> torch.device:
        return self.transformer.proj_out.weight.device

    @property
    def distilled(self) -> bool:
        """Whether the model is sampled without guidance, whatever is asked for."""
        return self.guidance is not None or self.transformer.config.mixer

    def student(
        self,
        guidance: float | tuple[float, float] = 3.0,
        *,
        objective: Callable[..., Objective] = IntMeanFlow,
        grid: str | Tensor | Sequence[float] | None = None,
        nfe: int | None = None,
        diagonal: float = 1.0,
    ) -> F5TTS:
        """A host to distil into: a trainable copy of the weights with a mixer, text tower frozen.

        This host is its teacher: outside the student's module tree, shared by the student's copies,
        put in `eval()`, evaluated in its own dtype, and not to be changed meanwhile.

        Args:
            guidance: w of the teacher; 3 is the client's `cfg_strength` 2. Or `(least, greatest)`,
                between which each row's is drawn: the student is told it, and then speaks with the
                `cfg_strength` of every `sample`.
            objective: Made with the teacher: `functools.partial(IntMeanFlow, nfe=16)`; with a range
                it is given that too, as `guidance`.
            grid, nfe: The student's own schedule, see `F5TTS`.
            diagonal: D of the mixer's initial `[D 0]`.

        Raises:
            ValueError, TypeError: naming the argument, the expected and the given value.
        """
        w, drawn = None, {"guidance": guidance}
        if not isinstance(guidance, tuple | list):
            w, drawn = guidance, {}
        elif not _takes(objective, "guidance"):
            raise TypeError(
                "objective: expected one that takes guidance, as (least, greatest) was given, "
                f"got {objective!r}"
            )
        return F5TTS(
            self.transformer.student(diagonal, guidance=bool(drawn)),
            mel_spec=self.mel_spec,
            vocab_char_map=self.vocab_char_map,
            objective=objective(Teacher(self.transformer, w), **drawn),
            frac_lengths_mask=self.frac_lengths_mask,
            audio_drop_prob=self.audio_drop_prob,
            cond_drop_prob=self.cond_drop_prob,
            prompt_drop_prob=self.prompt_drop_prob,
            grid=grid,
            nfe=nfe,
            guidance=w,
        ).freeze()

    def freeze(self) -> Self:
        """Freeze everything but the estimator and its mixer, that is the text tower.

        Frozen parts stay in `eval()`.
        """
        tower: Any = self.transformer.text_embed
        tower.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        tower: Any = self.transformer.text_embed
        if not any(p.requires_grad for p in tower.parameters()):
            tower.eval()
        return self

    # -- sampling -------------------------------------------------------------------------------

    def capture(
        self,
        nfe: int | None = None,
        *,
        guidance: float | None = 3.0,
        buckets: Iterable[tuple[int, ...]] = DEFAULT,
        slots: int = 1,
    ) -> GraphSampler:
        """Replay later solves from CUDA graphs; elsewhere than on CUDA they run as before.

        Those of `nfe` evaluations, with guidance or without as here, that ask for neither
        trajectory nor gradients. After a change of weights call the sampler's `refresh()`.

        Args:
            nfe: None: that of the host's own grid.
            guidance: Whether the solves are guided; a student's are not. The w is each call's own.
            buckets, slots: See `graphs.GraphSampler`, which this returns.
        """
        if nfe is None and self.grid is not None:
            nfe = len(self.grid) - 1
        w = None if self.distilled else guidance
        return self._replays.capture(self.transformer, nfe, w, buckets, slots)

    def sample(
        self,
        cond: Tensor,
        text: Tensor | Sequence[str] | Sequence[Sequence[str]],
        duration: int | Tensor,
        *,
        lens: int | Tensor | None = None,
        steps: int = 32,
        cfg_strength: float = 1.0,
        sway_sampling_coef: float | None = None,
        seed: int | Sequence[int] | None = None,
        max_duration: int = 65536,
        vocoder: Callable[[Tensor], Any] | None = None,
        use_epss: bool = True,
        no_ref_audio: bool = False,
        duplicate_test: bool = False,
        t_inter: float = 0.1,
        edit_mask: Tensor | None = None,
        trajectory: bool = False,
        grad: bool = False,
    ) -> tuple[Any, Tensor]:
        """Speak `text` in the voice of `cond`.

        Args:
            cond: Prompt mels `(B, N, C)`, or waves `(B, samples)`.
            text: Ids `(B, L)` with padding -1, or B texts: strings, or lists of tokens.
            duration: Frames of each row, prompt included, an integer for all or `(B,)`; at least
                one more than the prompt's and the text's, at most `max_duration`: others are
                clamped.
            lens: Frames of each prompt, in [0, N], as `duration`; None: all N.
            steps: Evaluations; with `sway_sampling_coef` and `use_epss` the client's grid.
            cfg_strength: Guidance, w - 1; below 1e-5 none. A student that is told its guidance is
                told this.
            seed: Where each row's noise starts, one for all rows or one for each: a row gets the
                same noise in any batch. With a seed the process's random state is neither used nor
                changed. The numbers are those of `torch.manual_seed` on this kind of device.
            vocoder: Turns mels `(B, C, N)` into what is returned.
            no_ref_audio: Without the prompt's audio; its frames are 0 in the result.
            duplicate_test: Start at `t_inter` from noise and the prompt, behind itself, where the
                row's own prompt ends.
            edit_mask: Prompt frames to keep, bool `(B, frames)`; others are generated anew.
            trajectory: Return the states at all times, noise first.
            grad: Let gradients flow, to weights and `cond`.

        Returns:
            The mels, float32 `(B, longest duration, C)` with the prompt in its place and 0 beyond a
            row's duration (or what the vocoder made of them), and states `(1, B, N, C)`, the last,
            or with `trajectory` `(steps + 1, B, N, C)`.

        Raises:
            ValueError, TypeError: naming the argument, the expected and the given value.
        """
        checks.positive_int("max_duration", max_duration)
        checks.number("cfg_strength", cfg_strength)
        with torch.set_grad_enabled(grad):
            heard = self._mels("cond", cond)
            rows, prompt_frames, channels = heard.shape
            ids = self._ids(text, rows)
            lens = self._lengths(lens, rows, 0, prompt_frames)
            least = torch.maximum((ids != texts.PADDING).sum(-1), lens) + 1
            lengths = torch.maximum(least, self._per_row("duration", duration, rows))
            lengths = lengths.clamp(max=max_duration)
            durations = lengths.tolist()  # the only wait for the device, ahead of the solve
            frames = max(durations)

            mel = F.pad(heard, (0, 0, 0, frames - prompt_frames))
            if no_ref_audio:
                mel = torch.zeros_like(mel)
            kept = masks.inside(lens, frames)
            if edit_mask is not None:
                checks.shape("edit_mask", edit_mask, rows, "frames")
                checks.dtype("edit_mask", edit_mask, torch.bool)
                edit_mask = edit_mask.to(self.device)
                kept = kept & F.pad(edit_mask, (0, frames - edit_mask.shape[-1]))
            kept = kept[:, :, None]

            x = inputs.noise(durations, channels, seed, self.device)
            prompt = mel.masked_fill(~kept, 0.0)
            guided = cfg_strength >= UNGUIDED and not self.distilled
            w = guidance.from_f5(cfg_strength) if guided else None
            told = guidance.from_f5(cfg_strength) if self.transformer.config.guidance else None
            grid = self.grid
            if grid is None:
                grid = inputs.times(steps, sway_sampling_coef, use_epss)
            graphs = self._replays.of(self.transformer, grid, w)
            if duplicate_test or trajectory or grad or self.upstream_padding:
                graphs = None
            if graphs is not None:
                states = _replayed(graphs, x, durations, prompt, ids, grid, w, told)
            elif duplicate_test:
                if self.grid is not None:
                    raise ValueError("duplicate_test: expected False for a host with its own grid")
                prepared = self._prepare(prompt, lengths, durations, ids, guided, told)
                if self.upstream_padding:
                    behind = F.pad(heard, (0, 0, prompt_frames, frames - 2 * prompt_frames))
                else:
                    behind = inputs.repeated(heard, lens, lengths, frames)
                x = torch.lerp(x, behind, t_inter)
                late = inputs.late_times(t_inter, steps, sway_sampling_coef, use_epss)
                states = self._solve(x, late.to(self.device), prepared, w, trajectory)
            else:
                states = sampler.sample(
                    self.transformer,
                    x,
                    self._prepare(prompt, lengths, durations, ids, guided, told),
                    grid,
                    guidance=w,
                    intermediates=trajectory,
                    grad=grad,
                )
            states = states if trajectory else states[None]
            out: Any = torch.where(kept, mel, states[-1])
            if vocoder is not None:
                out = vocoder(out.mT)
            return out, states

    def _prepare(
        self,
        prompt: Tensor,
        lengths: Tensor,
        durations: Sequence[int],
        text: Tensor,
        guided: bool,
        told: float | None,
    ) -> Conditioning:
        """Rows of different durations lie behind one another, not in padding."""
        ragged = len(set(durations)) > 1 and not self.upstream_padding
        return self.transformer.prepare(
            prompt,
            lengths,
            text=text,
            guided=guided,
            packed=sum(durations) if ragged else False,
            guidance=told,
            upstream_padding=self.upstream_padding,
        )

    def _solve(
        self, x: Tensor, times: Tensor, cond: Conditioning, w: float | None, keep: bool
    ) -> Tensor:
        """Over times that do not start at 0, which `sampler.sample` would refuse."""
        per_row = times[:, None].expand(-1, len(x)).contiguous()
        dt = per_row.diff(dim=0)
        with span("solve", len(dt)):
            run = solve(self.transformer, x, per_row, dt, cond, w, accumulate=False, keep=keep)
        return run.x if run.states is None else run.states

    # -- training -------------------------------------------------------------------------------

    def forward(
        self,
        inp: Tensor,
        text: Tensor | Sequence[str] | Sequence[Sequence[str]],
        *,
        lens: int | Tensor | None = None,
        noise_scheduler: str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The training loss: of the objective, or without one flow matching.

        A span of each row is infilled from the rest of it. Flow matching draws what the client
        draws, in its order, from torch's and Python's random states; the model has no dropout.

        Args:
            inp: Mels `(B, N, C)`, or waves `(B, samples)`.
            text: As in `sample`.
            lens: Frames of each row, in [1, N], an integer for all or `(B,)`; None: all N.
            noise_scheduler: Not used, as upstream.

        Returns:
            The scalar loss; the prompt, mels with the span 0; and the last prediction made, both
            `(B, N, C)` (of the batch that was dealt, if the objective keeps rollouts).

        Raises:
            ValueError, TypeError: naming the argument, the expected and the given value.
        """
        x1 = self._mels("inp", inp)
        rows, frames, _ = x1.shape
        ids = self._ids(text, rows)
        lens = self._lengths(lens, rows, 1, frames)
        span = collate.spans(lens, frames, self.frac_lengths_mask)
        prompt = x1.masked_fill(span[:, :, None], 0.0)
        train = self._flow_matching if self.objective is None else self._distillation
        loss, pred = train(x1, lens, span, prompt, ids)
        return loss, prompt, pred

    def _flow_matching(
        self, x1: Tensor, lens: Tensor, span: Tensor, prompt: Tensor, ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = len(x1)
        x0 = torch.randn_like(x1)
        t = torch.rand(rows, device=x1.device)
        drop_audio = random.random() < self.audio_drop_prob
        drop_all = random.random() < self.cond_drop_prob
        cond = self.transformer.prepare(
            torch.zeros_like(prompt) if drop_audio else prompt,
            lens,
            text=ids,
            guided=drop_all,
            upstream_padding=self.upstream_padding,
        )
        if drop_all:
            cond = cond.take(slice(rows, None))
        pred = self.transformer(torch.lerp(x0, x1, t[:, None, None]), t, t, cond)
        error = (pred.float() - (x1 - x0)).square().mean(-1)
        loss = error.masked_fill(~span, 0.0).sum() / span.sum().clamp(min=1)
        return loss, pred

    def _distillation(
        self, x1: Tensor, lens: Tensor, span: Tensor, prompt: Tensor, ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        objective: Any = self.objective
        if self.prompt_drop_prob > 0:
            dropped = torch.rand(len(x1), device=x1.device) < self.prompt_drop_prob
            prompt = prompt.masked_fill(dropped[:, None, None], 0.0)
        batch = Batch(x1, lens, {"prompt": prompt, "text": ids}, loss_mask=span)
        pred: Tensor | None = None

        def keep_last(module: nn.Module, args: Any, output: Tensor) -> None:
            nonlocal pred
            pred = output.detach()

        seen = self.transformer.register_forward_hook(keep_last)
        try:
            loss, _ = objective(self.transformer, batch)
        finally:
            seen.remove()
        if pred is None:
            raise ValueError(f"objective: expected one that calls the student, got {objective!r}")
        return loss, pred

    # -- arguments ------------------------------------------------------------------------------

    def _ids(self, text: Any, rows: int) -> Tensor:
        """Int64 `(rows, L)`, of ids or texts."""
        config: Any = self.transformer.config.text
        return inputs.text_ids(text, self.vocab_char_map, config.vocab, rows, self.device)

    def _mels(self, name: str, given: Tensor) -> Tensor:
        """Float32 mels `(B, N, C)` on the model's device, of mels or waves."""
        if isinstance(given, Tensor) and given.ndim == 2:
            if self.mel_spec is None:
                raise ValueError(f"{name}: expected mels (B, N, C) without a mel_spec, got waves")
            made = self.mel_spec(given.to(self.device))
            checks.shape(f"mel_spec's mels of {name}", made, len(given), self.num_channels, "N")
            given = made.mT
        checks.shape(name, given, "B", "N", self.num_channels)
        if not len(given):
            raise ValueError(f"{name}: expected at least one row, got {tuple(given.shape)}")
        return given.to(self.device).float()

    def _lengths(self, lens: int | Tensor | None, rows: int, least: int, most: int) -> Tensor:
        lens = self._per_row("lens", most if lens is None else lens, rows)
        if checks.readable(lens) and not bool(((lens >= least) & (lens <= most)).all()):
            raise ValueError(f"lens: expected values in [{least}, {most}], got {lens.tolist()}")
        return lens

    def _per_row(self, name: str, value: int | Tensor, rows: int) -> Tensor:
        """Int64 `(rows,)` on the model's device, of one integer for all or one for each."""
        if isinstance(value, Tensor):
            checks.dtype(name, value, torch.int64, torch.int32)
            if value.ndim:
                checks.shape(name, value, rows)
            return value.to(self.device, torch.int64).expand(rows).contiguous()
        return torch.full((rows,), inputs.integer(name, value), device=self.device)


def _replayed(
    graphs: GraphSampler,
    x: Tensor,
    durations: Sequence[int],
    prompt: Tensor,
    text: Tensor,
    grid: Tensor,
    w: float | None,
    told: float | None,
) -> Tensor:
    """The last state, `(B, N, C)`, of rows as long as their durations."""
    noise = [row[:n] for row, n in zip(x, durations, strict=True)]
    heard = [row[:n] for row, n in zip(prompt, durations, strict=True)]
    given = {"prompt": heard, "text": text} | ({} if told is None else {"guidance": told})
    return pad_sequence(
        graphs.sample(noise, grid=grid, conditions=given, guidance=w), batch_first=True
    )


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether an argument can be given by this name."""
    parameters = inspect.signature(function).parameters.values()
    return any(one.name == name or one.kind is one.VAR_KEYWORD for one in parameters)


def _described(model: Any) -> str:
    config = getattr(model, "config", None)
    return type(model).__name__ if config is None else f"{type(model).__name__} of {config}"
