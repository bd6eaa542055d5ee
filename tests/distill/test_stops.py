"""Signals, and kills."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from imf_kernels.distill import Stopped, saves, stops
from tests.distill.tools import Records, same, saved, trainer, weights

RUN = """
import sys
from pathlib import Path
from imf_kernels.distill import Stopped
from tests.distill.tools import trainer

class Slow:
    def started(self, trainer):
        print("started", flush=True)
    def updated(self, trainer, record):
        import time
        time.sleep(0.02)
    def ended(self, trainer):
        print("ended", trainer.update, flush=True)

try:
    trainer(Path(sys.argv[1]), 100000, save_every=100000, callbacks=[Slow()]).run()
except Stopped as stopped:
    print(stopped.update, stopped.path.name, flush=True)
"""


def test_sigterm_saves_and_ends_in_order(tmp_path):
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as child:
        assert child.stdout.readline() == "started\n"
        time.sleep(0.2)
        child.terminate()
        out, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    ended, stopped = out.splitlines()
    update = int(ended.removeprefix("ended "))
    assert update >= 1
    assert stopped == f"{update} step_{update:08d}"
    assert saved(tmp_path) == [f"step_{update:08d}"]


class Ask:
    """Signals before the first update."""

    def __init__(self, *numbers):
        self.numbers = numbers

    def started(self, trainer):
        for number in self.numbers:
            signal.raise_signal(number)


def test_the_end_may_be_told_twice(tmp_path):
    """By a scheduler to every process, and by the launcher again."""
    numbers = (signal.SIGTERM, signal.SIGTERM, signal.SIGINT)
    with pytest.raises(Stopped, match="SIGTERM: stopped after update 1"):
        trainer(tmp_path, 4, callbacks=[Ask(*numbers)]).run()
    assert saved(tmp_path) == ["step_00000001"]


@pytest.fixture
def usual_sigint():
    """Python's own, also where a shell started the tests in the background: there it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_later_sigint_acts_as_usual(tmp_path, monkeypatch, usual_sigint):
    monkeypatch.setattr(stops, "IMPATIENCE", 0.0)
    with pytest.raises(Stopped):
        trainer(tmp_path / "one", 4, callbacks=[Ask(signal.SIGINT, signal.SIGTERM)]).run()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "two", 4, callbacks=[Ask(signal.SIGTERM, signal.SIGINT)]).run()
    assert saved(tmp_path / "two") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_handlers_are_put_back(tmp_path, number):
    before = signal.getsignal(number)

    trainer(tmp_path / "whole", 2).run()
    assert signal.getsignal(number) is before
    records = Records()
    with pytest.raises(Stopped, match=number.name) as caught:
        trainer(tmp_path / "stopped", 4, callbacks=[Ask(number), records]).run()
    assert signal.getsignal(number) is before
    assert caught.value.update == 1
    assert caught.value.path == tmp_path / "stopped" / "checkpoints" / "step_00000001"
    assert records.told == [("started", 0), ("begun", 0), ("saved", "step_00000001"), ("ended", 1)]


def test_in_another_thread_signals_are_nobodys(tmp_path):
    before, seen = signal.getsignal(signal.SIGTERM), []

    class Look:
        def started(self, trainer):
            seen.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=trainer(tmp_path, 2, callbacks=[Look()]).run)
    thread.start()
    thread.join()
    assert seen == [True]
    assert saved(tmp_path) == ["step_00000002"]


def test_a_signal_during_a_bad_update(tmp_path):
    """That changed nothing: what was before it is saved, and that it was bad."""
    records = Records()

    def made(student, batch):
        bad = len(records.records) in (0, 2)
        if records.records == []:
            signal.raise_signal(signal.SIGTERM)
        loss = student.net[0].weight.square().sum() * (torch.nan if bad else 1.0)
        return loss, {}

    with pytest.warns(UserWarning, match="skipped"), pytest.raises(Stopped, match="update 1"):
        trainer(tmp_path, 3, made=made, callbacks=[records]).run()
    assert saved(tmp_path) == ["step_00000001"]
    state = json.loads((tmp_path / "checkpoints/step_00000001/state.json").read_text())
    assert state["guard"]["in_a_row"] == 1
    with pytest.warns(UserWarning, match="update 3 skipped"):
        trainer(tmp_path, 3, made=made, callbacks=[records]).run()
    assert saved(tmp_path) == ["step_00000001", "step_00000003"], "the last one is due"
    again = trainer(tmp_path, 3, made=made)
    again.run()
    assert again._state.guard.in_a_row == 1


