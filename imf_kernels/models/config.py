"""The sizes and switches that tell the model families apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from imf_kernels import checks
from imf_kernels.models import state_dicts

VARIANTS = ("f5_v0", "f5_v1", "cosyvoice3")
FP8_LAYERS = ("qkv", "out", "ff")
"""A block's matrix products: q, k and v; the attention's output; both of the MLP."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """F5-TTS's text tower: embedding of `vocab` ids and a filler, then ConvNeXtV2 blocks."""

    vocab: int
    dim: int = 512
    layers: int = 4
    mask_padding: bool = True
    """v1 zeroes the filler between blocks; v0 lets it be text like any other."""

    def __post_init__(self) -> None:
        checks.positive_int("vocab", self.vocab)
        checks.positive_int("dim", self.dim)


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """A flow-matching DiT: adaLN blocks over frames, conditions joined at the input.

    The input is `x | prompt | text` with a text tower (F5-TTS), else `x | prompt | mu | spks`
    (CosyVoice3), projected to `dim`.
    """

    dim: int
    depth: int
    heads: int
    head_dim: int = 64
    ff_mult: int = 2
    channels: int = 100
    """Mel channels."""
    text: TextConfig | None = None
    causal_conv: bool = False
    """Position convolutions see the past only (CosyVoice3), else both sides (F5-TTS)."""
    rope_heads: int | None = None
    """How many heads, from the first, carry RoPE; all if None."""
    qk_norm: bool = False
    long_skip: bool = False
    chunk: int = 50
    """Frames per attention block under the streaming mask."""
    mixer: bool = False
    """Whether `r` enters, through `time_embed_mixer` (a mean-velocity student)."""
    mixer_diagonal: float = 1.0
    """D of the mixer's initial `[D 0]`, times the identity."""
    guidance: bool = False
    """Whether `prepare` is told the guidance w (a student that has learnt it for a range)."""
    baked: bool = False
    """Without time embedding, mixer and adaLN weights, for evaluation from step tables only."""
    fp8: tuple[str, ...] = ()
    """Which of `FP8_LAYERS` multiply in FP8, in every block: for inference only."""

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "heads", "head_dim", "ff_mult", "channels", "chunk"):
            checks.positive_int(name, getattr(self, name))
        if self.dim % 16:
            raise ValueError(
                f"dim: expected a multiple of 16 (grouped convolutions), got {self.dim}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number (RoPE), got {self.head_dim}")
        if self.rope_heads is not None and not 0 <= self.rope_heads <= self.heads:
            raise ValueError(f"rope_heads: expected 0 to {self.heads}, got {self.rope_heads}")
        for layer in self.fp8:
            checks.choice("fp8", layer, FP8_LAYERS)
        object.__setattr__(self, "fp8", tuple(self.fp8))  # JSON has lists

    @staticmethod
    def for_variant(variant: str, *, text: TextConfig | None = None, **sizes: Any) -> DiTConfig:
        """The switches of a public family, with `sizes` (dim, depth, heads, ...) as given.

        Args:
            variant: "f5_v0", "f5_v1" or "cosyvoice3". F5's two have identical state dicts, so
                nothing but the caller can tell them apart.
            text: The text tower of an F5 variant; `mask_padding` is set by the variant.

        Raises:
            ValueError: unknown variant, or a text tower where there is none (or none where one is).
        """
        checks.choice("variant", variant, VARIANTS)
        if (text is None) != (variant == "cosyvoice3"):
            wanted = "None" if variant == "cosyvoice3" else "a TextConfig"
            raise ValueError(f"text: expected {wanted} for variant {variant!r}, got {text!r}")
        if text is None:
            switches: dict[str, Any] = {"channels": 80, "causal_conv": True, "rope_heads": 1}
        elif variant == "f5_v0":
            switches = {"text": replace(text, mask_padding=False), "rope_heads": 1}
        else:
            switches = {"text": replace(text, mask_padding=True), "rope_heads": None}
        return DiTConfig(**(switches | sizes))

    @staticmethod
    def from_shapes(
        shapes: state_dicts.Shapes,
        variant: str,
        *,
        heads: int | None = None,
        mixer: bool | None = None,
    ) -> DiTConfig:
        """The sizes of a client's state dict; see `DiT.from_state_dict`."""
        checks.choice("variant", variant, VARIANTS)
        dim, _ = state_dicts.shape(shapes, "time_embed.time_mlp.2.weight", 2)
        inner, _ = state_dicts.shape(shapes, "transformer_blocks.0.attn.to_q.weight", 2)
        _, wide = state_dicts.shape(shapes, "transformer_blocks.0.ff.ff.2.weight", 2)
        channels, _ = state_dicts.shape(shapes, "proj_out.weight", 2)
        text, ids = None, "text_embed.text_embed.weight"
        if variant != "cosyvoice3" or ids in shapes:
            vocab, text_dim = state_dicts.shape(shapes, ids, 2)
            layers = state_dicts.count(shapes, "text_embed.text_blocks.")
            text = TextConfig(vocab=vocab - 1, dim=text_dim, layers=layers)
        heads = heads if heads is not None else max(inner // 64, 1)
        return DiTConfig.for_variant(
            variant,
            text=text,
            dim=dim,
            depth=state_dicts.count(shapes, "transformer_blocks."),
            heads=heads,
            head_dim=inner // heads,
            ff_mult=wide // dim,
            channels=channels,
            qk_norm="transformer_blocks.0.attn.q_norm.weight" in shapes,
            long_skip="long_skip_connection.weight" in shapes,
            mixer=state_dicts.MIXER in shapes if mixer is None else mixer,
            guidance=state_dicts.told_guidance(shapes),
        )

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> DiTConfig:
        """What `asdict` has made of a config, also by way of JSON."""
        text = saved["text"]
        return DiTConfig(**{**saved, "text": None if text is None else TextConfig(**text)})

    @property
    def blocks(self) -> int:
        """Blocks of all kinds."""
        return self.depth + (0 if self.text is None else self.text.layers)


@dataclass(frozen=True, kw_only=True)
class CausalUNetConfig:
    """CosyVoice2's estimator: one level of causal ResNet blocks with transformer blocks after each.

    The input is `x | mu | spks | prompt`. The defaults are the public model's.
    """

    dim: int = 256
    mid_blocks: int = 12
    """ResNet blocks between the first and the last."""
    depth: int = 4
    """Transformer blocks after each ResNet block."""
    heads: int = 8
    head_dim: int = 64
    ff_mult: int = 4
    time_dim: int = 1024
    channels: int = 80
    """Mel channels."""
    chunk: int = 50
    """Frames per attention block under the streaming mask."""
    mixer: bool = False
    """Whether `r` enters, through `time_embed_mixer` (a mean-velocity student)."""
    mixer_diagonal: float = 1.0
    """D of the mixer's initial `[D 0]`, times the identity."""
    guidance: bool = False
    """Whether `prepare` is told the guidance w (a student that has learnt it for a range)."""

    def __post_init__(self) -> None:
        for name in ("dim", "mid_blocks", "depth", "heads", "head_dim", "ff_mult", "time_dim"):
            checks.positive_int(name, getattr(self, name))
        checks.positive_int("channels", self.channels)
        checks.positive_int("chunk", self.chunk)

    @staticmethod
    def from_shapes(
        shapes: state_dicts.Shapes, *, heads: int | None = None, mixer: bool | None = None
    ) -> CausalUNetConfig:
        """The sizes of a client's state dict; see `CausalUNet.from_state_dict`."""
        blocks = "down_blocks.0.1."
        time_dim, _ = state_dicts.shape(shapes, "time_mlp.linear_1.weight", 2)
        channels, dim, _ = state_dicts.shape(shapes, "final_proj.weight", 3)
        inner, _ = state_dicts.shape(shapes, f"{blocks}0.attn1.to_q.weight", 2)
        _, wide = state_dicts.shape(shapes, f"{blocks}0.ff.net.2.weight", 2)
        heads = heads if heads is not None else max(inner // 64, 1)
        return CausalUNetConfig(
            dim=dim,
            mid_blocks=state_dicts.count(shapes, "mid_blocks."),
            depth=state_dicts.count(shapes, blocks),
            heads=heads,
            head_dim=inner // heads,
            ff_mult=wide // dim,
            time_dim=time_dim,
            channels=channels,
            mixer=state_dicts.MIXER in shapes if mixer is None else mixer,
            guidance=state_dicts.told_guidance(shapes),
        )

    @property
    def blocks(self) -> int:
        """Transformer blocks."""
        return (self.mid_blocks + 2) * self.depth
