"""Patching a live flow: an object of the host's with a `decoder` that has an `estimator`."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from imf_kernels.hosts.cosyvoice.cfm import CFM
from imf_kernels.hosts.cosyvoice.estimator import Estimator, Model
from imf_kernels.models import CausalUNet, DiT

_replaced: WeakKeyDictionary[CFM, nn.Module] = WeakKeyDictionary()


def from_host(flow: Any, **options: Any) -> CFM:
    """A `CFM` with the weights and settings of a live flow, which stays as it is.

    Args:
        flow: CosyVoice2's, CosyVoice3's or Chatterbox's flow.
        options: Of `CFM`, instead of what the flow says.

    Raises:
        TypeError: an estimator that is no module (TensorRT's), or no flow.
        ValueError: an estimator of another family.
        RuntimeError: weights that do not fit their family.
    """
    decoder: Any = getattr(flow, "decoder", None)
    if isinstance(decoder, CFM) or not hasattr(decoder, "estimator"):
        raise TypeError(
            "flow: expected one with the host's own decoder, got "
            f"{type(flow).__name__} with {type(decoder).__name__}"
        )
    estimator = _estimator(decoder.estimator)
    meanflow = estimator.model.config.mixer  # Chatterbox steps its own uniformly
    cosine = getattr(decoder, "t_scheduler", "cosine") == "cosine"
    settings: dict[str, Any] = {
        "grid": "cosine" if cosine and not meanflow else "uniform",
        "noise": getattr(decoder, "rand_noise", None),
        "returns": _returns(decoder),
        "training_times": _training_times(decoder) if cosine else "uniform",
    }
    for name in ("inference_cfg_rate", "training_cfg_rate", "sigma_min"):
        if hasattr(decoder, name):
            settings[name] = getattr(decoder, name)
    return CFM(estimator, **(settings | options)).train(decoder.training)


def apply_to(flow: Any, cfm: CFM | None = None, **options: Any) -> CFM:
    """Put a `CFM` in the place of `flow.decoder`; state dicts of the flow keep their keys.

    Args:
        flow: As of `from_host`.
        cfm: What to put there; None: `from_host(flow, **options)`.

    The host's decoder is kept, with its weights, until `restore`. Where no way back is wanted,
    `flow.decoder = from_host(flow)` keeps nothing. A flow that is patched already stays as it is.
    """
    present = flow.decoder
    if cfm is None:
        cfm = present if isinstance(present, CFM) and not options else from_host(flow, **options)
    if cfm is not present:
        flow.decoder = cfm
        _replaced[cfm] = _replaced.get(present, present)
    return cfm


def restore(flow: Any) -> None:
    """Give a flow the decoder back that `apply_to` took, with the weights that it had.

    It follows the flow to its device and mode.

    Raises:
        ValueError: a flow that `apply_to` has not patched (a deep copy of one).
    """
    decoder = _replaced.pop(flow.decoder, None)
    if decoder is None:
        raise ValueError(f"flow: expected a patched one, got {type(flow.decoder).__name__} in it")
    device = next(flow.parameters()).device
    flow.decoder = decoder.to(device).train(flow.training)


def freeze(flow: Any) -> RemovableHandle:
    """Freeze all of a flow but its estimator, for distillation.

    The rest stays in eval whatever the host's trainer does, and keeps no activations: encoders run
    once per batch, without gradients. `remove()` of what is returned ends the former.
    """
    flow.requires_grad_(False)
    flow.decoder.estimator.requires_grad_(True)
    return flow.register_forward_pre_hook(_rest_in_eval)


def _rest_in_eval(flow: Any, arguments: Any) -> None:
    for child in flow.children():
        if child is not flow.decoder:
            child.eval()


def _estimator(estimator: Any) -> Estimator:
    if isinstance(estimator, Estimator):
        return estimator
    if not isinstance(estimator, nn.Module):
        raise TypeError(f"estimator: expected a module, got {type(estimator).__name__}")
    state = estimator.state_dict()
    heads: Any = next((m.heads for m in estimator.modules() if hasattr(m, "heads")), None)
    model: Model
    with torch.random.fork_rng(devices=[]):  # initial values are drawn, and overwritten
        if "time_embed.time_mlp.0.weight" in state:
            model = DiT.from_state_dict(state, "cosyvoice3", heads=heads)
        elif "time_mlp.linear_1.weight" in state:
            model = CausalUNet.from_state_dict(state, heads=heads)
        else:
            raise ValueError(
                "estimator: expected CosyVoice2's U-Net or CosyVoice3's DiT, got one with the "
                f"weights {list(state)[:3]}..."
            )
    model.config = replace(model.config, chunk=getattr(estimator, "static_chunk_size", 0) or 50)
    weight = next(estimator.parameters())
    return Estimator(model.to(weight.device, weight.dtype))


def _returns(decoder: Any) -> str:
    """Since the host's forward knows a cache, or streaming, it returns a tuple."""
    forwards = [vars(cls)["forward"] for cls in type(decoder).__mro__ if "forward" in vars(cls)]
    known = {name for forward in forwards for name in inspect.signature(forward).parameters}
    return "tuple" if known & {"cache", "flow_cache", "streaming"} else "tensor"


def _training_times(decoder: Any) -> str:
    """Earlier versions of the host's loss look at the scheduler for t, too."""
    loss: Any = getattr(type(decoder), "compute_loss", None)
    code = getattr(inspect.unwrap(loss), "__code__", None)
    names = code.co_names if code is not None else ()
    return "cosine" if "t_scheduler" in names else "uniform"
