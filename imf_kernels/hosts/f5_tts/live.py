"""Live objects of F5-TTS: a host on their weights, and patching them in place."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from imf_kernels.hosts.f5_tts.host import F5TTS
from imf_kernels.models import DiT, DiTConfig, TextConfig
from imf_kernels.models.positions import RotaryEmbedding

_PATCH = "_unpatched_by_imf_kernels"
"""A patched object's own transformer, in a tuple that hides it from the module tree."""
_REPLACED = ("sample", "forward", "_original_forward", "_is_accelerate_prepared")
"""What patching changes of an object, and accelerate, in whose mixed precision it was trained."""
_CARRIED = ("mel_spec", "vocab_char_map", "frac_lengths_mask", "audio_drop_prob", "cond_drop_prob")


@torch.inference_mode(False)
def from_host(cfm: Any, *, share: bool = True, **options: Any) -> F5TTS:
    """A host on a live `CFM` with a DiT; variant and sizes are read from it.

    Args:
        cfm: F5-TTS's `CFM`, or a host.
        share: Hold the very same parameters, so that changes of either are seen by both; else
            copies of them.
        options: Of `F5TTS`; mel extraction, vocabulary and drop probabilities come from `cfm`.

    Raises:
        ValueError: an object that is no `CFM`, a transformer that is no F5-TTS DiT (UNetT, MMDiT,
            one with adapters), or one with options that change what is computed, each named.
    """
    missing = [name for name in ("transformer", *_CARRIED) if not hasattr(cfm, name)]
    if missing:
        raise ValueError(
            f"cfm: expected F5-TTS's CFM, got {type(cfm).__name__} without {missing[0]!r}"
        )
    theirs = cfm.transformer
    method = getattr(cfm, "odeint_kwargs", {"method": "euler"}).get("method")
    if method != "euler":
        raise ValueError(f"odeint_kwargs: expected the method 'euler', got {method!r}")
    model = theirs if isinstance(theirs, DiT) else _on_parameters_of(theirs)
    if options.get("upstream_padding") and _masks_attention(_own(cfm)):
        raise ValueError("upstream_padding: expected False for a host with attn_mask_enabled")
    if not share:
        model = copy.deepcopy(model)
    carried = {name: getattr(cfm, name) for name in _CARRIED}
    return F5TTS(model, **(carried | options)).train(cfm.training)


def apply_to(cfm: Any, **options: Any) -> F5TTS:
    """Make a live `CFM` compute as a host does: its `sample`, its `forward`, its transformer.

    It stays the object that it is, with the same parameters under the same names in the same order:
    optimizers, `load_state_dict` and `to` go on working on it, copies and pickles of it are patched
    as well. Applied again it takes the new options, the others being those of the object itself;
    with a wrong one it stays as it is. Before accelerate's `prepare`, not after it.

    Args:
        options: See `from_host`.

    Returns:
        The host that it computes with.

    Raises:
        ValueError: See `from_host`.
    """
    host = from_host(cfm, **options)
    if _PATCH not in vars(cfm):
        weight = host.transformer.proj_out.weight
        replaced = {name: vars(cfm)[name] for name in _REPLACED if name in vars(cfm)}
        vars(cfm.transformer).pop("_cache_local", None)  # of its last thread, and in no copy's way
        setattr(cfm, _PATCH, (cfm.transformer, weight.device, weight.dtype, replaced))
    cfm.transformer = host.transformer
    cfm.sample = host.sample
    cfm.forward = partial(host.forward)  # of a method accelerate would bind the function to `cfm`
    return host


