"""One diffusion transformer for F5-TTS v0, F5-TTS v1 and CosyVoice3, from their own state dicts.

Two phases: `prepare` computes, once per utterance batch, what does not depend on `x, t, r`;
`model(x, t, r, cond)` evaluates the velocity. For a known grid, `tables` computes all that depends
on `t, r` once, and `evaluate` does the rest. Module names follow the clients' checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from imf_kernels import checks, masks
from imf_kernels.models import linears, state_dicts
from imf_kernels.models.conditioning import Conditioning, TensorSpec
from imf_kernels.models.config import FP8_LAYERS, DiTConfig
from imf_kernels.models.estimator import Estimator, checked_lengths, packed_rows
from imf_kernels.models.linears import Fp8Linear, FusedLinears
from imf_kernels.models.positions import (
    KERNEL,
    CausalConvPositionEmbedding,
    ConvPositionEmbedding,
    GroupedConv,
    Rope,
    RotaryEmbedding,
)
from imf_kernels.models.scope import CacheSizes, Extension, Scope, Whole
from imf_kernels.models.step_tables import Modulation, StepTables, linear_float32
from imf_kernels.models.text_tower import TextTower
from imf_kernels.models.time_embedding import GuidanceEmbedding, TimeEmbedding, TimeEmbedMixer
from imf_kernels.ops import (
    gated_residual_norm,
    gated_residual_norm_fp8,
    linear,
    modulated_layer_norm,
    modulated_layer_norm_fp8,
    rope_qkv,
)
from imf_kernels.profiling import spanned
from imf_kernels.rows import Rows


class Attention(nn.Module):
    """Self-attention over each row's frames; rotary on the first `rope_heads` heads."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.rope_heads = config.rope_heads
        self.to_qkv: Any = None
        if "qkv" in config.fp8:
            self.to_qkv = Fp8Linear(config.dim, 3 * inner)
        else:
            self.to_q = nn.Linear(config.dim, inner)
            self.to_k = nn.Linear(config.dim, inner)
            self.to_v = nn.Linear(config.dim, inner)
        # in the clients' order, by which a saved optimizer knows its parameters
        self.q_norm = nn.RMSNorm(config.head_dim, eps=1e-6) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=1e-6) if config.qk_norm else None
        self.to_out = nn.ModuleList([linears.new(inner, config.dim, "out" in config.fp8)])
        self._fused = FusedLinears()

    def forward(self, x: Any, rope: Rope, scope: Scope) -> Tensor:
        """`(T, D)` to `(T, D)`; `x` is `Quantized` for a `to_qkv`."""
        qkv = self.project(x).unflatten(-1, (3, self.heads, -1))
        weights: dict[str, Any] = {}
        if self.q_norm is not None and self.k_norm is not None:
            weights = {"q_weight": self.q_norm.weight, "k_weight": self.k_norm.weight}
        in_place = not qkv.requires_grad
        qkv = rope_qkv(qkv, *rope, self.rope_heads, **weights, in_place=in_place)
        h = linears.apply(self.to_out[0], scope.attend(qkv).flatten(1))
        return h if scope.silent is None else h.masked_fill(scope.silent[:, None], 0.0)

    def project(self, x: Any) -> Tensor:
        """q, k and v side by side, `(T, 3 H head_dim)`."""
        if self.to_qkv is not None:
            return self.to_qkv(x)
        return self._fused.apply(self.projections, x)

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        return self.to_q, self.to_k, self.to_v

    def fuse_weights(self) -> None:
        if self.to_qkv is None and all(map(linears.plain, self.projections)):
            self._fused.fuse(self.projections)


