"""Several ranks: how they meet, and how a student and its tensors are spread over them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from imf_kernels.distill.optimization import fuse_weights


def connect(timeout: float = 30.0) -> Any:
    """The process's `accelerate.Accelerator`: its device, rank and number of ranks.

    Ranks are those of `torchrun` or `accelerate launch`. Called again, it finds the same ones. Its
    precision is left alone, which is one for all that a process does: a trainer has its own.

    Args:
        timeout: Minutes after which a collective that a rank does not join is an error.

    Raises:
        ImportError: accelerate is not installed.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs
    except ImportError as error:
        raise ImportError(
            "the trainer needs accelerate: pip install '.[train]', or use "
            "`imf_kernels.distill.distill`, which needs torch alone"
        ) from error
    group = InitProcessGroupKwargs(timeout=timedelta(minutes=timeout))
    on_cpu = not torch.cuda.is_available()
    return Accelerator(cpu=on_cpu, kwargs_handlers=[group])


class Spread:
    """A student on this rank's device, and on all ranks.

    `outer` is what objectives evaluate: the student, or DistributedDataParallel around it. The
    latter is built here and not by `Accelerator.prepare`, which would also put autocast into the
    student's own forward, where no objective could switch it off (forward-mode AD has to). And
    `fully_shard` is called here: accelerate does it on CUDA alone, and by module classes that are
    wrapped whole, while here a block's modulation is read from outside of the block.
    """

    def __init__(self, student: nn.Module, accelerator: Any, parallel: str) -> None:
        self.student: Any = student.to(accelerator.device)
        self.outer: Any = student
        self.sharded = parallel == "fsdp2" and accelerator.num_processes > 1
        if self.sharded:
            _shard(student, accelerator.device)
            return
        fuse_weights(student)
        if accelerator.num_processes > 1:
            self.outer = _data_parallel(student, accelerator.device)

    @contextlib.contextmanager
    def accumulating(self, more: bool) -> Iterator[None]:
        """Whether more gradients are to come before the ranks exchange them."""
        if self.sharded:
            self.student.set_requires_gradient_sync(not more)
        elif more and self.outer is not self.student:
            with self.outer.no_sync():
                yield
            return
        yield

    def reshard(self) -> None:
        """Free what an evaluation without gradient has gathered: only parts are ever written."""
        if self.sharded:
            for module in self.student.modules():
                if hasattr(module, "reshard"):
                    module.reshard()


def _data_parallel(student: nn.Module, device: torch.device) -> nn.Module:
    wrapper = nn.parallel.DistributedDataParallel
    options: dict[str, Any] = {"gradient_as_bucket_view": True}
    newer = "forward_sync_buffers" in inspect.signature(wrapper).parameters  # from torch 2.13 on
    options["forward_sync_buffers" if newer else "broadcast_buffers"] = False  # they are constants
    if device.type == "cuda":
        options["device_ids"] = [device]
    return wrapper(student, **options)


def _shard(student: Any, device: torch.device) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for tensor in (*student.parameters(), *student.buffers()):
        dist.broadcast(tensor.detach(), src=0)  # each rank shards its own
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in student.shards() if hasattr(student, "shards") else ():
        fully_shard(part, mesh=mesh)
    fully_shard(student, mesh=mesh)
    register_fsdp_forward_method(student, "prepare")
    if hasattr(student, "keep_weights_apart"):
        student.keep_weights_apart()


# -- tensors of which each rank has a part --------------------------------------------------------


def local(tensor: Any) -> Tensor:
    """This rank's part, in the same memory."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gathered(tensor: Any, keep: bool = True) -> Tensor | None:
    """The whole on the CPU, a copy; all ranks call it, those that `keep` it get it."""
    tensor = tensor.detach()
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.to("cpu", copy=True).contiguous() if keep else None


def scattered(whole: Tensor, like: Any) -> Tensor:
    """A copy of `whole`, which every rank has, spread as `like` is."""
    whole = whole.to(like.device, copy=True)
    if not hasattr(like, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


# -- small things from every rank -----------------------------------------------------------------


def from_all(value: Any) -> list[Any]:
    """Every rank's `value`, by rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
