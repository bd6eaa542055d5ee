import json
import math

import pytest
import torch

from imf_kernels import Teacher, sampler
from imf_kernels.distill.held_out import FineSolves, student_mel
from imf_kernels.distill.validation import Validation
from tests.distill.runs import Line, batches, fake_trainer, record


def solves(tmp_path, slope=1.0, **options):
    return FineSolves(Teacher(Line(slope), 2.0), tmp_path / "solves", steps=8, **options)


def reference(fine, held_out, slope, nfe):
    """The distance, written out."""
    squares = count = 0.0
    for index, batch in enumerate(held_out):
        noise, mask = fine.noise(batch, index), batch.counted("span")
        student, teacher = Line(slope).eval(), Line(1.0).eval()
        mel = sampler.sample(student, noise, student.prepare(batch.lengths), nfe=nfe)
        cond = teacher.prepare(batch.lengths, guided=True)
        goal = sampler.sample(teacher, noise, cond, nfe=8, guidance=2.0)
        squares += float((mel - goal)[mask].double().square().sum())
        count += float(mask.sum()) * 4
    return math.sqrt(squares / count)


def test_distances_of_the_averaged_student_by_nfe(tmp_path):
    held_out, fine = batches(), solves(tmp_path)
    trainer = fake_trainer(tmp_path, Line(9.0, averaged=1.25).train())
    trainer.update = 4
    validation = Validation(held_out, fine, every=4, nfe=(1, 3))
    validation.started(trainer)
    told = record(4)
    validation.updated(trainer, told)
    for nfe in (1, 3):
        assert told[f"val/nfe{nfe}"] == pytest.approx(reference(fine, held_out, 1.25, nfe))
    assert trainer.student.slope.item() == 9.0


def test_ranks_share_the_batches(tmp_path):
    """An odd one is evaluated by both, and counts once."""
    held_out, fine = batches(3), solves(tmp_path)
    sums = []

    class Summed(Validation):
        def __call__(self, trainer):
            trainer.accelerator.reduce = lambda tensor, how: (sums.append(tensor), tensor + 1)[1]
            return super().__call__(trainer)

    asked = []
    for rank in (0, 1):
        trainer = fake_trainer(tmp_path, Line(2.0).train(), rank=rank, ranks=2)
        Summed(held_out, fine, nfe=(2,))(trainer)
        asked.append(len(trainer.student.asked))
    assert asked == [2, 2], "sharded weights want equally many evaluations of every rank"
    squares, count = (sums[0] + sums[1]).tolist()
    assert (squares / count) ** 0.5 == pytest.approx(reference(fine, held_out, 2.0, 2))
    alone = Validation(held_out, fine, nfe=(2,))(fake_trainer(tmp_path, Line(2.0).train()))
    assert alone["val/nfe2"] == pytest.approx((squares / count) ** 0.5)


def test_only_when_due_and_at_the_end(tmp_path):
    trainer, told = fake_trainer(tmp_path, Line().train(), updates=7), {}
    validation = Validation(batches(1), solves(tmp_path), every=3, nfe=(1,))
    validation.started(trainer)
    for update in range(1, 8):
        trainer.update, told[update] = update, record(update)
        validation.updated(trainer, told[update])
    assert [update for update in told if "val/nfe1" in told[update]] == [3, 6, 7]


def test_the_untrained_student_comes_first(tmp_path):
    validation = Validation(held_out := batches(1), fine := solves(tmp_path), every=3, nfe=(1,))
    for _ in range(2):  # the second begins anew: the first was killed before it saved anything
        trainer, told = fake_trainer(tmp_path, Line(3.0).train()), {"update": 0}
        validation.started(trainer)
        validation.begun(trainer, told)
        trainer.update = 3
        validation.updated(trainer, record(3))
        history = json.loads((tmp_path / "validation.json").read_text())["history"]
        assert [entry["update"] for entry in history] == [0, 3]
        assert history[0] == told
        assert told["val/nfe1"] == pytest.approx(reference(fine, held_out, 3.0, 1))


def test_the_best_is_kept_and_a_resumed_run_tells_one_story(tmp_path):
    validation = Validation(batches(1), solves(tmp_path), every=1, nfe=(1,))

    def go(start, slopes):
        trainer = fake_trainer(tmp_path, Line().train(), update=start, updates=99)
        validation.started(trainer)
        for i, slope in enumerate(slopes):
            trainer.update = start + 1 + i
            trainer.student.slope.data.fill_(slope)
            validation.updated(trainer, record(trainer.update))
        return json.loads((tmp_path / "validation.json").read_text())

    told = go(0, [5.0, 9.0, 1.5, 4.0])
    assert [e["update"] for e in told["history"]] == [1, 2, 3, 4]
    assert told["best"]["val/nfe1"]["update"] == 3
    assert told["best"]["val/nfe1"]["value"] == told["history"][2]["val/nfe1"]
    told = go(2, [7.0])
    assert [e["update"] for e in told["history"]] == [1, 2, 3]
    assert told["best"]["val/nfe1"]["update"] == 1, "the lost update's number is lost too"


def test_the_best_is_finite(tmp_path):
    validation = Validation(batches(1), solves(tmp_path), nfe=(1, 2))
    values = [math.nan, 2.0, 1.0, math.inf]
    validation.history = [{"update": i, "val/nfe1": value} for i, value in enumerate(values)]
    assert validation.best == {"val/nfe1": {"update": 2, "value": 1.0}}


def test_the_teacher_is_asked_once(tmp_path):
    batch, fine = batches(1)[0], solves(tmp_path)
    mel = fine.of(batch)
    asked = len(fine.teacher.model.asked)
    assert torch.equal(fine.of(batch), mel)
    assert len(fine.teacher.model.asked) == asked
    again = solves(tmp_path)
    assert torch.equal(again.of(batch), mel), "another process"
    assert not again.teacher.model.asked
    for other in (solves(tmp_path, slope=1.5), solves(tmp_path, seed=1)):
        assert not torch.equal(other.of(batch), mel), "other weights, other noise: other solves"
        assert other.teacher.model.asked
    longer = FineSolves(Teacher(Line(), 3.0), tmp_path / "solves", steps=8)
    assert not torch.equal(longer.of(batch), mel), "other guidance"


def test_no_seed_has_the_noise_of_the_next(tmp_path):
    batch = batches(1)[0]
    one, other = solves(tmp_path, seed=0), solves(tmp_path, seed=1)
    assert not torch.equal(one.noise(batch, 1), other.noise(batch, 0))
    assert not torch.equal(one.of(batch, 1), other.of(batch, 0))


def test_a_student_is_told_its_number_of_steps(tmp_path):
    batch, student = batches(1)[0], Line().eval()
    student_mel(student, torch.randn_like(batch.x1), batch, 2, extra=lambda nfe: {"steps": nfe})
    assert student.asked == [{"steps": 2}]


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="batches: expected one or more"):
        Validation([], solves(tmp_path))
    with pytest.raises(ValueError, match="every: expected an integer >= 1, got 0"):
        Validation(batches(1), solves(tmp_path), every=0)
    with pytest.raises(ValueError, match="grid: expected one of uniform"):
        Validation(batches(1), solves(tmp_path), grid="even")
