"""What two processes run for tests/objectives/test_all.py."""

from __future__ import annotations

import copy
import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from imf_kernels import DSFlow, IntMeanFlow, MeanFlow, SplitMeanFlow, Teacher
from imf_kernels.models import StepTokenDiT
from tests.objectives.tools import real_batch, real_student, seeded


def objectives(teacher, seed):
    """One of each by name, cheap."""
    return {
        "IntMeanFlow": IntMeanFlow(teacher, nfe=2, generator=seeded(seed)),
        "SplitMeanFlow": SplitMeanFlow(teacher, generator=seeded(seed)),
        "DSFlow": DSFlow(teacher, nfe=4, p_uncond=0.5, generator=seeded(seed)),
        "MeanFlow": MeanFlow(teacher, generator=seeded(seed)),
        "MeanFlow, difference": MeanFlow(derivative="difference", generator=seeded(seed)),
    }


def data_parallel(student):
    return DistributedDataParallel(student)


def sharded(student):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in student.transformer_blocks:
        fully_shard(block.attn, mesh=mesh)
        fully_shard(block.ff, mesh=mesh)
    fully_shard(student, mesh=mesh)
    register_fsdp_forward_method(student, "prepare")
    return student


def train(student, mean_loss):
    """The weights after two updates: the second sees whether the first reached every evaluation."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        mean_loss(student).backward()
        optimizer.step()
    weights = [getattr(p, "full_tensor", p.detach)().detach() for p in student.parameters()]
    return torch.cat([weight.flatten() for weight in weights])


def work(rank, rendezvous):
    """Both train on a batch of their own; the first also on the mean over both, alone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    compare(rank)
    gc.collect()  # whatever holds the process group
    dist.barrier()
    dist.destroy_process_group()


def cases(model):
    """By name a student, and its objective for a seed."""
    teacher = Teacher(model, 2.0)
    told, steps = model.student(guidance=True), StepTokenDiT.of(model, (1, 2), 2)
    for k, parameters in enumerate((told.guidance_embed.parameters(), [steps.step_tokens])):
        for parameter in parameters:
            nn.init.normal_(parameter, std=0.1, generator=seeded(k))

    def drawn(seed):
        return IntMeanFlow(teacher, nfe=2, guidance=(1.0, 4.0), generator=seeded(seed))

    def counted(seed):
        options = {"nfe": 2, "counts": (1, 2), "p_uncond": 0.5, "steps": "steps"}
        return DSFlow(teacher, **options, generator=seeded(seed))

    plain = {
        name: (model, lambda seed, name=name: objectives(teacher, seed)[name])
        for name in objectives(teacher, 0)
    }
    return plain | {"told its guidance": (told, drawn), "step tokens": (steps, counted)}


def compare(rank):
    model = real_student("f5_v1", depth=1)
    batches = [real_batch(model, lengths) for lengths in ((7, 4), (5, 6))]
    for name, (student, make) in cases(model).items():
        pairs = [(make(seed), batch) for seed, batch in enumerate(batches)]
        before = torch.cat([p.detach().flatten() for p in student.parameters()])

        def alone(student, pairs=pairs):
            return sum(objective(student, batch)[0] for objective, batch in pairs) / 2

        want = train(copy.deepcopy(student), alone) if rank == 0 else before
        for wrap in (data_parallel, sharded):
            objective, batch = make(rank), batches[rank]
            wrapped = wrap(copy.deepcopy(student))
            got = train(wrapped, lambda student, o=objective, b=batch: o(student, b)[0])
            if rank == 0:
                error = float((got - want).norm() / (want - before).norm())
                assert error < 1e-4, f"{name}, {wrap.__name__}: {error}"
