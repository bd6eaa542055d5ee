"""SIM-o: speaker similarity to the original prompt, by WavLM-large and ECAPA-TDNN.

The network behind the field's tables (Seed-TTS-eval, F5-TTS): all hidden states of a fine-tuned
WavLM-large, weighted, through an ECAPA-TDNN. WavLM is `transformers`' here, and the checkpoint's
names, which are s3prl's, are translated.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imf_kernels.metrics.ecapa import ECAPA
from imf_kernels.metrics.speakers import Similarity
from imf_kernels.metrics.weights import existing
from imf_kernels.models import state_dicts

UPSTREAM = "feature_extract.model."
UNUSED = ("mask_emb", "final_proj", "label_embs_concat", "loss_calculator")
"""What a checkpoint has of its training only."""

LAYER = {
    "self_attn.grep_linear": "attention.gru_rel_pos_linear",
    "self_attn.grep_a": "attention.gru_rel_pos_const",
    "self_attn.relative_attention_bias": "attention.rel_attn_embed",
    "self_attn_layer_norm": "layer_norm",
    "self_attn": "attention",
    "fc1": "feed_forward.intermediate_dense",
    "fc2": "feed_forward.output_dense",
}
NAMES = {
    r"feature_extractor\.conv_layers\.(\d+)\.0\.": r"feature_extractor.conv_layers.\1.conv.",
    r"feature_extractor\.conv_layers\.(\d+)\.2\.1\.": (
        r"feature_extractor.conv_layers.\1.layer_norm."
    ),
    r"feature_extractor\.conv_layers\.0\.2\.(?=\D)": "feature_extractor.conv_layers.0.layer_norm.",
    r"layer_norm\.": "feature_projection.layer_norm.",
    r"post_extract_proj\.": "feature_projection.projection.",
    r"encoder\.pos_conv\.0\.weight_g": (
        "encoder.pos_conv_embed.conv.parametrizations.weight.original0"
    ),
    r"encoder\.pos_conv\.0\.weight_v": (
        "encoder.pos_conv_embed.conv.parametrizations.weight.original1"
    ),
    r"encoder\.pos_conv\.0\.bias": "encoder.pos_conv_embed.conv.bias",
} | {
    rf"encoder\.layers\.(\d+)\.{re.escape(theirs)}(?![a-z_])": rf"encoder.layers.\1.{ours}"
    for theirs, ours in LAYER.items()
}
"""s3prl's names of WavLM's weights to `transformers`'; those not here are the same."""


def sim_o(weights: str | os.PathLike[str], device: torch.device | str = "cpu") -> Similarity:
    """Speaker similarity as the field computes it, float32.

    Clips are resampled by `read_audio` (soxr, where F5-TTS has torchaudio's windowed sinc).

    Args:
        weights: Seed-TTS-eval's `wavlm_large_finetune.pth`, or another size of the same network.
        device: Where it runs.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a checkpoint; the error names what is missing, unexpected or misshapen.
    """
    path = existing("sim_o", weights)
    held = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(held, dict) or not isinstance(held.get("model"), dict):
        raise ValueError(f"metric 'sim_o': expected a checkpoint with weights in 'model': {path}")
    return Similarity(Embedder.from_state_dict(held["model"]).to(device), device)


class Embedder(nn.Module):
    """Clips `(B, samples)` of equal length, float32 at 16 kHz, to speaker embeddings `(B, D)`."""

    def __init__(self, wavlm: nn.Module, head: ECAPA, *, normalize: bool) -> None:
        super().__init__()
        self.wavlm, self.head, self.normalize = wavlm, head, normalize

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> Embedder:
        """Of a checkpoint's `model` entry, whose shapes tell the sizes.

        Raises:
            ValueError: missing, unexpected or misshapen weights.
        """
        used = {k: v for k, v in state_dict.items() if not any(name in k for name in UNUSED)}
        upstream = {k.removeprefix(UPSTREAM): v for k, v in used.items() if k.startswith(UPSTREAM)}
        head = {k: v for k, v in used.items() if not k.startswith(UPSTREAM)}
        config = _config({name: tuple(value.shape) for name, value in upstream.items()})
        wavlm = _wavlm(config, {_renamed(name): value for name, value in upstream.items()})
        return cls(
            wavlm, ECAPA.from_state_dict(head), normalize=config.feat_extract_norm == "layer"
        ).eval()

    def forward(self, clips: Tensor) -> Tensor:
        if self.normalize:
            clips = F.layer_norm(clips, clips.shape[1:])
        out = self.wavlm(clips, output_hidden_states=True)
        # the last state has been through the encoder's final norm, which not every version applies
        states = torch.stack((*out.hidden_states[:-1], out.last_hidden_state))
        return self.head(states.transpose(-1, -2))


def _renamed(name: str) -> str:
    for theirs, ours in NAMES.items():
        renamed, found = re.subn(rf"^{theirs}", ours, name)
        if found:
            return renamed
    return name


def _config(shapes: state_dicts.Shapes) -> Any:
    """A `WavLMConfig`. Strides are no shapes: those of every WavLM; so are the buckets' 800."""
    from transformers import WavLMConfig

    convs = [
        state_dicts.shape(shapes, f"feature_extractor.conv_layers.{layer}.0.weight", 3)
        for layer in range(state_dicts.count(shapes, "feature_extractor.conv_layers."))
    ]
    width, per_group, taps = state_dicts.shape(shapes, "encoder.pos_conv.0.weight_v", 3)
    first = "encoder.layers.0."
    buckets, heads = state_dicts.shape(
        shapes, f"{first}self_attn.relative_attention_bias.weight", 2
    )
    large = "feature_extractor.conv_layers.0.2.1.weight" in shapes
    return WavLMConfig(
        hidden_size=width,
        num_hidden_layers=state_dicts.count(shapes, "encoder.layers."),
        num_attention_heads=heads,
        intermediate_size=state_dicts.shape(shapes, f"{first}fc1.weight", 2)[0],
        conv_dim=[conv[0] for conv in convs],
        conv_kernel=[conv[2] for conv in convs],
        conv_stride=[5, *[2] * (len(convs) - 1)],
        conv_bias="feature_extractor.conv_layers.0.0.bias" in shapes,
        feat_extract_norm="layer" if large else "group",
        do_stable_layer_norm=large,
        num_conv_pos_embeddings=taps,
        num_conv_pos_embedding_groups=width // per_group,
        num_buckets=buckets,
        max_bucket_distance=800,
        apply_spec_augment=False,
        mask_time_prob=0.0,
    )


def _wavlm(config: Any, weights: Mapping[str, Tensor]) -> nn.Module:
    from transformers import WavLMModel

    model = WavLMModel(config)
    expected = {k: v for k, v in model.state_dict().items() if k != "masked_spec_embed"}
    state_dicts.check(expected, weights)
    model.load_state_dict(weights, strict=False)
    return model
