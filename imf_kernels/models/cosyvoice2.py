"""CosyVoice2's estimator, a causal U-Net of one level, from its own state dict.

Two phases, as in `dit`: `prepare` computes, once per utterance batch, what does not depend on
`x, t, r`, here the share of mu, spks and prompt in the first block's convolutions; `model(x, t, r,
cond)` evaluates the velocity. `tables` holds all that depends on `t, r`: a vector per ResNet block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from imf_kernels import checks
from imf_kernels.models import state_dicts
from imf_kernels.models.causal_blocks import Attention, CausalConv, ConvBlock, FeedForward, Stage
from imf_kernels.models.conditioning import Conditioning, TensorSpec
from imf_kernels.models.config import CausalUNetConfig
from imf_kernels.models.estimator import Estimator, checked_lengths, packed_rows
from imf_kernels.models.linears import FusedLinears
from imf_kernels.models.scope import CacheSizes, Extension, Scope, Whole
from imf_kernels.models.step_tables import Modulation, StepTables, linear_float32
from imf_kernels.models.time_embedding import GuidanceEmbedding, TimeEmbedMixer, TimeMLP
from imf_kernels.profiling import spanned
from imf_kernels.rows import Rows


class CausalUNet(Estimator):
    """Velocity `v(x, t)` of a flow-matching teacher, or mean velocity `u(x, t, r)` of a student.

    Build it from a `CausalUNetConfig`, or from a client's state dict with
    `CausalUNet.from_state_dict`. With `checkpoint_activations` set, training recomputes each
    stage's activations instead of keeping them.
    """

    root = "time_mlp.linear_1.weight"

    def __init__(self, config: CausalUNetConfig) -> None:
        super().__init__(config)
        dim, inputs = config.dim, 4 * config.channels
        self.time_mlp = TimeMLP(inputs, config.time_dim)
        self.time_embed_mixer = (
            TimeEmbedMixer(config.time_dim, config.mixer_diagonal) if config.mixer else None
        )
        self.guidance_embed = (
            GuidanceEmbedding(config.time_dim, 2 * dim) if config.guidance else None
        )
        self.down_blocks = nn.ModuleList([Stage(inputs, config, outer=True)])
        self.mid_blocks = nn.ModuleList(Stage(dim, config) for _ in range(config.mid_blocks))
        self.up_blocks = nn.ModuleList([Stage(2 * dim, config, outer=True)])
        self.final_block = ConvBlock(dim, dim)
        self.final_proj = CausalConv(dim, config.channels, 1)
        self._fused_time = FusedLinears()

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        heads: int | None = None,
        mixer: bool | None = None,
    ) -> CausalUNet:
        """A float32 model on the CPU with the sizes of a client's state dict, and its weights.

        Args:
            state_dict: The client's own keys, from `time_mlp.linear_1.weight` on; a common prefix
                (`decoder.estimator.`) is taken off.
            heads: Attention heads; by default inner width / 64, as the public model has.
            mixer: Whether the model takes `r`; by default, whether the state dict has a mixer.
                Asked for and missing, it is the identity.

        Raises:
            ValueError: missing and unexpected keys (the load is strict); a key with another shape
                than expected, no floating dtype, or weights that are not finite.
        """
        own = state_dicts.without_prefix(state_dict, cls.root)
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        config = CausalUNetConfig.from_shapes(shapes, heads=heads, mixer=mixer)
        return state_dicts.load(lambda: cls(config), config.blocks, own)

    @property
    def last(self) -> Any:
        return self.final_proj

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """The tensors that `prepare` takes."""
        mel = TensorSpec(("rows", "frames", self.config.channels), torch.float32)
        specs = {
            "prompt": replace(mel, short=True),
            "lengths": TensorSpec(("rows",), torch.int64, pad=1),
            "mu": mel,
            "spks": TensorSpec(("rows", self.config.channels), torch.float32),
        }
        if self.config.guidance:
            specs["guidance"] = TensorSpec(("rows",), torch.float32, pad=1.0)
        return specs

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """What `prepare` returns: "packed" in place of "conditions" for packed rows, "chunk" for
        streaming; of "frames" the number counts."""
        counts = TensorSpec(("rows",), torch.int64, pad=1)
        return {
            "lengths": counts,
            "chunk": counts,
            "frames": TensorSpec(("frames",), torch.int64),
            "conditions": TensorSpec(("rows", "frames", 2 * self.config.dim), None),
            "packed": TensorSpec(("total", 2 * self.config.dim), None),
        }

    @spanned("prepare")
    def prepare(
        self,
        prompt: Tensor,
        lengths: Tensor | None = None,
        *,
        mu: Tensor,
        spks: Tensor,
        guided: bool = False,
        streaming: bool = False,
        packed: bool | int = False,
        guidance: Tensor | float | None = None,
    ) -> Conditioning:
        """Everything that does not depend on `x, t, r`, once per batch.

        Args:
            prompt: Prompt mel (the client's `cond`), zero where frames are to be generated,
                `(B, N, C)`.
            lengths: Frames per row (its duration), integer `(B,)`; None: all N.
            mu: Frame-level token features `(B, N, C)`.
            spks: Speaker features `(B, C)`.
            guided: Prepare both branches: 2B rows, `[0:B]` conditional, `[B:2B]` with prompt, mu
                and spks dropped.
            streaming: Block-causal attention over blocks of `config.chunk` frames.
            packed: Evaluate the rows behind one another instead of each padded to N: over this many
                frames (per branch), no fewer than the lengths' sum; True: just as many, which reads
                the lengths, if need be from the device.
            guidance: w of a student that is told it, a number or floating `(B,)`; both branches are
                told the same.

        Raises:
            ValueError, TypeError: naming the argument, the expected and the given value.
        """
        checks.shape("prompt", prompt, "B", "N", self.config.channels)
        rows, frames, channels = prompt.shape
        checks.shape("mu", mu, rows, frames, channels)
        checks.shape("spks", spks, rows, channels)
        for name, value in (("prompt", prompt), ("mu", mu), ("spks", spks)):
            checks.floating(name, value)
        lengths = checked_lengths(lengths, prompt)
        layout = packed_rows(packed, lengths, frames)

        own = Rows.padded(lengths, frames) if layout is None else layout
        given = (mu, spks[:, None].expand_as(mu), prompt)  # in the order of the weights' columns
        joined = torch.cat([part.to(self.dtype) for part in given], dim=-1)
        resnet = self._down.resnet
        branches = [resnet.conditions(own.pack(joined), own)]
        if guided:
            biases = torch.cat([conv.bias for conv in (resnet.block1.conv, resnet.res_conv)])
            branches.append(biases.to(branches[0]).expand_as(branches[0]))
        conditions = self.add_guidance(torch.stack(branches), guidance, own).flatten(0, 1)

        tensors = {
            "lengths": lengths.repeat(len(branches)),
            "frames": torch.arange(frames, device=prompt.device),
        }
        if layout is None:
            tensors["conditions"] = conditions.unflatten(0, (-1, frames))
        else:
            tensors["packed"] = conditions
        if streaming:
            tensors["chunk"] = torch.full_like(tensors["lengths"], self.config.chunk)
        return Conditioning(tensors, self.specs)

    def modulation(self, t: Tensor, r: Tensor) -> Modulation:
        e = F.mish(self.embed_time(t, r)).to(self.dtype)
        shifts = [layer(e) for layer in self._time_linears()]
        return Modulation(shifts, e.new_empty(len(e), 0, self.config.dim))

    def velocity(
        self,
        x: Tensor,
        conditions: Tensor,
        modulation: Modulation,
        rows: Rows,
        cond: Conditioning,
    ) -> Tensor:
        x = x.expand(len(conditions), *x.shape).flatten(0, 1)
        scope = Whole(rows, cond.get("chunk"))
        return self._evaluate(x, conditions.flatten(0, 1), modulation, scope)

    def extend(
        self, x: Tensor, conditions: Tensor, modulation: Modulation, extension: Extension
    ) -> Tensor:
        x = x.to(self.dtype).expand(len(conditions), *x.shape).flatten(0, 1)
        x, given = extension.lay_out(x), extension.lay_out(conditions.flatten(0, 1))
        return self._evaluate(x, given, modulation, extension)[extension.new]

    @property
    def cache_sizes(self) -> CacheSizes:
        dim, between = self.config.dim, 2 * len(self.mid_blocks)
        widths = (self.config.channels, *[dim] * (2 + between), 2 * dim, *[dim] * 3)
        layers = self.config.depth * (len(self.mid_blocks) + 2)
        return CacheSizes(
            layers, self.config.heads, self.config.head_dim, 2, widths, self.config.chunk, behind=2
        )

    def _evaluate(
        self, x: Tensor, conditions: Tensor, modulation: Modulation, scope: Scope
    ) -> Tensor:
        """State and conditions of all branches' frames, `(T, C)` and `(T, D)`, to `(T, C)`."""
        first, *between, last = modulation.blocks
        skip = self._run(self._down, x, first, scope, conditions)
        h = self._down.conv(skip, scope)
        for stage, shift in zip(self.mid_blocks, between, strict=True):
            h = self._run(stage, h, shift, scope)
        h = self._run(self._up, torch.cat([h, skip], dim=1), last, scope)
        h = self.final_block(self._up.conv(h, scope), scope)
        return self.final_proj(h, scope)

    def _run(self, stage: Any, *arguments: Any) -> Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(stage, *arguments, use_reentrant=False)
        return stage(*arguments)

    def embed_time(self, t: Tensor, r: Tensor) -> Tensor:
        """The (mixed) time embedding, float32 `(B, time_dim)`."""
        e = self.time_mlp(t)
        if self.time_embed_mixer is not None:
            e = self.time_embed_mixer(e, self.time_mlp(r))
        return e

    @spanned("table")
    @torch.no_grad()
    def tables(self, t: Tensor, r: Tensor) -> StepTables:
        """The step tables of NFE intervals: one product over the time weights of every block.

        Args:
            t, r: Float32 `(NFE,)`, the same times for all rows, or `(NFE, R)`. A guided evaluation
                has 2B rows.
        """
        checks.shape("r", r, *t.shape)
        steps, rows = t.shape[0], t[0].numel()
        with torch.autocast(t.device.type, enabled=False):
            e = F.mish(self.embed_time(t.reshape(-1), r.reshape(-1)))
            shifts = linear_float32(e, *self._fused_time.fuse(self._time_linears()))
        blocks = shifts.view(steps, rows, -1, self.config.dim)
        return StepTables(blocks, blocks[:, :, :0])

    def table_sources(self) -> list[nn.Parameter]:
        """The parameters that step tables are made of."""
        timed = (self.time_mlp, self.time_embed_mixer, *self._time_linears())
        return [p for module in timed if module is not None for p in module.parameters()]

    def fuse_weights(self) -> None:
        """Lay the weights that are read as one (time; q, k and v) side by side in memory.

        The parameters stay the same objects, as views. Evaluations do it by themselves, at the
        first call and after a move or a cast; whoever takes addresses does it before.
        """
        self._fused_time.fuse(self._time_linears())
        for module in self.modules():
            if isinstance(module, Attention):
                module.fuse_weights()

    def shards(self) -> list[nn.Module]:
        return [m for m in self.modules() if isinstance(m, Attention | FeedForward)]

    @property
    def _down(self) -> Any:
        return self.down_blocks[0]

    @property
    def _up(self) -> Any:
        return self.up_blocks[0]

    def _time_linears(self) -> list[nn.Linear]:
        """What makes each ResNet block's shift of the time embedding, in order."""
        mid: Any = self.mid_blocks
        return [stage.resnet.mlp[1] for stage in (self._down, *mid, self._up)]