@torch.inference_mode(False)
@torch.no_grad()
def restore(cfm: Any) -> None:
    """Take `apply_to` back; what happened to the weights meanwhile stays.

    Raises:
        ValueError: an object that is not patched, or whose parameters are no longer those of its
            own transformer.
    """
    if _PATCH not in getattr(cfm, "__dict__", {}):
        raise ValueError(
            f"cfm: expected an object that apply_to has patched, got {type(cfm).__name__}"
        )
    theirs, device, dtype, replaced = vars(cfm)[_PATCH]
    ours = cfm.transformer
    _adopt(theirs, ours)
    weight = ours.proj_out.weight
    if (weight.device, weight.dtype) != (device, dtype):
        theirs.to(weight.device, weight.dtype)  # its buffers were not there when the weights moved
    for parameter in theirs.parameters():
        _give_storage_of_its_own(parameter)
    cfm.transformer = theirs.train(ours.training)
    for name in (_PATCH, *_REPLACED):
        vars(cfm).pop(name, None)
    vars(cfm).update(replaced)


def _own(cfm: Any) -> Any:
    """An object's own transformer, whether it is patched or not."""
    return vars(cfm)[_PATCH][0] if _PATCH in vars(cfm) else cfm.transformer


def _on_parameters_of(theirs: nn.Module) -> DiT:
    """Our DiT, holding the very parameters of theirs."""
    config = _config(theirs)
    with torch.device("meta"):
        model = DiT(config)
    _adopt(model, theirs)
    weight = model.proj_out.weight
    model.rotary_embed = RotaryEmbedding(config.head_dim).to(weight.device)
    model.checkpoint_activations = bool(getattr(theirs, "checkpoint_activations", False))
    return model.train(theirs.training)


def _config(theirs: Any) -> DiTConfig:
    """Sizes and switches of a live transformer."""
    try:
        first, tower = theirs.transformer_blocks[0], theirs.text_embed
        if getattr(tower, "average_upsampling", False):
            raise ValueError("text_embedding_average_upsampling: expected False, got True")
        dim, heads = theirs.proj_out.in_features, first.attn.heads
        return DiTConfig(
            dim=dim,
            depth=len(theirs.transformer_blocks),
            heads=heads,
            head_dim=first.attn.to_q.out_features // heads,
            ff_mult=first.ff.ff[2].in_features // dim,
            channels=theirs.proj_out.out_features,
            text=TextConfig(
                vocab=tower.text_embed.num_embeddings - 1,
                dim=tower.text_embed.embedding_dim,
                layers=len(tower.text_blocks) if tower.extra_modeling else 0,
                mask_padding=tower.mask_padding,
            ),
            rope_heads=first.attn.processor.pe_attn_head,
            qk_norm=first.attn.q_norm is not None,
            long_skip=theirs.long_skip_connection is not None,
        )
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError(
            f"transformer: expected F5-TTS's DiT, got {type(theirs).__name__}: {error}"
        ) from error


def _masks_attention(theirs: Any) -> bool:
    """Whether upstream's padded frames are not attended to."""
    if isinstance(theirs, DiT):
        return False
    return bool(getattr(theirs.transformer_blocks[0].attn.processor, "attn_mask_enabled", True))


def _adopt(module: nn.Module, other: nn.Module) -> None:
    """Let a module hold the very parameters of another, by name.

    Raises:
        ValueError: other names, or another shape.
    """
    given, own = dict(other.named_parameters()), dict(module.named_parameters())
    for kind, names in (("missing", own.keys() - given), ("unexpected", given.keys() - own)):
        if names:
            raise ValueError(
                f"transformer: expected F5-TTS's DiT, {kind} parameters: {sorted(names)[:3]}"
            )
    for name, parameter in given.items():
        if parameter.shape != own[name].shape:
            raise ValueError(
                f"transformer: expected {name} of shape {tuple(own[name].shape)}, "
                f"got {tuple(parameter.shape)}"
            )
    for name, parameter in given.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, parameter)


def _give_storage_of_its_own(parameter: Tensor) -> None:
    """Instead of a slice of what this library has laid side by side."""
    if parameter.untyped_storage().nbytes() > parameter.nbytes or not parameter.is_contiguous():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
