"""Training: what an update is, and what it is told."""

import itertools
import math

import pytest
import torch

from imf_kernels import Batch, DSFlow, Teacher, seeds
from imf_kernels.distill import Settings, distill, schedule
from tests.distill.tools import (
    Affine,
    Records,
    batches,
    objective,
    pull,
    real_batches,
    same,
    trainer,
    weights,
)
from tests.flows import Linear
from tests.objectives.tools import Small, real_student


def test_equals_the_plain_loop(tmp_path):
    """Which is seeded here as the trainer seeds."""

    def source():
        for position, batch in enumerate(batches()):
            torch.manual_seed(seeds.seed(0, position))
            yield batch

    options = {"lr": 0.01, "warmup": 2, "clip": 0.5, "weight_decay": 0.1, "ema_decay": 0.9}
    want = distill(Small(), objective(), source(), 6, **options)
    student = Small()
    assert trainer(tmp_path, 6, student, **options).run() is student
    assert not student.training
    assert same(weights(student), weights(want))


def test_callbacks_and_records(tmp_path):
    records = Records()
    run = trainer(tmp_path, 5, save_every=2, warmup=2, accumulate=3, callbacks=[object(), records])
    run.run()
    saves = [("saved", f"step_{update:08d}") for update in (2, 4, 5)]
    assert records.told == [("started", 0), ("begun", 0), *saves, ("ended", 5)]
    assert [record["update"] for record in records.records] == [1, 2, 3, 4, 5]
    assert [r["lr"] for r in records.records] == [0.01 * schedule(k, 5, 2) for k in range(5)]
    for record in records.records:
        assert record["frames"] == 3 * 4 * 5
        assert record["skipped"] == 0
        assert record["loss"] > 0
        assert record["norm"] > 0
        assert record["seconds"] > 0
        assert all(isinstance(value, int | float) for value in record.values())
        assert "row_error" not in record


def test_scalars_are_means_over_those_that_were_logged(tmp_path):
    records, calls = Records(), itertools.count()

    def made(student, batch):
        loss, info = pull(student, batch)
        k = next(calls)
        info |= {"all": torch.tensor(float(k))} | ({"odd": loss.detach() * 0 + k} if k % 2 else {})
        return loss * 0 + k + 0 * loss, info

    trainer(tmp_path, 2, Affine(), made, accumulate=4, callbacks=[records]).run()
    assert [r["all"] for r in records.records] == [1.5, 5.5]
    assert [r["odd"] for r in records.records] == [2, 6]
    assert [r["loss"] for r in records.records] == [1.5, 5.5]


def test_scalars_are_means_over_those_that_are_known(tmp_path):
    records = Records()

    def objective(student, batch):
        loss, info = pull(student, batch)
        k = objective.calls = objective.calls + 1
        odd = torch.tensor(float(k) if k % 2 else math.nan)
        return loss, info | {"odd": odd, "never": torch.tensor(math.nan)}

    objective.calls = 0
    trainer(tmp_path, 2, Affine(), objective, accumulate=3, callbacks=[records]).run()
    assert [record["odd"] for record in records.records] == [2.0, 5.0]
    assert not any("never" in name or " " in name for name in records.records[0])


def test_a_loss_that_is_not_a_number_stays_one(tmp_path):
    records = Records()

    def objective(student, batch):
        loss, info = pull(student, batch)
        objective.calls += 1
        return loss * (math.nan if objective.calls == 2 else 1.0), info

    objective.calls = 0
    with pytest.warns(UserWarning, match="update 1 skipped: loss nan"):
        trainer(tmp_path, 2, Affine(), objective, accumulate=2, callbacks=[records]).run()
    assert math.isnan(records.records[0]["loss"])


def test_accumulated_batches_are_one_update_on_their_mean(tmp_path):
    """With an objective that draws nothing."""

    def made(student, batch):
        loss = (student(batch.x1, None, None, None) - 2 * batch.x1 - 1).square().mean()
        return loss, {"loss": loss.detach()}

    def joined(start):
        source = batches(3 * start)
        while True:
            parts = [next(source) for _ in range(3)]
            yield Batch(*(torch.cat([getattr(p, n) for p in parts]) for n in ("x1", "lengths")))

    split = trainer(tmp_path / "split", 5, Affine(), made, accumulate=3, clip=0.1).run()
    whole = trainer(tmp_path / "whole", 5, Affine(), made, joined, clip=0.1).run()
    torch.testing.assert_close(weights(split), weights(whole), rtol=1e-5, atol=1e-7)


def test_draws_are_a_function_of_seed_and_place(tmp_path):
    def run(name, **options):
        return weights(trainer(tmp_path / name, 3, **options).run())

    first = run("first", seed=1)
    torch.rand(5)
    assert same(run("again", seed=1), first)
    assert not same(run("other", seed=2), first)


def test_frozen_parameters_and_modes(tmp_path):
    student = real_student("f5_v1", depth=1)
    student.text_embed.requires_grad_(False)
    before = weights(student)

    class Modes:
        def updated(self, trainer, record):
            assert student.training
            assert not student.text_embed.training
            with trainer.averaged():
                assert not student.training
            assert student.training
            assert not student.text_embed.training

    made = objective()
    made.teacher = Teacher(real_student("f5_v1", depth=1), 2.0)
    run = trainer(
        tmp_path, 2, student, made, real_batches(student), ema_decay=0.5, callbacks=[Modes()]
    )
    run.run()
    moved = {
        name for name, value in weights(student).items() if not torch.equal(value, before[name])
    }
    assert moved
    assert not any(name.startswith("text_embed") for name in moved)


