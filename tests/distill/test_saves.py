"""Checkpoints: a run that was interrupted goes on to the bit, whatever happened to it."""

import errno
import json
import resource
import signal
import warnings
import weakref

import pytest
import torch
from torch import multiprocessing

from imf_kernels import DSFlow, Teacher
from imf_kernels.distill import Stopped, saves
from imf_kernels.objectives import Intervals
from tests.distill.tools import (
    Records,
    batches,
    objective,
    read,
    real_batches,
    same,
    saved,
    trainer,
    weights,
)
from tests.flows import FLOWS
from tests.objectives.tools import Small, real_student


class StopAt:
    """A signal while the run works on an update."""

    def __init__(self, update):
        self.update = update

    def started(self, trainer):
        self.updated(trainer, {"update": trainer.update})

    def updated(self, trainer, record):
        if record["update"] == self.update - 1:
            signal.raise_signal(signal.SIGTERM)


RUNS = {
    "plain": {},
    "average, accumulation": {"ema_decay": 0.9, "accumulate": 2, "warmup": 2},
    "half precision": {"precision": "bf16"},
    "dsflow": {"made": lambda: DSFlow(Teacher(FLOWS["linear"]), nfe=4, p_uncond=0.0)},
}


@pytest.mark.parametrize("name", RUNS)
def test_goes_on_to_the_bit_from_any_update(tmp_path, name):
    options = dict(RUNS[name])
    make = options.pop("made", objective)
    options |= {"updates": 6, "save_every": 100}

    def run(folder, *callbacks):
        return trainer(folder, made=make(), callbacks=callbacks, **options)

    whole = run(tmp_path / "whole")
    want = weights(whole.run())
    for update in range(1, 6):
        folder = tmp_path / str(update)
        with pytest.raises(Stopped, match=f"SIGTERM: stopped after update {update}, saved in"):
            run(folder, StopAt(update)).run()
        again, records = run(folder), Records()
        again.callbacks = [records]
        assert same(weights(again.run()), want)
        assert records.told[0] == ("started", update)
        assert len(records.records) == 6 - update
    for part in ("model", "optimizer", *(["ema"] if "ema_decay" in options else [])):
        assert same(read(folder, 6, part), read(tmp_path / "whole", 6, part)), part
    states = [
        json.loads((f / "checkpoints/step_00000006/state.json").read_text())
        for f in (folder, tmp_path / "whole")
    ]
    assert states[0] == states[1]


def test_a_real_student_goes_on_to_the_bit(tmp_path):
    def run(name, *callbacks):
        student, made = real_student("f5_v1", depth=1), objective()
        made.teacher = Teacher(real_student("f5_v1", depth=1), 2.0)
        options = {"source": real_batches(student), "ema_decay": 0.9, "callbacks": callbacks}
        return trainer(tmp_path / name, 4, student, made, **options)

    want = weights(run("whole").run())
    with pytest.raises(Stopped):
        run("parts", StopAt(2)).run()
    assert same(weights(run("parts").run()), want)


def test_a_finished_run_is_loaded(tmp_path):
    want = weights(trainer(tmp_path, 4, ema_decay=0.9).run())
    records = Records()
    assert same(weights(trainer(tmp_path, 4, ema_decay=0.9, callbacks=[records]).run()), want)
    assert records.told == [("started", 4), ("ended", 4)]


@pytest.mark.parametrize(("keep", "left"), [(1, [9]), (2, [8, 9]), (0, [2, 4, 6, 8, 9])])
def test_the_newest_are_kept(tmp_path, keep, left):
    trainer(tmp_path, 9, save_every=2, keep=keep).run()
    assert saved(tmp_path) == [f"step_{update:08d}" for update in left]


