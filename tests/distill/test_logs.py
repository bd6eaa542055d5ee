import json
import math
import time
from types import SimpleNamespace

import pytest

from imf_kernels.distill import logs
from imf_kernels.distill.logs import JsonLines, Progress, TensorBoard, read, told
from tests.distill.runs import fake_trainer, record


def written(callback, trainer, updates, **more):
    callback.started(trainer)
    for update in updates:
        trainer.update = update
        callback.updated(trainer, record(update, **more.get(f"u{update}", {})))
    if hasattr(callback, "ended"):
        callback.ended(trainer)


def test_json_lines_every_so_often_and_whatever_is_more_than_training(tmp_path):
    more = {"u3": {"val/nfe1": 0.5}, "u5": {"skipped": 1.0, "loss": math.nan}}
    written(JsonLines(), fake_trainer(tmp_path, updates=9), range(1, 10), **more)
    records = read(tmp_path / "log.jsonl")
    assert [r["update"] for r in records] == [2, 3, 4, 5, 6, 8, 9]
    assert records[0] == record(2)
    assert records[1]["val/nfe1"] == 0.5
    assert records[3]["loss"] is None, "JSON knows no NaN"


def test_a_resumed_run_tells_one_story(tmp_path):
    written(JsonLines(), fake_trainer(tmp_path), range(1, 9))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"update": 9, "lo')  # killed while it wrote
    assert [r["update"] for r in read(tmp_path / "log.jsonl")] == [2, 4, 6, 8]
    written(JsonLines(), fake_trainer(tmp_path, update=4), range(5, 11))
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines] == [2, 4, 6, 8, 10]


def test_a_log_that_was_cut_off_goes_on_on_a_line_of_its_own(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"update": 2}\n{"upd')
    written(JsonLines(), fake_trainer(tmp_path, update=3), [4])
    assert [r["update"] for r in read(tmp_path / "log.jsonl")] == [2, 4]


def begun(callback, trainer):
    callback.started(trainer)
    callback.begun(trainer, {"update": 0, "val/nfe1": 0.5})
    trainer.update = 2
    callback.updated(trainer, record(2))


def test_what_is_told_before_the_first_update(tmp_path, capsys):
    for _ in range(2):  # the second begins anew
        begun(JsonLines(), fake_trainer(tmp_path))
        assert read(tmp_path / "log.jsonl") == [{"update": 0, "val/nfe1": 0.5}, record(2)]
    begun(Progress(), fake_trainer(tmp_path))
    assert capsys.readouterr().out.startswith("0/10  val/nfe1 0.5\n2/10  loss 1.5")
    JsonLines().begun(fake_trainer(tmp_path), {"update": 0})
    assert len(read(tmp_path / "log.jsonl")) == 2, "nothing is no line"


def test_validation_before_the_first_update_is_no_training(tmp_path, monkeypatch, capsys):
    clock = iter([0.0, 100.0, 110.0])
    monkeypatch.setattr(logs, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    begun(Progress(), fake_trainer(tmp_path))
    assert capsys.readouterr().out.endswith("left 0:00:40\n"), "2 of 10 updates in 10 seconds"


def test_other_ranks_write_nothing(tmp_path, capsys):
    trainer = fake_trainer(tmp_path, rank=1, ranks=2)
    for callback in (Progress(), JsonLines(), TensorBoard()):
        written(callback, trainer, [1, 2])
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    written(Progress(), fake_trainer(tmp_path), range(1, 5), u3={"val/nfe2": 0.25})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["2/10", "3/10", "4/10"]
    assert "loss 1.5  norm 2  lr 1.00e-04  2,000 frames/s" in lines[0]
    assert "val/nfe2 0.25" in lines[1]
    assert "left 0:00:00" in lines[0]


def test_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    progress, trainer = Progress(), fake_trainer(tmp_path, update=4)
    progress.started(trainer)
    assert progress.bar.tasks[0].completed == 4
    progress.updated(trainer, record(7))
    task = progress.bar.tasks[0]
    assert (task.completed, task.total, task.fields["told"]) == (7, 10, told(record(7)))
    progress.ended(trainer)
    assert progress.bar is None
    assert "7/10" in capsys.readouterr().err


def test_tensorboard_curves(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written(TensorBoard(), fake_trainer(tmp_path), range(1, 9), u4={"val/nfe1": 0.5})
    time.sleep(1.1)  # files are read by their names: a second, then a counter as text, 10 before 9
    written(TensorBoard(), fake_trainer(tmp_path, update=4), range(5, 7), u6={"loss": 0.25})
    begun(TensorBoard(), fake_trainer(tmp_path / "anew"))
    begun(TensorBoard(), fake_trainer(tmp_path / "anew"))
    events = EventAccumulator(str(tmp_path / "anew/tensorboard")).Reload()
    assert [e.step for e in events.Scalars("val/nfe1")] == [0]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("val/nfe1")] == [4]
    curve = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert curve == [(2, 1.5), (4, 1.5), (6, 0.25)], "what lay beyond the checkpoint is purged"


def test_a_full_disk_is_warned_of_once_and_the_run_goes_on(tmp_path):
    log, trainer, path = JsonLines(), fake_trainer(tmp_path), tmp_path / "log.jsonl"
    written(log, trainer, [2])
    path.rename(tmp_path / "before")
    path.symlink_to("/dev/full")
    with pytest.warns(UserWarning, match="log.jsonl: No space left on device"):
        log.updated(trainer, record(4))
    log.updated(trainer, record(6))
    path.unlink()
    path.write_text((tmp_path / "before").read_text() + '{"upd')
    for update in (8, 10):
        log.updated(trainer, record(update))
    assert [r["update"] for r in read(path)] == [2, 8, 10]


def test_logs_that_cannot_be_begun_are_warned_of(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "log.jsonl").mkdir()
    (tmp_path / "tensorboard").write_text("")
    with pytest.warns(UserWarning, match="log.jsonl: Is a directory"):
        written(JsonLines(), fake_trainer(tmp_path), [2, 4])
    with pytest.warns(UserWarning, match="tensorboard: .*exists"):
        written(TensorBoard(), fake_trainer(tmp_path), [2, 4])


def test_curves_that_cannot_be_written_are_given_up(tmp_path):
    pytest.importorskip("tensorboard")
    board, trainer = TensorBoard(), fake_trainer(tmp_path)
    board.started(trainer)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    board.writer.add_scalar = full
    with pytest.warns(UserWarning, match="tensorboard: No space left on device"):
        board.updated(trainer, record(2))
    board.updated(trainer, record(4))
    assert board.writer is None
