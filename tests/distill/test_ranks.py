"""Two processes: they train as one, save as one and fail as one."""

import json
import math
import os
import signal
from functools import partial

import pytest
import torch

from imf_kernels import Teacher
from imf_kernels.distill import saves, stops
from tests.distill.ranks import launch
from tests.distill.tools import (
    Records,
    batches,
    close,
    objective,
    read,
    real_batches,
    same,
    saved,
    trainer,
)
from tests.objectives.tools import Small, real_student


def dit_run(folder, rank=0, ranks=1, updates=3, name="f5_v1", callbacks=(), **options):
    student, made = real_student(name, **({} if name == "unet" else {"depth": 1})), objective()
    made.teacher = Teacher(real_student(name, **({} if name == "unet" else {"depth": 1})), 2.0)
    source = real_batches(student, rank, ranks)
    options = {"ema_decay": 0.5, "lr": 1e-3, "save_every": 100} | options
    return trainer(folder, updates, student, made, source, callbacks, **options)


def train(rank, folder, ranks=2, **options):
    records = Records()
    dit_run(folder, rank, ranks, callbacks=[records], **options).run()
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records.records]


@pytest.mark.parametrize(
    ("parallel", "name"), [("ddp", "f5_v1"), ("fsdp2", "f5_v1"), ("fsdp2", "unet")]
)
def test_two_processes_train_as_one(tmp_path, parallel, name):
    """That takes the batches of both: with the same random draws."""
    want = train(0, tmp_path / "one", ranks=1, name=name, accumulate=4)
    got = launch(partial(train, parallel=parallel, name=name, accumulate=2), tmp_path / "two")
    assert got[0] == got[1]
    for mine, other in zip(got[0], want, strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    for part in ("model", "ema"):
        close(read(tmp_path / "two", 3, part), read(tmp_path / "one", 3, part))
    assert all(read(tmp_path / "two", 3, "optimizer")[k].shape == v.shape
               for k, v in read(tmp_path / "one", 3, "optimizer").items())  # fmt: skip


def interrupted(rank, folder, **options):
    """Both stop because one is asked to."""

    class Ask:
        def started(self, trainer):
            if rank == 1:
                signal.raise_signal(signal.SIGTERM)

    dit_run(folder, rank, 2, callbacks=[Ask()], **options).run()


class Evaluate:
    """What a validation does between updates, which must not leave a trace."""

    def updated(self, run, record):
        with torch.no_grad():
            batch = next(real_batches(run.student)(0))
            cond = run.student.prepare(lengths=batch.lengths, **batch.conditions)
            t = torch.zeros(2)
            before = run.student(batch.x1, t, t + 1, cond)
            with run.averaged():
                cond = run.student.prepare(lengths=batch.lengths, **batch.conditions)
                averaged = run.student(batch.x1, t, t + 1, cond)
            cond = run.student.prepare(lengths=batch.lengths, **batch.conditions)
            assert torch.equal(run.student(batch.x1, t, t + 1, cond), before)
            assert run.update < 2 or not torch.equal(averaged, before)


def whole(rank, folder, **options):
    dit_run(folder, rank, 2, callbacks=[Evaluate()], **options).run()


@pytest.mark.parametrize("options", [{}, {"parallel": "fsdp2", "precision": "bf16"}])
def test_two_processes_go_on_to_the_bit(tmp_path, options):
    assert launch(partial(whole, **options), tmp_path / "whole") == [None, None]
    stopped = launch(partial(interrupted, **options), tmp_path / "parts")
    for answer, name in zip(stopped, ("another rank's signal", "SIGTERM"), strict=True):
        assert answer.startswith(f"Stopped: {name}: stopped after update 1, saved in")
    assert saved(tmp_path / "parts") == ["step_00000001"]
    launch(partial(train, **options), tmp_path / "parts")
    for part in ("model", "ema", "optimizer"):
        assert same(read(tmp_path / "parts", 3, part), read(tmp_path / "whole", 3, part)), part


def test_a_sharded_run_goes_on_in_one_process(tmp_path):
    launch(partial(train, parallel="fsdp2", updates=2, decay="constant"), tmp_path)
    one = dit_run(tmp_path, 0, 1, updates=2, decay="constant", parallel="ddp")
    with pytest.warns(UserWarning, match="ranks: the run was begun with 2 and goes on with 1"):
        student = one.run()
    average = read(tmp_path, 2, "ema")
    assert average.keys() <= student.state_dict().keys()
    assert all(torch.equal(student.state_dict()[name], value) for name, value in average.items())
    with pytest.warns(UserWarning, match="ranks"):
        dit_run(tmp_path, 0, 1, updates=3, decay="constant").run()
    assert saves.newest(tmp_path / "checkpoints").name == "step_00000003"


# -- one error ------------------------------------------------------------------------------------


def fail(rank, folder, accumulate):
    def source(start):
        for position, batch in enumerate(batches(start, rank, 2), start):
            if rank == 1 and position == 3:
                raise ValueError("broken.wav: expected 24000 Hz, got 8000")
            yield batch

    trainer(folder, 8, source=source, accumulate=accumulate).run()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_rank_that_fails_ends_all_with_its_error(tmp_path, accumulate):
    error = "ValueError: broken.wav: expected 24000 Hz, got 8000"
    assert launch(fail, tmp_path, accumulate) == [f"RankFailed: rank 1 failed: {error}", error]
    assert json.loads((tmp_path / "failed_rank1.json").read_text()) == {"rank": 1, "error": error}


def vanish(rank, folder):
    class Kill:
        def updated(self, trainer, record):
            if rank == 1 and record["update"] == 2:
                os._exit(0)

    stops.PATIENCE = 0.5
    source = partial(batches, rank=rank, ranks=2)
    trainer(folder, 8, source=source, callbacks=[Kill()]).run()


def test_a_rank_that_vanishes_ends_the_others(tmp_path):
    (lost,) = launch(vanish, tmp_path, answering=1)
    assert lost.startswith("ConnectionError: a rank has gone without a word")


def spoil(rank, folder):
    calls = []

    def made(student, batch):
        calls.append(rank)
        loss, info = objective()(student, batch)
        return loss * (math.nan if rank == 1 and len(calls) > 1 else 1.0), info

    records = Records()
    try:
        source = partial(batches, rank=rank, ranks=2)
        trainer(folder, 8, made=made, source=source, max_bad=2, callbacks=[records]).run()
    finally:
        assert [r["skipped"] for r in records.records] == [0, 1]


@pytest.mark.filterwarnings("ignore:update .* skipped")
def test_a_bad_batch_of_one_rank_is_bad_for_all(tmp_path):
    first, second = launch(spoil, tmp_path)
    assert first.startswith("FloatingPointError: update 3: loss nan; 2 bad updates in a row")
    assert second == f"RankFailed: rank 0 failed: {first}"
    told = json.loads((tmp_path / "reports" / "bad_00000003.json").read_text())
    assert [batch["rank"] for batch in told["batches"]] == [0, 1]
    assert [math.isnan(batch["loss"]) for batch in told["batches"]] == [False, True]


class Keeping:
    """An objective that each rank keeps something of its own of."""

    def __init__(self, rank):
        self.own = torch.tensor([float(rank)])

    def __call__(self, student, batch):
        self.own = self.own + 10
        return objective()(student, batch)

    def state_dict(self):
        return {"own": self.own, "half": float(self.own) / 2}

    def load_state_dict(self, state):
        assert state["half"] == float(state["own"]) / 2
        self.own = state["own"]


def keep(rank, folder, updates, start):
    made = Keeping(start + rank)
    trainer(folder, updates, made=made, decay="constant").run()
    return float(made.own)


def full(rank, folder):
    """The disk of one rank is."""
    own = saves.write

    def write(path, fill):
        if rank == 1 and "00000008" in str(path):
            raise OSError(28, "No space left on device")
        return own(path, fill)

    saves.write = write
    return keep(rank, folder, 8, 0)


def test_what_an_objective_keeps_is_each_ranks_own(tmp_path):
    assert launch(keep, tmp_path, 4, 0) == [40.0, 41.0]
    first, second = launch(full, tmp_path)
    assert second.startswith("OSError: [Errno 28] No space left on device, writing the checkpoint")
    assert first == f"RankFailed: rank 1 failed: {second}"
    assert saved(tmp_path) == ["step_00000004"]
    assert launch(keep, tmp_path, 8, 500) == [80.0, 81.0]


def test_settings_are_refused_once(tmp_path):
    trainer(tmp_path, 2).run()
    first, second = launch(keep, tmp_path, 2, 0)
    assert first.startswith("ValueError: decay: expected 'cosine'")
    assert second == f"RankFailed: rank 0 failed: {first}"


def test_students_begin_alike(tmp_path):
    """As on the first rank, however each rank made its own."""
    for parallel in ("ddp", "fsdp2"):
        launch(differing, tmp_path / parallel, parallel)
        got = read(tmp_path / parallel, 1, "model")
        close(got, {name: p.detach() for name, p in Small().named_parameters()}, rtol=1e-5)


def differing(rank, folder, parallel):
    student = Small()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(rank)
    trainer(folder, 1, student, lr=1e-12, weight_decay=0.0, parallel=parallel).run()
