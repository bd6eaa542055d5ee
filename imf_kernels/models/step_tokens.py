"""A DiT that knows its number of steps from tokens, in place of time conditioning (DSFlow).

Learnt tokens, a few for each step count, stand in front of every row and pass through the blocks
with it (arXiv 2602.09041). Time embedding, mixer and adaLN weights are gone: the modulations that a
teacher has at one time are folded into the weights that follow them,

    W (norm (1 + scale) + shift) + b  =  (W diag(1 + scale)) norm + (W shift + b)
    gate (W h + b)                    =  (diag(gate) W) h + gate b

so that without its tokens the model is the teacher at that time, whatever time it is asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from imf_kernels import checks
from imf_kernels.models import checkpoints, linears, state_dicts
from imf_kernels.models.conditioning import Conditioning, TensorSpec
from imf_kernels.models.config import DiTConfig
from imf_kernels.models.dit import DiT
from imf_kernels.models.positions import Rope
from imf_kernels.models.scope import CacheSizes, Whole
from imf_kernels.models.step_tables import Modulation, StepTables
from imf_kernels.profiling import spanned
from imf_kernels.rows import Rows

KIND, FORMAT = "step_token_dit", "1"


class StepTokenDiT(DiT):
    """`model(x, t, r, cond)` for `cond = model.prepare(..., steps=K)`, which ignores t and r.

    Made by `StepTokenDiT.of`, trained by `DSFlow(..., steps="steps")`; graphs of K steps take
    `prepare={"steps": K}`. Not for streaming: tokens would shift the blocks of its mask.

    Args:
        config: Of a baked model: one without time conditioning.
        counts: The step counts K that it can be told.
        tokens: Tokens of each.
    """

    def __init__(self, config: DiTConfig, counts: Sequence[int] = (1, 2, 4), tokens: int = 1):
        if not config.baked or config.fp8:
            raise ValueError(f"config: expected one with `baked`, without FP8, got {config}")
        if not counts or len(set(counts)) < len(counts):
            raise ValueError(f"counts: expected different step counts, got {counts!r}")
        for count in counts:
            checks.positive_int("counts", count)
        checks.positive_int("tokens", tokens)
        super().__init__(config)
        self.counts, self.tokens = tuple(counts), tokens
        self.step_tokens = nn.Parameter(torch.empty(len(counts), tokens, config.dim))
        nn.init.normal_(self.step_tokens, std=0.02)

    @classmethod
    def of(
        cls, model: DiT, counts: Sequence[int] = (1, 2, 4), tokens: int = 1, *, time: float = 0.5
    ) -> StepTokenDiT:
        """A trainable student of a teacher's model, its modulations at `time` folded in.

        Raises:
            ValueError, TypeError: a model without time conditioning or in FP8, one that is no DiT
                (CosyVoice2's U-Net has no row of tokens to prepend to), a time outside of [0, 1].
        """
        if not isinstance(model, DiT):
            raise TypeError(f"model: expected a DiT, got {type(model).__name__}")
        if model.config.baked or model.config.fp8:
            wanted = "one with time conditioning and without FP8"
            raise ValueError(f"model: expected {wanted}, got one of {model.config}")
        checks.number("time", time, 0, 1)
        config = replace(model.config, baked=True, mixer=False)
        student = cls(config, counts, tokens)
        student.to(device=model.proj_out.weight.device, dtype=model.dtype)
        at = torch.full((1,), time, device=model.proj_out.weight.device)
        state = {"step_tokens": student.step_tokens, **_folded(model, model.tables(at, at).at(0))}
        student.load_state_dict({name: state[name] for name in student.state_dict()})
        student.checkpoint_activations = model.checkpoint_activations
        return student

    # -- conditioning -----------------------------------------------------------------------------

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """As of a `DiT`, with the rows' "tokens"."""
        tokens = TensorSpec(("rows", self.tokens, self.config.dim), None)
        return {**super().specs, "tokens": tokens}

    def prepare(self, *args: Any, steps: int | None = None, **kwargs: Any) -> Conditioning:
        """As `DiT.prepare`, for a solve of `steps` evaluations, one of `counts`.

        `GraphSampler` and `o3s.find_grid` refuse another number of steps. `sampler.sample` cannot:
        it takes any grid for the result, which does not say how many steps it was told.

        Raises:
            ValueError, TypeError: as there; another number of steps; `streaming` or
                `upstream_padding`.
        """
        checks.choice("steps", steps, self.counts)
        for name in ("streaming", "upstream_padding"):
            if kwargs.get(name):
                raise ValueError(f"{name}: expected False for a model with step tokens, got True")
        cond = super().prepare(*args, **kwargs)
        token = self.step_tokens[self.counts.index(steps)]
        tokens = {"tokens": token.repeat(cond.rows, 1, 1)}  # no view of what may be sharded again
        return Conditioning({**cond, **tokens}, self.specs)

    # -- evaluation -------------------------------------------------------------------------------

    def modulation(self, t: Tensor, r: Tensor) -> Modulation:
        """Of nothing: no shift, no scale, gates of 1."""
        blocks = torch.zeros(1, 6, self.config.dim, device=t.device)
        blocks[:, 2::3] = 1.0
        return Modulation([blocks] * self.config.depth, torch.zeros_like(blocks[:, :2]))

    @spanned("table")
    @torch.no_grad()
    def tables(self, t: Tensor, r: Tensor) -> StepTables:
        checks.shape("r", r, *t.shape)
        blocks, final = self.modulation(t, r)
        return StepTables(
            torch.stack(list(blocks), dim=1).expand(len(t), -1, -1, -1, -1),
            final.expand(len(t), -1, -1, -1),
        )

    def table_sources(self) -> list[nn.Parameter]:
        return []

    def velocity(
        self,
        x: Tensor,
        conditions: Tensor,
        modulation: Modulation,
        rows: Rows,
        cond: Conditioning,
    ) -> Tensor:
        h = self.embed_frames(x, conditions, Whole(rows))
        longer, frames = _behind(rows, self.tokens)
        together = h.new_zeros(len(longer.row_of), h.shape[1]).index_copy(0, frames, h)
        in_front = (longer.starts[:-1, None] + torch.arange(self.tokens, device=h.device)).flatten()
        tokens = cond["tokens"].to(h.dtype).flatten(0, 1)
        together = together.index_copy(0, in_front.long(), tokens)
        # tokens do not turn: they stand where the first frame does
        angles = cond["rope"]
        angles = torch.cat([angles[:1].expand(self.tokens, -1), angles])
        h = self.run_blocks(together, modulation, Rope(angles, longer), Whole(longer))
        return linears.apply(self.proj_out, h[frames])

    @property
    def cache_sizes(self) -> CacheSizes:
        raise ValueError("model: expected one without step tokens, which streams do not know")

    # -- what it is not ---------------------------------------------------------------------------

    def student(self, diagonal: float = 1.0, *, guidance: bool = False) -> NoReturn:
        raise ValueError("model: expected one with time conditioning, got one with step tokens")

    def baked(self) -> NoReturn:
        raise ValueError("model: expected one with time conditioning, got one with step tokens")

    def fp8(self, layers: Sequence[str] = ()) -> NoReturn:
        raise ValueError("model: expected one without step tokens, which FP8 does not know")

    # -- files ------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `.safetensors` file, atomically; sizes and counts are its metadata.

        Raises:
            ValueError, FileNotFoundError: another suffix; no such directory.
        """
        if not os.fspath(path).endswith(".safetensors"):
            raise ValueError(f"path: expected a file .safetensors, got {os.fspath(path)!r}")
        said = {"config": asdict(self.config), "counts": self.counts, "tokens": self.tokens}
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        metadata = {"kind": KIND, "version": FORMAT, "said": json.dumps(said)}
        checkpoints.write(path, weights, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> StepTokenDiT:
        """Read what `save` wrote, in eval mode.

        Raises:
            ValueError, FileNotFoundError: naming the file.
        """
        metadata, weights = checkpoints.metadata(path), checkpoints.read(path)
        with checkpoints.naming(path):
            for name, wanted in (("kind", KIND), ("version", FORMAT)):
                checks.choice(name, metadata.get(name), (wanted,))
            said = json.loads(metadata["said"])
            config = DiTConfig.from_dict(said["config"])
            model = state_dicts.load(
                lambda: cls(config, said["counts"], said["tokens"]),
                config.blocks,
                weights,
                weights["proj_out.weight"].dtype,
            )
        return model.to(device).eval()


def _folded(model: DiT, modulation: Modulation) -> dict[str, Tensor]:
    """A model's weights with the modulations `(1, ...)` in them, in float64."""
    state = {name: value.double() for name, value in model.state_dict().items()}

    def read(layer: str, shift: Tensor, scale: Tensor) -> None:
        weight = state[f"{layer}.weight"]
        state[f"{layer}.bias"] = state[f"{layer}.bias"] + weight @ shift
        state[f"{layer}.weight"] = weight * (1 + scale)

    def write(layer: str, gate: Tensor) -> None:
        state[f"{layer}.weight"] = gate[:, None] * state[f"{layer}.weight"]
        state[f"{layer}.bias"] = gate * state[f"{layer}.bias"]

    for i, block in enumerate(modulation.blocks):
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = block[0].double()
        name = f"transformer_blocks.{i}"
        for section in "qkv":
            read(f"{name}.attn.to_{section}", shift_a, scale_a)
        write(f"{name}.attn.to_out.0", gate_a)
        read(f"{name}.ff.ff.0.0", shift_f, scale_f)
        write(f"{name}.ff.ff.2", gate_f)
    scale, shift = modulation.final[0].double()
    read("proj_out", shift, scale)
    return state


def _behind(rows: Rows, tokens: int) -> tuple[Rows, Tensor]:
    """The layout of rows that each begin with so many more frames, and where those of `rows` are
    then, int64 `(T,)`, in padding too."""
    count, device = len(rows.lengths), rows.row_of.device
    starts = rows.starts + tokens * torch.arange(count + 1, dtype=torch.int32, device=device)

    def row(starts: Tensor, frames: int) -> Tensor:
        """Padding is behind a row of its own, or behind the last."""
        frame = torch.arange(frames, dtype=torch.int32, device=device)
        found = torch.searchsorted(starts[1:], frame, right=True, out_int32=True)
        return found.clamp(max=count - 1)

    total = len(rows.row_of)
    place = torch.arange(total, device=device) + tokens * (row(rows.starts, total) + 1)
    row_of = row(starts, total + tokens * count).index_copy(0, place, rows.row_of)
    return Rows(starts, rows.lengths + tokens, row_of, rows.longest + tokens), place