def test_what_a_checkpoint_holds(tmp_path):
    student = trainer(tmp_path, 2, ema_decay=0.5, accumulate=3).run()
    path = tmp_path / "checkpoints" / "step_00000002"
    files = {"model", "ema", "optimizer", "objective_0"}
    names = {f"{name}.safetensors" for name in files} | {"state.json"}
    assert {p.name for p in path.iterdir()} == names | {"manifest.json"}
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest) == names
    parameters = dict(student.named_parameters())
    assert set(read(tmp_path, 2, "ema")) == set(parameters)
    kinds = ("step", "exp_avg", "exp_avg_sq")
    assert set(read(tmp_path, 2, "optimizer")) == {f"{n}.{k}" for n in parameters for k in kinds}
    state = json.loads((path / "state.json").read_text())
    assert (state["update"], state["position"], state["ranks"]) == (2, 6, 1)
    assert state["torch"] == torch.__version__
    assert state["settings"]["ema_decay"] == 0.5


# -- damage ---------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", [cut, flip, lambda path: path.unlink()])
def test_a_damaged_checkpoint_is_noticed_and_an_older_one_taken(tmp_path, file, harm):
    want = weights(trainer(tmp_path, 8).run())
    harm(tmp_path / "checkpoints" / "step_00000008" / file)
    records = Records()
    with pytest.warns(UserWarning, match=r"step_00000008: damaged \(.*\), taking an older one"):
        got = trainer(tmp_path, 8, callbacks=[records]).run()
    assert records.told[0] == ("started", 4)
    assert same(weights(got), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(tmp_path, 8).run()  # replaced by a good one


def test_a_damaged_checkpoint_does_not_take_a_good_ones_place(tmp_path):
    trainer(tmp_path, 8, save_every=2, keep=2).run()
    cut(tmp_path / "checkpoints" / "step_00000008" / "model.safetensors")
    seen = []

    class Look:
        def saved(self, trainer, path):
            seen.append([p.name for p in saves.names(path.parent) if saves.damage(p) is None])

    with pytest.warns(UserWarning, match="damaged"):
        trainer(tmp_path, 8, save_every=1, keep=1, callbacks=[Look()]).run()
    assert seen == [["step_00000007"], ["step_00000008"]]


def test_nothing_but_damaged_checkpoints_is_an_error(tmp_path):
    trainer(tmp_path, 8).run()
    for path in saves.names(tmp_path / "checkpoints"):
        cut(path / "optimizer.safetensors")
    with (
        pytest.warns(UserWarning, match="optimizer.safetensors: expected"),
        pytest.raises(ValueError, match="expected a checkpoint that is whole, got 2 damaged ones"),
    ):
        trainer(tmp_path, 8).run()


# -- what changes the course ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"lr": 0.02}, {"seed": 3}, {"accumulate": 2}, {"ema_decay": 0.5}, {"betas": (0.5, 0.9)}],
)
def test_other_settings_are_refused(tmp_path, change):
    trainer(tmp_path, 2).run()
    with pytest.raises(ValueError, match=f"{next(iter(change))}: expected .* was begun, got"):
        trainer(tmp_path, 2, **change).run()


def test_settings_that_do_not_matter_may_change(tmp_path):
    trainer(tmp_path, 2).run()
    free = {"save_every": 1, "keep": 1, "log_every": 3, "max_bad": 2, "timeout": 1.0}
    trainer(tmp_path, 2, **free).run()


def test_updates_may_grow_where_nothing_decays(tmp_path):
    trainer(tmp_path / "cosine", 2).run()
    with pytest.raises(ValueError, match=r"updates: expected 2, .* may grow .* got 4"):
        trainer(tmp_path / "cosine", 4).run()
    trainer(tmp_path / "more", 2, decay="constant").run()
    more = trainer(tmp_path / "more", 4, decay="constant").run()
    assert same(weights(more), weights(trainer(tmp_path / "at once", 4, decay="constant").run()))
    with pytest.raises(ValueError, match="updates: expected 4"):
        trainer(tmp_path / "more", 3, decay="constant").run()

    class Curriculum:
        progress = 0.0

        def __call__(self, student, batch):
            return objective()(student, batch)

    with pytest.raises(ValueError, match="updates: expected 4, which the objective's progress"):
        trainer(tmp_path / "more", 5, made=Curriculum(), decay="constant").run()