class FeedForward(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        inner, fp8 = config.ff_mult * config.dim, "ff" in config.fp8
        self.ff = nn.Sequential(
            nn.Sequential(linears.new(config.dim, inner, fp8), nn.GELU(approximate="tanh")),
            nn.Identity(),  # the clients' dropout, which a velocity model does not use
            linears.new(inner, config.dim, fp8),
        )

    def forward(self, x: Any) -> Tensor:
        """`(T, D)` to `(T, D)`; `x` is `Quantized` for layers in FP8."""
        first: Any = self.ff[0]
        if isinstance(self.ff[2], Fp8Linear):
            return self.ff[2](first[0](x), gelu=True)
        return linears.apply(self.ff[2], linears.apply(first[0], x, gelu=True))


class AdaLN(nn.Module):
    """`Linear(SiLU(e))`, cut into modulations of `dim` channels."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(dim, parts * dim)

    def forward(self, e: Tensor) -> Tensor:
        """`(R, dim)`, SiLU already applied, to `(R, parts, dim)`."""
        return self.linear(e).unflatten(-1, (self.parts, -1))


class Block(nn.Module):
    """adaLN attention and MLP, each on a gated residual.

    A norm writes what the layer that reads it wants, which after the last block is no FP8.
    """

    def __init__(self, config: DiTConfig, last: bool = False) -> None:
        super().__init__()
        self.norm_before_ff = _norm("ff" in config.fp8)
        self.norm_before_next = _norm("qkv" in config.fp8 and not last)
        self.attn_norm: Any = None if config.baked else AdaLN(config.dim, 6)
        self.attn = Attention(config)
        self.ff = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        y: Any,
        modulation: Tensor,
        shift: Tensor,
        scale: Tensor,
        rope: Rope,
        scope: Scope,
    ) -> tuple[Tensor, Any]:
        """From the residual stream `x` and its modulated norm `y` to the same after this block.

        `modulation` `(R, 6, D)` is the block's own, of which the first two have made `y`; `shift`
        and `scale` are of the norm that follows.
        """
        _, _, gate_a, shift_f, scale_f, gate_f = modulation.unbind(1)
        rows = scope.rows
        x, y = self.norm_before_ff(x, self.attn(y, rope, scope), gate_a, shift_f, scale_f, rows)
        return self.norm_before_next(x, self.ff(y), gate_f, shift, scale, rows)


def _norm(fp8: bool) -> Any:
    return gated_residual_norm_fp8 if fp8 else gated_residual_norm


class InputEmbedding(nn.Module):
    """The joint input projection, split into the state's columns and the conditions'."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.channels = config.channels
        extra = 2 * config.channels if config.text is None else config.text.dim
        self.proj = nn.Linear(2 * config.channels + extra, config.dim)
        position = CausalConvPositionEmbedding if config.causal_conv else ConvPositionEmbedding
        self.conv_pos_embed = position(config.dim)

    def conditions(self, conditions: Tensor) -> Tensor:
        """`prompt | text` or `prompt | mu | spks` columns, and the bias."""
        return F.linear(
            conditions, linears.weight_of(self.proj)[:, self.channels :], self.proj.bias
        )

    def state(self, x: Tensor) -> Tensor:
        """`(T, C)` to `(T, D)`."""
        return linear(x, linears.weight_of(self.proj)[:, : self.channels], None)


class DiT(Estimator):
    """Velocity `v(x, t)` of a flow-matching teacher, or mean velocity `u(x, t, r)` of a student.

    Build it from a `DiTConfig`, or from a client's state dict with `DiT.from_state_dict`.
    """

    root = "time_embed.time_mlp.2.weight"

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.time_embed = None if config.baked else TimeEmbedding(config.dim)
        self.time_embed_mixer = (
            TimeEmbedMixer(config.dim, config.mixer_diagonal)
            if config.mixer and not config.baked
            else None
        )
        self.guidance_embed = GuidanceEmbedding(config.dim, config.dim) if config.guidance else None
        self.text_embed = TextTower(config.text) if config.text is not None else None
        self.input_embed = InputEmbedding(config)
        self.rotary_embed = RotaryEmbedding(config.head_dim)
        self.transformer_blocks = nn.ModuleList(
            Block(config, last=i == config.depth - 1) for i in range(config.depth)
        )
        self.long_skip_connection = (
            nn.Linear(2 * config.dim, config.dim, bias=False) if config.long_skip else None
        )
        self.norm_out: Any = None if config.baked else AdaLN(config.dim, 2)
        self.proj_out = nn.Linear(config.dim, config.channels)
        self._fused_adaln = FusedLinears()
        self._reset_output()
        if config.fp8:
            self.eval().requires_grad_(False)

    def _reset_output(self) -> None:
        """adaLN-Zero: every block starts as the identity and the velocity as 0."""
        for layer in self._adaln_linears():
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        variant: str,
        *,
        heads: int | None = None,
        mixer: bool | None = None,
    ) -> DiT:
        """A float32 model on the CPU with the sizes of a client's state dict, and its weights.

        Args:
            state_dict: The client's own keys, from `time_embed.time_mlp.0.weight` on; a common
                prefix (`ema_model.transformer.`, `decoder.estimator.`) is taken off.
            variant: "f5_v0", "f5_v1" or "cosyvoice3"; see `DiTConfig.for_variant`.
            heads: Attention heads; by default inner width / 64, as all public models have.
            mixer: Whether the model takes `r`; by default, whether the state dict has a mixer.
                Asked for and missing, it is the identity.

        Raises:
            ValueError: unknown variant; missing and unexpected keys (the load is strict); a key
                with another shape than expected, no floating dtype, or weights that are not finite.
        """
        own = state_dicts.without_prefix(state_dict, cls.root)
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        config = DiTConfig.from_shapes(shapes, variant, heads=heads, mixer=mixer)
        return state_dicts.load(lambda: cls(config), config.blocks, own)

    def student(self, diagonal: float = 1.0, *, guidance: bool = False) -> DiT:
        """See `Estimator`.

        Raises:
            ValueError: a model in FP8, which cannot be trained.
        """
        if self.config.fp8:
            raise ValueError("student: expected a model to train, got one in FP8")
        return super().student(diagonal, guidance=guidance)

    def baked(self) -> DiT:
        """A copy without time embedding, mixer and adaLN weights, to be evaluated from `tables`."""
        baked = DiT(replace(self.config, baked=True))
        baked.to(device=self.proj_out.weight.device, dtype=self.dtype)
        kept = baked.state_dict().keys()
        baked.load_state_dict({k: v for k, v in self.state_dict().items() if k in kept})
        return baked.eval()

    def fp8(self, layers: Sequence[str] = FP8_LAYERS) -> DiT:
        """A copy for inference, its blocks' matrix products in FP8 and the rest in bfloat16.

        It holds no other copy of these weights: a snapshot, which cannot be trained. They are
        quantised from the weights as they are here, float32 at best. `imf_kernels.fp8` chooses the
        layers by measurement, and measures the error.

        Args:
            layers: Which products, "qkv", "out" (the attention's output) and "ff" (both of the
                MLP).

        Raises:
            ValueError: another layer, a model in FP8, or sizes that are no multiples of 16.
        """
        if self.config.fp8:
            raise ValueError(f"model: expected one without FP8, got {self.config.fp8}")
        quantised = DiT(replace(self.config, fp8=tuple(layers)))
        quantised.to(device=self.proj_out.weight.device, dtype=torch.bfloat16)
        state = self.state_dict()
        if "qkv" in layers:
            for i in range(self.config.depth):
                for part in ("weight", "bias"):
                    name = f"transformer_blocks.{i}.attn.to_{{}}.{part}"
                    parts = [state.pop(name.format(section)) for section in "qkv"]
                    state[name.format("qkv")] = torch.cat(parts)
        quantised.load_state_dict(state)
        return quantised.eval()

    @property
    def last(self) -> Any:
        return self.proj_out

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """The tensors that `prepare` takes."""
        mel = TensorSpec(("rows", "frames", self.config.channels), torch.float32)
        prompt = replace(mel, short=True)
        specs = {"prompt": prompt, "lengths": TensorSpec(("rows",), torch.int64, pad=1)}
        if self.config.guidance:
            specs["guidance"] = TensorSpec(("rows",), torch.float32, pad=1.0)
        if self.text_embed is not None:
            return specs | {"text": TensorSpec(("rows", "tokens"), torch.int64, pad=-1)}
        return specs | {"mu": mel, "spks": TensorSpec(("rows", mel.dims[2]), torch.float32)}

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """What `prepare` returns: "packed" in place of "conditions" for packed rows, "chunk" for
        streaming, "unpadded" (the rows' own lengths) for upstream's padding."""
        counts = TensorSpec(("rows",), torch.int64, pad=1)
        return {
            "lengths": counts,
            "unpadded": counts,
            "chunk": counts,
            "conditions": TensorSpec(("rows", "frames", self.config.dim), None),
            "packed": TensorSpec(("total", self.config.dim), None),
            "rope": TensorSpec(("frames", self.config.head_dim), torch.float32),
        }

    @spanned("prepare")
    def prepare(
        self,
        prompt: Tensor,
        lengths: Tensor | None = None,
        *,
        text: Tensor | None = None,
        mu: Tensor | None = None,
        spks: Tensor | None = None,
        guided: bool = False,
        streaming: bool = False,
        packed: bool | int = False,
        guidance: Tensor | float | None = None,
        upstream_padding: bool = False,
    ) -> Conditioning:
        """Everything that does not depend on `x, t, r`, once per batch.

        Args:
            prompt: Prompt mel, zero where frames are to be generated, `(B, N, C)`.
            lengths: Frames per row (its duration), integer `(B,)`; None: all N.
            text: Ids `(B, L)`, padding -1 (models with a text tower).
            mu: Frame-level token features `(B, N, C)`; spks: speaker features `(B, C)` (others).
            guided: Prepare both branches: 2B rows, `[0:B]` conditional, `[B:2B]` with prompt, text,
                mu and spks dropped.
            streaming: Block-causal attention over blocks of `config.chunk` frames.
            packed: Evaluate the rows behind one another instead of each padded to N: over this many
                frames (per branch), no fewer than the lengths' sum; True: just as many, which reads
                the lengths, if need be from the device.
            guidance: w of a student that is told it, a number or floating `(B,)`; both branches are
                told the same.
            upstream_padding: F5-TTS's own padded behaviour: all N frames are computed and move, are
                attended to and enter the text tower's norms. For comparisons: a batch then differs
                from its rows.

        Raises:
            ValueError, TypeError: naming the argument, the expected and the given value.
        """
        checks.shape("prompt", prompt, "B", "N", self.config.channels)
        checks.floating("prompt", prompt)
        rows, frames, channels = prompt.shape
        lengths = checked_lengths(lengths, prompt)
        layout = packed_rows(packed, lengths, frames)
        if layout is not None and upstream_padding:
            raise ValueError("packed: expected False with upstream_padding, got True")
        own = lengths
        if upstream_padding:
            lengths = torch.full_like(own, frames)
        where = Rows.padded(lengths, frames) if layout is None else layout

        def flat(x: Tensor) -> Tensor:
            """Features `(B, N, ...)` as frames `(T, ...)`, 0 beyond each row's length."""
            x = x.to(self.dtype)
            if layout is not None:
                return layout.pack(x)
            outside = ~masks.inside(lengths, frames)
            return x.masked_fill(outside[:, :, None], 0.0).flatten(0, 1)

        if self.text_embed is not None:
            text = _needed("text", text, {"mu": mu, "spks": spks})
            checks.shape("text", text, rows, "L")
            checks.dtype("text", text, torch.int64, torch.int32)
            vocab = self.text_embed.config.vocab
            if checks.readable(text) and text.numel():
                least, most = int(text.min()), int(text.max())
                if least < -1 or most >= vocab:
                    raise ValueError(
                        f"text: expected ids in [-1, {vocab - 1}], got {least} to {most}"
                    )
            padding = ~masks.inside(own, frames).flatten() if upstream_padding else None
            said, heard = self.text_embed(text, where, guided, padding), flat(prompt)
            heard = torch.stack([heard, torch.zeros_like(heard)]) if guided else heard[None]
            conditions = self.input_embed.conditions(torch.cat([heard, said.to(heard)], dim=-1))
        else:
            mu = _needed("mu", mu, {"text": text})
            spks = _needed("spks", spks, {"text": text})
            checks.shape("mu", mu, rows, frames, channels)
            checks.shape("spks", spks, rows, channels)
            for name, value in (("mu", mu), ("spks", spks)):
                checks.floating(name, value)
            spks = spks[:, None].expand(rows, frames, channels)
            given = flat(torch.cat([prompt, mu, spks], dim=-1))
            conditions = self.input_embed.conditions(given)[None]
            if guided:
                bias = self.input_embed.proj.bias
                conditions = torch.cat([conditions, bias.to(conditions).expand_as(conditions)])

        conditions = self.add_guidance(conditions, guidance, where).flatten(0, 1)
        if layout is None:
            conditions = conditions.view(-1, frames, self.config.dim)
        tensors = {
            "lengths": lengths.repeat(1 + guided),
            "conditions" if layout is None else "packed": conditions,
            "rope": self.rotary_embed(frames),
        }
        if upstream_padding:
            tensors["unpadded"] = own.repeat(1 + guided)
        if streaming:
            tensors["chunk"] = torch.full_like(tensors["lengths"], self.config.chunk)
        return Conditioning(tensors, self.specs)

    def modulation(self, t: Tensor, r: Tensor) -> Modulation:
        e = F.silu(self.embed_time(t, r)).to(self.dtype)
        layers = self._adaln_linears()
        if self._fused_adaln.fused(layers):
            made = self._fused_adaln.apply(layers, e).unflatten(-1, (-1, self.config.dim))
            parts, final = made.split([6 * self.config.depth, 2], dim=1)
            return Modulation(list(parts.unflatten(1, (-1, 6)).unbind(1)), final)
        blocks: Any = self.transformer_blocks
        return Modulation([block.attn_norm(e) for block in blocks], self.norm_out(e))

    def velocity(
        self,
        x: Tensor,
        conditions: Tensor,
        modulation: Modulation,
        rows: Rows,
        cond: Conditioning,
    ) -> Tensor:
        scope = Whole(rows, cond.get("chunk"))
        if "unpadded" in cond:
            own = Rows.padded(cond["unpadded"], cond["rope"].shape[0])
            h = (self.input_embed.state(x) + conditions).flatten(0, 1)
            h = h + self.input_embed.conv_pos_embed(h, Whole(own))
            scope = scope._replace(silent=own.row_of < 0)
        else:
            h = self.embed_frames(x, conditions, scope)
        h = self.run_blocks(h, modulation, Rope(cond["rope"], rows), scope)
        return linears.apply(self.proj_out, h)

    def embed_frames(self, x: Tensor, conditions: Tensor, scope: Scope) -> Tensor:
        """As `velocity`, to the blocks' input `(branches * T, D)`."""
        h = (self.input_embed.state(x) + conditions).flatten(0, 1)
        return self.input_embed.conv_pos_embed(h, scope, residual=h)

    def extend(
        self, x: Tensor, conditions: Tensor, modulation: Modulation, extension: Extension
    ) -> Tensor:
        h = extension.lay_out((self.input_embed.state(x.to(self.dtype)) + conditions).flatten(0, 1))
        h = self.input_embed.conv_pos_embed(h, extension, residual=h)[extension.new]
        scope = extension.without_lead()
        rope = Rope.of_frames(self.rotary_embed.at(scope.position))
        return linears.apply(self.proj_out, self.run_blocks(h, modulation, rope, scope))

    @property
    def cache_sizes(self) -> CacheSizes:
        if not self.config.causal_conv:
            raise ValueError(
                "model: expected convolutions that look back only (CosyVoice3's), got F5-TTS's"
            )
        layers, heads, head_dim = self.config.depth, self.config.heads, self.config.head_dim
        widths = (self.config.dim, self.config.dim)
        chunk = self.config.chunk
        return CacheSizes(layers, heads, head_dim, KERNEL - 1, widths, chunk, behind=0)

    def run_blocks(self, h: Tensor, modulation: Modulation, rope: Rope, scope: Scope) -> Tensor:
        """Embedded frames `(T, D)` to the normalised input of the last projection."""
        rows = scope.rows
        scale, shift = modulation.final.unbind(1)
        norms = [(m[:, 0], m[:, 1]) for m in modulation.blocks] + [(shift, scale)]
        first: Any = modulated_layer_norm_fp8 if "qkv" in self.config.fp8 else modulated_layer_norm
        x, y = h, first(h, *norms[0], rows)
        for block, own, following in zip(
            self.transformer_blocks, modulation.blocks, norms[1:], strict=True
        ):
            arguments = (x, y, own, *following, rope, scope)
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, y = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x, y = block(*arguments)
        if self.long_skip_connection is None:
            return y
        x = self.long_skip_connection(torch.cat([x, h], dim=-1))
        return modulated_layer_norm(x, shift, scale, rows)

    def embed_time(self, t: Tensor, r: Tensor) -> Tensor:
        """The (mixed) time embedding, float32 `(B, dim)`."""
        if self.time_embed is None:
            raise RuntimeError("a baked model holds no time embedding: evaluate it from its tables")
        e = self.time_embed(t)
        if self.time_embed_mixer is not None:
            e = self.time_embed_mixer(e, self.time_embed(r))
        return e

    @spanned("table")
    @torch.no_grad()
    def tables(self, t: Tensor, r: Tensor) -> StepTables:
        """The step tables of NFE intervals: one product over every adaLN weight.

        Args:
            t, r: Float32 `(NFE,)`, the same times for all rows, or `(NFE, R)`. A guided evaluation
                has 2B rows.
        """
        checks.shape("r", r, *t.shape)
        steps, rows, dim = t.shape[0], t[0].numel(), self.config.dim
        with torch.autocast(t.device.type, enabled=False):
            e = F.silu(self.embed_time(t.reshape(-1), r.reshape(-1)))
            table = linear_float32(e, *self._fused_adaln.fuse(self._adaln_linears())).view(
                steps, rows, -1, dim
            )
        blocks, final = table.split([6 * self.config.depth, 2], dim=2)
        return StepTables(blocks.unflatten(2, (-1, 6)), final)

    def table_sources(self) -> list[nn.Parameter]:
        """The parameters that step tables are made of."""
        timed = (self.time_embed, self.time_embed_mixer, *self._adaln_linears())
        return [p for module in timed if module is not None for p in module.parameters()]

    def fuse_weights(self) -> None:
        """Lay the weights that are read as one (adaLN; q, k and v) side by side in memory.

        The parameters stay the same objects, as views. Evaluations without gradients do it by
        themselves, at the first call and after a move or a cast; whoever takes addresses does it
        before, and whoever trains without sharding (9 launches a block instead of 12). On CUDA it
        also lays the convolutions' weights as their kernel reads them, if they are frozen
        (`requires_grad_(False)`); others are copied at every evaluation.
        """
        if not self.config.baked:
            self._fused_adaln.fuse(self._adaln_linears())
        for module in self.modules():
            if isinstance(module, Attention):
                module.fuse_weights()
            elif isinstance(module, GroupedConv) and module.weight.is_cuda:
                module.lay_out()

    def shards(self) -> list[nn.Module]:
        return [m for m in self.modules() if isinstance(m, Attention | FeedForward)]

    def _adaln_linears(self) -> list[nn.Linear]:
        return [module.linear for module in self.modules() if isinstance(module, AdaLN)]


def _needed(name: str, value: Tensor | None, others: Mapping[str, Tensor | None]) -> Tensor:
    if value is None:
        raise ValueError(f"{name}: expected a tensor for this model, got None")
    for other, given in others.items():
        if given is not None:
            raise ValueError(f"{other}: expected None for this model, got {tuple(given.shape)}")
    return value