# -- kills ----------------------------------------------------------------------------------------

UPDATES, KILLS = 12, 20
OPTIONS = {"ema_decay": 0.9, "accumulate": 2, "save_every": 2, "keep": 2}


def work(folder, aim, half):
    """A run; half of the aim-th file of its checkpoints is written, then it waits to be killed."""
    own, written = saves.write, []

    def write(path, fill):
        written.append(path)
        if len(written) == aim:
            fill(path)
            os.truncate(path, path.stat().st_size // 2)
            half.value = 1
            time.sleep(60)
        return own(path, fill)

    saves.write = write
    trainer(folder, UPDATES, **OPTIONS).run()


def test_kills_lose_nothing(tmp_path):
    """Twenty, at any moment, each second one while a file of a checkpoint is half written."""
    want = weights(trainer(tmp_path / "whole", UPDATES, **OPTIONS).run())
    context, rng = multiprocessing.get_context("fork"), random.Random(0)
    kills = half_written = 0
    while kills < KILLS:
        folder, exitcode = tmp_path / f"after {kills}", None
        while exitcode != 0:
            aim = rng.randrange(1, 12) if kills < KILLS and kills % 2 else 0
            half = context.RawValue("b", 0)
            child = context.Process(target=work, args=(folder, aim, half), daemon=True)
            child.start()
            if kills < KILLS:
                if aim:
                    while child.is_alive() and not half.value:
                        time.sleep(0.001)
                else:
                    child.join(rng.uniform(0.0, 0.6))
                if child.is_alive():
                    half_written += half.value
                    child.kill()
                    kills += 1
            child.join(60)
            exitcode = child.exitcode
            assert exitcode in (0, -signal.SIGKILL)
        newest = saved(folder)[-2:]  # killed before it deletes the oldest, a run leaves that too
        assert newest == ["step_00000010", "step_00000012"]
        assert same(weights(trainer(folder, UPDATES, **OPTIONS).run()), want)
    assert half_written == KILLS // 2


def test_last_words_of_one_process_are_its_own(tmp_path):
    with pytest.raises(RuntimeError, match="gloo"), stops.last_words(tmp_path, 0, 1):
        raise RuntimeError("gloo says something")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_its_own_is_told(tmp_path, monkeypatch):
    """Also where it speaks of connections; of a collective that breaks the text is kept."""
    monkeypatch.setattr(stops, "PATIENCE", 0.0)
    with pytest.raises(RuntimeError, match=r"^skip connection"), stops.last_words(tmp_path, 0, 2):
        raise RuntimeError("skip connection of width 3 expected, got 4: gloomy, timed out")
    text = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer"
    with (
        pytest.raises(ConnectionError, match=r"without a word: .*pair.cc:547\] Connection closed"),
        stops.last_words(tmp_path, 0, 2),
    ):
        raise RuntimeError(text)


def hold(folder, ready, done):
    class Wait:
        def started(self, trainer):
            (folder / "checkpoints/.step_00000001.tmp").mkdir()
            ready.set()
            done.wait(60)

    trainer(folder, 1, callbacks=[Wait()]).run()


def test_one_run_at_a_time_in_a_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    child = context.Process(target=hold, args=(tmp_path, ready, done), daemon=True)
    child.start()
    assert ready.wait(60)
    holder = f"where process {child.pid} on {socket.gethostname()} trains"
    with pytest.raises(RuntimeError, match=f"folder: expected one that no other run .*{holder}"):
        trainer(tmp_path, 1).run()
    assert saved(tmp_path) == [".step_00000001.tmp"], "the other run's draft is left alone"
    child.kill()
    child.join()
    trainer(tmp_path, 1).run()
    assert saved(tmp_path) == ["step_00000001"]