def test_another_torch_is_warned_of(tmp_path, monkeypatch):
    trainer(tmp_path, 2).run()
    monkeypatch.setattr(torch, "__version__", "9.9.0")
    with pytest.warns(UserWarning, match=r"torch: the run was begun with .* goes on with 9.9.0"):
        trainer(tmp_path, 2).run()


# -- disks ----------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    want, own = weights(trainer(tmp_path / "whole", 8).run()), saves.write

    def write(path, fill):
        if "00000008" in str(path) and path.name == "optimizer.safetensors":
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return own(path, fill)

    monkeypatch.setattr(saves, "write", write)
    with pytest.raises(OSError, match="No space left on device") as caught:
        trainer(tmp_path / "run", 8).run()
    assert caught.value.errno == errno.ENOSPC
    assert "writing the checkpoint step_00000008" in str(caught.value)
    assert "the last good one is step_00000004" in str(caught.value)
    assert caught.value.filename.endswith("optimizer.safetensors")
    assert saved(tmp_path / "run") == ["step_00000004"]
    monkeypatch.setattr(saves, "write", own)
    assert same(weights(trainer(tmp_path / "run", 8).run()), want)


def limited(folder, answers):
    """As on a disk with room for 1 KB more: less than the weights take."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
    try:
        trainer(folder, 4).run()
    except OSError as error:
        answers.put((error.errno, str(error)))


def test_a_write_that_the_system_refuses(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=limited, args=(tmp_path, answers))
    child.start()
    number, text = answers.get(timeout=60)
    child.join()
    assert number == errno.EFBIG
    assert "writing the checkpoint step_00000004 (there is none yet)" in text
    assert saved(tmp_path) == []


def test_one_part_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """Not all of them, nor a copy of any as bytes."""
    parts, add = [], saves.Draft.add_tensors

    def watched(draft, name, tensors, metadata=None):
        assert all(ref() is None for ref in parts)
        parts.extend(weakref.ref(value) for value in tensors.values())
        add(draft, name, tensors, metadata)

    monkeypatch.setattr(saves.Draft, "add_tensors", watched)
    monkeypatch.setattr("safetensors.torch.save", None)
    trainer(tmp_path, 1, ema_decay=0.5).run()
    assert len(parts) > 4
    modes = {path.stat().st_mode for path in (tmp_path / "checkpoints/step_00000001").iterdir()}
    (tmp_path / "any").touch()
    assert modes == {(tmp_path / "any").stat().st_mode}


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file"):
        trainer(tmp_path / "file", 4).run()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    with pytest.raises(FileExistsError, match="checkpoints"):
        trainer(tmp_path / "run", 4).run()


def test_a_folder_that_goes_away(tmp_path):
    class Remove:
        def updated(self, trainer, record):
            (trainer.folder / "checkpoints").rename(trainer.folder / "elsewhere")

    with pytest.raises(FileNotFoundError, match="writing the checkpoint step_00000001"):
        trainer(tmp_path, 4, save_every=1, callbacks=[Remove()]).run()


def test_leftovers_of_killed_runs_go(tmp_path):
    trainer(tmp_path, 4).run()
    for name in (".step_00000008.tmp", ".step_00000002.old.tmp"):
        left = tmp_path / "checkpoints" / name
        left.mkdir()
        (left / "model.safetensors").write_text("half")
    trainer(tmp_path, 4).run()
    assert saved(tmp_path) == ["step_00000004"]


def test_intervals_are_saved_by_nobody(tmp_path):
    """What an objective draws depends on the place in the run alone."""
    made = objective(intervals=Intervals(boundary=0.5))
    want = weights(trainer(tmp_path / "whole", 3, Small(), made, batches).run())
    with pytest.raises(Stopped):
        trainer(tmp_path / "parts", 3, made=made, callbacks=[StopAt(1)]).run()
    torch.manual_seed(77)
    assert same(weights(trainer(tmp_path / "parts", 3, made=made).run()), want)
