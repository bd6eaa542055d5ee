"""Bad updates: skipped, counted, written down; too many of them end the run."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from imf_kernels.distill import saves
from imf_kernels.distill.guard import ENOUGH, WINDOW, Guard, rows
from tests.distill.tools import Records, objective, read, same, saved, trainer, weights
from tests.objectives.tools import Small


class Spoilt:
    """An objective whose calls of some numbers have a loss multiplied by a number."""

    def __init__(self, factors, inner=None):
        self.factors, self.calls, self.inner = factors, 0, inner or objective()

    def __call__(self, student, batch):
        loss, info = self.inner(student, batch)
        factor = self.factors.get(self.calls, 1.0)
        self.calls += 1
        return loss * factor, {**info, "loss": loss.detach() * factor}


# -- judging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_bad_from_the_first_update(bad):
    guard = Guard(10.0)
    assert guard.judge(bad, 1.0) == f"loss {bad if math.isnan(bad) else abs(bad)}"
    assert guard.judge(1.0, bad).startswith("norm")
    assert (guard.skipped, guard.in_a_row) == (2, 2)
    assert guard.judge(1.0, 1.0) is None
    assert (guard.skipped, guard.in_a_row) == (2, 0)


def test_what_explodes_is_bad_once_there_is_a_median():
    guard = Guard(10.0)
    assert guard.judge(1e6, 1.0) is None
    for _ in range(ENOUGH):
        assert guard.judge(2.0, 3.0) is None
    assert guard.judge(20.0, 30.0) is None
    assert "more than 10 times its median 2" in guard.judge(20.1, 3.0)
    assert guard.judge(2.0, 30.1).startswith("norm 30.1, more than")
    assert guard.judge(2.0, 3.0) is None


def test_the_median_is_of_the_last_good_ones():
    guard = Guard(10.0)
    for _ in range(WINDOW):
        guard.judge(1.0, 1.0)
    assert guard.judge(20.0, 1.0) is not None
    for _ in range(WINDOW):
        assert guard.judge(9.0, 1.0) is None
    assert guard.judge(20.0, 1.0) is None
    assert len(guard.good["loss"]) == WINDOW


def test_a_loss_of_nothing_is_no_measure():
    guard = Guard(10.0)
    for _ in range(20):
        assert guard.judge(0.0, 0.0) is None
    assert guard.judge(1e-9, 1e-9) is None


def test_rows_are_told_by_name():
    batch = SimpleNamespace(names=("a.wav", "b.wav"), lengths=torch.tensor([3, 5]))
    info = {"row_error": torch.tensor([0.5, math.inf]), "loss": torch.tensor(math.inf)}
    told = rows(batch, torch.tensor(math.inf), info)
    each = {"names": ["a.wav", "b.wav"], "lengths": [3, 5], "row_error": [0.5, math.inf]}
    assert told == {"loss": math.inf, **each}


# -- in a run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_update_changes_nothing(tmp_path, bad):
    student, seen = Small(), []

    class Watch:
        def updated(self, run, record):
            ema = [value.clone() for value in run._state.ema.averages]
            state = [v.clone() for s in run._state.optimizer.state.values() for v in s.values()]
            seen.append([*weights(student).values(), *ema, *state])
            assert all(p.grad is None for p in student.parameters())

    records = Records()
    with pytest.warns(UserWarning, match=r"update 3 skipped: loss (nan|inf); see .*bad_00000003"):
        trainer(
            tmp_path, 5, student, Spoilt({2: bad}), ema_decay=0.5, callbacks=[Watch(), records]
        ).run()
    assert [r["skipped"] for r in records.records] == [0, 0, 1, 0, 0]
    for before, after in zip(seen[1], seen[2], strict=True):
        assert torch.equal(before, after)
    assert not torch.equal(seen[2][0], seen[3][0])


def test_an_exploding_update_is_skipped(tmp_path):
    records = Records()
    with pytest.warns(UserWarning, match=r"update 13 skipped: (loss|norm) .* times its median"):
        trainer(tmp_path, 14, made=Spoilt({12: 1e6}), explode=50.0, callbacks=[records]).run()
    assert [r["update"] for r in records.records if r["skipped"]] == [13]


def test_one_bad_batch_of_an_update_spoils_it(tmp_path):
    records = Records()
    with pytest.warns(UserWarning, match="update 2 skipped"):
        trainer(tmp_path, 3, made=Spoilt({4: math.nan}), accumulate=3, callbacks=[records]).run()
    assert [r["skipped"] for r in records.records] == [0, 1, 0]


@pytest.mark.filterwarnings("ignore:update .* skipped")
def test_too_many_in_a_row_end_the_run(tmp_path):
    made = Spoilt(dict.fromkeys((2, 3, 5, 6, 7), math.nan))
    with pytest.raises(FloatingPointError, match=r"update 8: loss nan; 3 bad .*bad_00000008.json"):
        trainer(tmp_path, 20, made=made, max_bad=3, save_every=2).run()
    reports = sorted(path.name for path in (tmp_path / "reports").iterdir())
    assert reports == [f"bad_{update:08d}.json" for update in (3, 4, 6, 7, 8)]
    told = json.loads((tmp_path / "reports" / "bad_00000008.json").read_text())
    assert (told["update"], told["why"]) == (8, "loss nan")
    assert math.isnan(told["loss"])
    assert math.isnan(told["norm"])
    before = told["before"]
    assert before["skipped"] == 5
    assert len(before["loss"]) == len(before["norm"]) == 3
    assert all(math.isfinite(value) for value in (*before["loss"], *before["norm"]))
    (batch,) = told["batches"]
    assert batch["rank"] == 0
    assert math.isnan(batch["loss"])
    assert batch["lengths"] == [5] * 4
    assert len(batch["row_error"]) == len(batch["interval"]) == 4
    assert saved(tmp_path) == [f"step_0000000{update}" for update in (2, 4, 6)]


@pytest.mark.filterwarnings("ignore:update .* skipped")
def test_the_guard_goes_on_as_it_was(tmp_path):
    """Its medians are part of the run: the same update is found to explode."""
    factors = {3: math.nan, 12: 60.0}

    def run(folder, updates, made):
        records = Records()
        trainer(
            folder, updates, made=made, decay="constant", explode=20.0, callbacks=[records]
        ).run()
        return [r["update"] for r in records.records if r["skipped"]]

    assert run(tmp_path / "whole", 14, Spoilt(factors)) == [4, 13]
    made = Spoilt(factors)
    assert run(tmp_path / "parts", 11, made) == [4]
    made.calls = 11
    assert run(tmp_path / "parts", 14, made) == [13]
    assert same(read(tmp_path / "parts", 14, "model"), read(tmp_path / "whole", 14, "model"))
    state = [
        (tmp_path / name / "checkpoints/step_00000014/state.json").read_text()
        for name in ("parts", "whole")
    ]
    assert state[0] == state[1]
    assert json.loads(state[0])["guard"]["skipped"] == 2
    assert saves.newest(tmp_path / "parts" / "checkpoints").name == "step_00000014"
