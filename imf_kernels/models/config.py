"""The sizes and switches that tell the model families apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from imf_kernels import checks

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
    """How many heads, from the first, carry RoPE; None: all."""
    qk_norm: bool = False
    long_skip: bool = False
    chunk: int = 50
    """Frames per attention block under the streaming mask."""
    mixer: bool = False
    """Whether `r` enters, through `time_embed_mixer` (a mean-velocity student)."""
    mixer_diagonal: float = 1.0
    """D of the mixer's initial `[D 0]`, times the identity."""
    baked: bool = False
    """Without time embedding, mixer and adaLN weights: evaluated from step tables only."""
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

    def __post_init__(self) -> None:
        for name in ("dim", "mid_blocks", "depth", "heads", "head_dim", "ff_mult", "time_dim"):
            checks.positive_int(name, getattr(self, name))
        checks.positive_int("channels", self.channels)
        checks.positive_int("chunk", self.chunk)
