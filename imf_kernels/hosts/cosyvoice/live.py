"""Patching a live flow: an object of the host's with a `decoder` that has an `estimator`.

In inference mode, too: what a flow is given is made outside of it, and can be trained later.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from imf_kernels.hosts.cosyvoice.cfm import CFM
from imf_kernels.hosts.cosyvoice.estimator import Estimator, Model
from imf_kernels.models import CausalUNet, DiT

_replaced: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""The decoder that each patched flow came with."""


@torch.inference_mode(False)
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
    return _made(flow, getattr(flow, "decoder", None), options)


@torch.inference_mode(False)
def apply_to(flow: Any, cfm: CFM | None = None, **options: Any) -> CFM:
    """Put a `CFM` in the place of `flow.decoder`; state dicts of the flow keep their keys.

    Args:
        flow: As of `from_host`. One that is patched takes the new options, on its own decoder.
        cfm: What to put there; None: `from_host(flow, **options)`.

    The host's decoder is kept, with its weights, until `restore`. Where no way back is wanted,
    `flow.decoder = from_host(flow)` keeps nothing.

    Raises:
        ValueError: options beside a cfm.
        TypeError: another `cfm`, or what `from_host` raises it for.
    """
    if cfm is not None and not isinstance(cfm, CFM):
        raise TypeError(
            "cfm: expected a CFM (`CFM(student.model, grid=student.grid)`), "
            f"got {type(cfm).__name__}"
        )
    if cfm is not None and options:
        raise ValueError(f"options: expected none beside cfm, got {', '.join(options)}")
    decoder = getattr(flow, "decoder", None)
    if isinstance(decoder, CFM) and flow in _replaced:
        decoder = _following(flow, _replaced[flow])
    flow.decoder = _made(flow, decoder, options) if cfm is None else cfm
    _replaced[flow] = decoder
    return flow.decoder


@torch.inference_mode(False)
def restore(flow: Any) -> None:
    """Give a flow the decoder back that `apply_to` took, with the weights that it had.

    It follows the flow to its device, dtype and mode. What `freeze` did ends.

    Raises:
        ValueError: a flow that `apply_to` has not patched (a deep copy of one).
    """
    decoder = _replaced.pop(flow, None)
    present = getattr(flow, "decoder", None)
    if decoder is None or not isinstance(present, CFM):
        raise ValueError(
            "flow: expected one that apply_to has patched, got "
            f"{type(flow).__name__} with {type(present).__name__}"
        )
    if flow in _frozen:
        _frozen[flow].remove()
    flow.decoder = _following(flow, decoder)


class Frozen:
    """What `freeze` does to a flow, until `remove()`."""

    def __init__(self, flow: Any) -> None:
        rest = [child for child in flow.children() if child is not flow.decoder]
        # of the parts, as some hosts train by another method than the flow's own forward
        self._hooks = [child.register_forward_pre_hook(_in_eval) for child in rest]
        self._before = [(parameter, parameter.requires_grad) for parameter in flow.parameters()]
        flow.requires_grad_(False)
        flow.decoder.estimator.requires_grad_(True)

    def remove(self) -> None:
        """Gradients are required of what they were required of before."""
        for hook in self._hooks:
            hook.remove()
        for parameter, required in self._before:
            parameter.requires_grad_(required)
        self._before.clear()


_frozen: WeakKeyDictionary[Any, Frozen] = WeakKeyDictionary()


def freeze(flow: Any) -> Frozen:
    """Freeze all of a flow but its estimator, for distillation.

    The rest stays in eval whatever the host's trainer does, and keeps no activations: encoders run
    once per batch, without gradients. It ends with `remove()` of what is returned, or `restore`.
    """
    if flow in _frozen:
        _frozen[flow].remove()
    _frozen[flow] = Frozen(flow)
    return _frozen[flow]


def _in_eval(part: nn.Module, arguments: Any) -> None:
    part.eval()


def _following(flow: Any, decoder: Any) -> Any:
    """The decoder, moved to where the flow is and made what it is."""
    first = next(flow.parameters())
    return decoder.to(first.device, first.dtype).train(flow.training)


def _made(flow: Any, decoder: Any, options: dict[str, Any]) -> CFM:
    """A `CFM` of a host's own decoder."""
    if isinstance(decoder, CFM) or not hasattr(decoder, "estimator"):
        raise TypeError(
            "flow: expected one with the host's own decoder, got "
            f"{type(flow).__name__} with {type(decoder).__name__}"
        )
    estimator = _estimator(decoder.estimator)
    meanflow = estimator.model.config.mixer  # Chatterbox steps its own uniformly
    cosine = getattr(decoder, "t_scheduler", "cosine") == "cosine"
    table = getattr(decoder, "rand_noise", None)
    settings: dict[str, Any] = {
        "grid": "cosine" if cosine and not meanflow else "uniform",
        "noise": "drawn" if table is None else table,
        "returns": _returns(decoder),
        "training_times": _training_times(decoder) if cosine else "uniform",
        "streaming": _always_masks(decoder.estimator),
    }
    for name in ("inference_cfg_rate", "training_cfg_rate", "sigma_min"):
        if hasattr(decoder, name):
            settings[name] = getattr(decoder, name)
    return CFM(estimator, **(settings | options)).train(decoder.training)


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


def _always_masks(estimator: Any) -> bool:
    """Before it was told whether it streams, the host's estimator went by its chunk size alone."""
    told = "streaming" in inspect.signature(estimator.forward).parameters
    return not told and getattr(estimator, "static_chunk_size", 0) > 0


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
