"""A run that goes on from an objective's state equals one that was never interrupted."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from imf_kernels import Batch, DSFlow, IntMeanFlow, Teacher
from imf_kernels.objectives import RolloutCache
from tests.flows import FLOWS
from tests.objectives import ranks
from tests.objectives.tools import Scale, batch, real_batch, real_student, seeded


def saved_and_loaded(state, folder):
    """By way of safetensors and JSON, as a checkpoint keeps it."""
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    save_file(tensors, folder / "state.safetensors")
    plain = json.dumps({k: v for k, v in state.items() if k not in tensors})
    return load_file(folder / "state.safetensors") | json.loads(plain)


def losses(objective, student, material, calls):
    return [float(objective(student, material)[0].detach()) for _ in range(calls)]


@pytest.mark.parametrize("name", ranks.objectives(None, 0))
def test_goes_on_to_the_bit(name, tmp_path):
    teacher, material = Teacher(FLOWS["gaussian"]), batch()
    whole, before, after = (ranks.objectives(teacher, seed)[name] for seed in (0, 0, 1))
    student = Scale(torch.float64)
    want = losses(whole, student, material, 7)
    assert losses(before, student, material, 4) == want[:4]
    after.load_state_dict(saved_and_loaded(before.state_dict(), tmp_path))
    assert losses(after, student, material, 3) == want[4:]
    assert after.state_dict().keys() == whole.state_dict().keys()
    other = ranks.objectives(teacher, 1)[name]
    assert losses(other, student, material, 3) != want[4:]


def cached(teacher, seed, capacity=3):
    generator = seeded(seed)  # one for both
    cache = RolloutCache(capacity, refresh=0.3, generator=generator)
    return IntMeanFlow(teacher, nfe=3, targets=2, cache=cache, generator=generator)


def test_a_cache_goes_on_with_its_rollouts_and_their_batches(tmp_path):
    student = real_student("f5_v1", depth=1)
    teacher = Teacher(student, 2.0)
    batches = [real_batch(student, (7, n), packed=bool(n % 2), streaming=True) for n in range(1, 9)]
    given = batches[2]
    batches[2] = Batch(given.x1, given.lengths, given.conditions, given.valid())

    def run(objective, some):
        return [float(objective(student, item)[0].detach()) for item in some]

    want = run(cached(teacher, 0), batches)
    for stop in (0, 2, 5):
        before, after = cached(teacher, 0), cached(teacher, 1)
        assert run(before, batches[:stop]) == want[:stop]
        after.load_state_dict(saved_and_loaded(before.state_dict(), tmp_path))
        assert len(after.cache) == min(stop, 3)
        assert run(after, batches[stop:]) == want[stop:]


def test_conditions_of_any_kind_come_back():
    rows = [torch.arange(3.0), torch.arange(5.0)]
    said = {"mel": rows, "sub": {"part": {"a": True}}, "count": 3, "name": "x", "left_out": None}
    material = Batch(torch.randn(2, 4, 1), torch.tensor([4, 2]), said)
    objective = cached(Teacher(FLOWS["gaussian"]), 0, capacity=1)
    objective.teacher = Teacher(TakesAll())
    objective.rollout(material)
    objective.cache.add(objective.rollout(material))
    after = cached(objective.teacher, 0, capacity=1)
    after.load_state_dict(objective.state_dict())
    back = after.cache.deal(torch.device("cpu")).batch
    assert torch.equal(back.x1, material.x1)
    assert back.loss_mask is None
    got = dict(back.conditions)
    assert all(map(torch.equal, got.pop("mel"), rows))
    assert got == {"sub": {"part": {"a": True}}, "count": 3, "name": "x"}
    assert got["sub"]["part"]["a"] is True


class TakesAll:
    def prepare(self, lengths, guided=False, **conditions):
        return {"lengths": lengths}

    def __call__(self, x, t, r, cond):
        return x


def test_a_state_holds_copies():
    objective = cached(Teacher(FLOWS["gaussian"]), 0)
    material = batch()
    losses(objective, Scale(torch.float64), material, 3)
    state = objective.state_dict()
    storages = [v.untyped_storage().data_ptr() for v in state.values() if hasattr(v, "storage")]
    assert len(set(storages)) == len(storages) >= 20
    assert material.x1.untyped_storage().data_ptr() not in storages


def test_without_a_generator_there_is_nothing_to_remember():
    objective = IntMeanFlow(Teacher(FLOWS["gaussian"]))
    assert objective.state_dict() == {}
    objective.load_state_dict({})


def test_states_of_other_objectives_are_refused():
    teacher = Teacher(FLOWS["gaussian"])
    plain, drawn = IntMeanFlow(teacher), IntMeanFlow(teacher, generator=seeded())
    many = cached(teacher, 0)
    losses(many, Scale(torch.float64), batch(), 3)
    for objective, state in [
        (plain, drawn.state_dict()),
        (drawn, {}),
        (drawn, many.state_dict()),
        (many, drawn.state_dict()),
        (cached(teacher, 0, capacity=2), many.state_dict()),
        (DSFlow(teacher), {}),
        (DSFlow(teacher), {"calls": 2, "other": 1}),
    ]:
        with pytest.raises(ValueError, match="state: expected"):
            objective.load_state_dict(state)
