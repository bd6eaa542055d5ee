"""Models from the clients' own checkpoint files."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable

from imf_kernels.models import checkpoints, state_dicts
from imf_kernels.models.cosyvoice2 import CausalUNet
from imf_kernels.models.dit import DiT
from imf_kernels.models.state_dicts import MIXER
from imf_kernels.models.students import side_file
from imf_kernels.models.token_encoder import TokenEncoder

TEXT = "text_embed.text_embed.weight"
Name = str | os.PathLike[str]


def load_f5(path: Name, variant: str | None = None, *, ema: bool = True) -> DiT:
    """F5-TTS's DiT, float32 on the CPU; with the mixer, if the file has one.

    Args:
        path: What F5-TTS publishes (`.safetensors`, or `.pt` with `ema_model_state_dict`), what its
            `Trainer` writes, or the bare network; see `checkpoints.read`. Damage to the weights of
            a `.safetensors`, which has no checksums, is not noticed where they stay finite.
        variant: "f5_v0" (F5TTS_Base, F5TTS_Small) or "f5_v1" (F5TTS_v1_Base, F5TTS_v1_Small). Their
            files are alike to the last key, so nothing but the caller can tell them apart.
        ema: The averaged weights of a training file, or those that were trained.

    Raises:
        ValueError, FileNotFoundError: naming the file, and the key with its expected and given
            shape; no variant.
    """
    if variant not in ("f5_v0", "f5_v1"):
        raise ValueError(
            f"variant: expected 'f5_v0' or 'f5_v1' (the file does not tell which), got {variant!r}"
        )
    weights = checkpoints.read(path, ema=ema)
    _expect_whole(path, weights)
    _expect_family(path, weights, "F5-TTS")
    with checkpoints.naming(path):
        ahead = state_dicts.prefix(weights, DiT.root)
        if ahead.startswith("ema_model.") and not ema:
            raise ValueError("ema: expected True for a file of averaged weights, got False")
        others = [name for name in weights if not (name.startswith(ahead) or _is_extra(name))]
        if others:
            raise ValueError(
                f"state_dict: expected keys of F5-TTS, got {state_dicts.few(others)} others"
            )
        return DiT.from_state_dict(weights, variant)


def load_cosyvoice2(path: Name) -> CausalUNet:
    """CosyVoice2's estimator, float32 on the CPU; with the mixer, if the file has one.

    Args:
        path: CosyVoice2's `flow.pt` (whose encoder and other parts are not read here), or the bare
            estimator; see `checkpoints.read`. Also `s3gen_meanflow.safetensors` of Chatterbox
            Turbo, whose estimator is the same network with a mixer of `[e_t, e_r]` in this order,
            in the same time from noise 0 to data 1: a student, published for 2 steps of the
            "uniform" grid without guidance and without streaming.

    Raises:
        ValueError, FileNotFoundError: naming the file, and the key with its expected and given
            shape.
    """
    weights = checkpoints.read(path)
    _expect_whole(path, weights)
    _expect_family(path, weights, "CosyVoice2")
    with checkpoints.naming(path):
        return CausalUNet.from_state_dict(weights)


def load_cosyvoice3(path: Name) -> DiT:
    """CosyVoice3's estimator, float32 on the CPU; with the mixer, if the file has one.

    Args:
        path: CosyVoice3's `flow.pt` (whose encoder and other parts are not read here), or the bare
            estimator; see `checkpoints.read`.

    Raises:
        ValueError, FileNotFoundError: naming the file, and the key with its expected and given
            shape.
    """
    weights = checkpoints.read(path)
    _expect_whole(path, weights)
    _expect_family(path, weights, "CosyVoice3")
    with checkpoints.naming(path):
        return DiT.from_state_dict(weights, "cosyvoice3")


def load_token_encoder(path: Name) -> TokenEncoder:
    """What makes `mu` and `spks` of tokens and speaker embeddings, float32 on the CPU.

    Args:
        path: CosyVoice2's or CosyVoice3's `flow.pt`, or Chatterbox's `s3gen*.safetensors`; see
            `checkpoints.read`. The estimator is not read.

    Raises:
        ValueError, FileNotFoundError: naming the file, and the key with its expected and given
            shape.
    """
    weights = checkpoints.read(path)
    with checkpoints.naming(path):
        return TokenEncoder.from_state_dict(weights)


def _expect_whole(path: Name, weights: Iterable[str]) -> None:
    """A student without what its side file holds would be taken for a teacher, silently."""
    if os.path.exists(side_file(path)) and not any(name.endswith(MIXER) for name in weights):
        raise ValueError(
            f"path: expected a teacher, got a student, which load_student reads: {path}"
        )


def _expect_family(path: Name, weights: Collection[str], wanted: str) -> None:
    """Where the keys tell another of the clients, they are not what to complain of."""
    signs = {"CosyVoice2": CausalUNet.root, "F5-TTS": TEXT, "CosyVoice3": DiT.root}
    looks = [k for k, sign in signs.items() if any(f".{w}".endswith(f".{sign}") for w in weights)]
    found = looks[0] if looks else wanted
    if found != wanted:
        raise ValueError(
            f"{path}: expected a checkpoint of {wanted}, got what looks like {found}'s"
        )


def _is_extra(name: str) -> bool:
    """What F5-TTS's files hold beside the network: counters, and in old ones the mel transform."""
    return name in ("initted", "step") or "mel_spec.mel_stft." in name
