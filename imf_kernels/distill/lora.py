"""LoRA through `peft`: adapters on a student's attention and MLP, its mixer trained in full.

For cards of 24 GB: gradients, optimizer state and EMA are those of the adapters and the mixer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from imf_kernels import checks
from imf_kernels.models import TimeEmbedMixer
from imf_kernels.models.estimator import Estimator
from imf_kernels.models.time_embedding import GuidanceEmbedding

Student = TypeVar("Student", bound=nn.Module)

TARGETS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ff.ff.0.0", "ff.ff.2", "ff.net.0.proj", "ff.net.2"),
}
"""How the layers of this library's models are called that are called, not read."""


def add_lora(
    student: Student,
    rank: int = 16,
    alpha: int | None = None,
    targets: Sequence[str] = ("attention", "feed_forward"),
) -> Student:
    """Put adapters on a student's linear layers, in place, and freeze all else but the mixer.

    An adapter starts as zero: the student computes what it did. Its state dict holds the base
    weights and the adapters; `merge_lora` makes a plain student of it.

    Args:
        student: With a `TimeEmbedMixer`; one of this library, or your own.
        rank: Of the adapters.
        alpha: An adapter counts `alpha / rank`; None: 1.
        targets: "attention" and "feed_forward"; or, of your own student, the ends of its linear
            layers' names.

    Raises:
        ValueError: naming the argument; a student without mixer, or that has adapters.
        ImportError: without `peft`.
    """
    checks.positive_int("rank", rank)
    if alpha is not None:
        checks.positive_int("alpha", alpha)
    if not targets:
        raise ValueError(f"targets: expected one or more, got {targets!r}")
    if adapters(student):
        raise ValueError("student: expected one without adapters, got some")
    if not any(isinstance(module, TimeEmbedMixer) for module in student.modules()):
        raise ValueError(f"student: expected one with a mixer, got {type(student).__name__}")
    if isinstance(student, Estimator):  # of which other layers' weights are read
        for target in targets:
            checks.choice("targets", target, tuple(TARGETS))
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("lora: pip install '.[lora]' (peft)") from error
    ends = [end for target in targets for end in TARGETS.get(target, (target,))]
    config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=ends)
    inject_adapter_in_model(config, student)
    for module in student.modules():  # what a teacher has not
        if isinstance(module, TimeEmbedMixer | GuidanceEmbedding):
            module.requires_grad_(True)
    return student


def merge_lora(student: Student) -> Student:
    """A plain copy of a student with adapters, these added to its weights; in eval mode.

    Its modules and state dict are those of a student that has never had adapters.

    Raises:
        ValueError: a student without adapters.
    """
    if not adapters(student):
        raise ValueError("student: expected one with adapters, got none")
    merged = copy.deepcopy(student)
    for name in adapters(merged):
        layer: Any = merged.get_submodule(name)
        layer.merge(safe_merge=True)
        merged.set_submodule(name, layer.get_base_layer())
    for leftover in ("peft_config", "_hf_peft_config_loaded"):
        if hasattr(merged, leftover):
            delattr(merged, leftover)
    return merged.eval()


def adapters(student: nn.Module) -> list[str]:
    """The names of the layers that have one."""
    return [name for name, module in student.named_modules() if hasattr(module, "lora_A")]