def test_average_weights(tmp_path):
    path, averages, student = [], [], Affine(slope=1.0)

    class Watch:
        def updated(self, trainer, record):
            path.append(student.slope.item())
            with trainer.averaged():
                averages.append(student.slope.item())
            assert student.slope.item() == path[-1]

    trainer(tmp_path, 6, student, pull, lr=0.1, ema_decay=0.75, callbacks=[Watch()]).run()
    mean, want = path[0], []
    for weight in path:
        mean = 0.75 * mean + 0.25 * weight
        want.append(mean)
    assert averages == pytest.approx(want, abs=1e-6)
    assert student.slope.item() == averages[-1] != path[-1]


@pytest.mark.filterwarnings("ignore:update 1 skipped")
def test_no_average_of_nothing(tmp_path):
    student = Affine(slope=1.0)
    trainer(
        tmp_path, 1, student, lambda *_: (student.slope.sum() * math.nan, {}), ema_decay=0.5
    ).run()
    assert student.slope.item() == 1.0


def test_progress_is_set_where_an_objective_has_it(tmp_path):
    seen = []

    class Curriculum:
        progress = 0.0

        def __call__(self, student, batch):
            seen.append(self.progress)
            return pull(student, batch)

    trainer(tmp_path, 4, Affine(), Curriculum(), accumulate=2).run()
    assert seen == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


def test_bfloat16_computes_in_autocast_on_float32_weights(tmp_path):
    student, dtypes = real_student("cosyvoice3", depth=1), set()
    student.proj_out.register_forward_hook(lambda module, args, y: dtypes.add(y.dtype))
    made = objective()
    made.teacher = Teacher(real_student("cosyvoice3", depth=1), 2.0)
    trainer(tmp_path, 2, student, made, real_batches(student), precision="bf16").run()
    assert dtypes == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in student.parameters())
    assert "forward" not in vars(student)


def test_trains_to_the_known_optimum(tmp_path):
    flow = Linear(-1.2, 0.7)
    made = DSFlow(Teacher(flow), counts=(1,), nfe=4, endpoint=1.0)
    student = trainer(
        tmp_path, 150, Affine(), made, lr=0.1, weight_decay=0.0, save_every=1000
    ).run()
    slope, offset = flow.euler_mean_velocity(4)
    assert student.slope.item() == pytest.approx(slope, abs=5e-3)
    assert student.offset.item() == pytest.approx(offset, abs=5e-3)


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_schedules(decay):
    shares = [schedule(k, 10, 4, decay, 0.2) for k in range(11)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert shares[4] == 1.0
    ends = {"cosine": 0.2, "linear": 0.2, "constant": 1.0}
    middle = {"cosine": 0.6, "linear": 0.6, "constant": 1.0}
    assert shares[10] == pytest.approx(ends[decay])
    assert shares[7] == pytest.approx(middle[decay])
    if decay == "linear":
        assert [a - b for a, b in itertools.pairwise(shares[4:])] == pytest.approx([0.8 / 6] * 6)


# -- errors ---------------------------------------------------------------------------------------


def test_batches_that_end(tmp_path):
    def few(start):
        return itertools.islice(batches(start), 3)

    with pytest.raises(ValueError, match="batches: expected 10 of them, got 3"):
        trainer(tmp_path, 5, source=few, accumulate=2).run()


def test_trainable_weights_are_float32(tmp_path):
    with pytest.raises(TypeError, match=r"float32 .* got torch.bfloat16 in net.0.weight"):
        trainer(tmp_path, student=Small().bfloat16())
    with pytest.raises(ValueError, match="student: expected trainable parameters, got none"):
        trainer(tmp_path, student=Small().requires_grad_(False))


def test_names_the_extra_without_accelerate(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"'\.\[train\]'"):
        trainer(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("updates", 0, "an integer >= 1"),
        ("accumulate", 1.5, "an integer >= 1"),
        ("save_every", True, "an integer >= 1"),
        ("keep", -1, "an integer >= 0"),
        ("warmup", 11, r"an integer in \[0, 10\]"),
        ("lr", 0, "a number > 0"),
        ("clip", math.nan, "a finite number"),
        ("min_lr", 1.5, r"a finite number in \[0, 1\]"),
        ("betas", (0.9, 1.0), r"two numbers in \[0, 1\)"),
        ("ema_decay", 1.0, r"a number in \[0, 1\)"),
        ("explode", 1.0, "a number > 1"),
        ("decay", "step", "one of cosine, linear, constant"),
        ("precision", "fp16", "one of no, bf16"),
        ("parallel", "fsdp", "one of ddp, fsdp2"),
    ],
)
def test_settings_are_checked(name, value, expected):
    with pytest.raises(ValueError, match=f"{name}: expected {expected}, got"):
        Settings(**({"updates": 10} | {name: value}))


def test_targets_are_taken_one_at_a_time(tmp_path):
    """Where the objective can give them so: the same run, and the same of it told."""

    def whole(student, batch):
        return of_whole(student, batch)

    options = {"source": "noise", "targets": 3}
    of_whole, found = objective(**options), []
    for name, made in (("whole", whole), ("apart", objective(**options))):
        records = Records()
        student = trainer(tmp_path / name, 3, made=made, callbacks=[records], accumulate=2).run()
        told = [{k: v for k, v in r.items() if k != "seconds"} for r in records.records]
        found.append((weights(student), told))
    torch.testing.assert_close(found[1][0], found[0][0])
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
