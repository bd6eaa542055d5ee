"""Signals, and kills."""

import random
import signal
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


class Twice:
    def started(self, trainer):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_a_second_signal_acts_as_usual(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, 4, callbacks=[Twice()]).run()
    assert saved(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_handlers_are_put_back(tmp_path, number):
    before = signal.getsignal(number)

    class Ask:
        def started(self, trainer):
            assert signal.getsignal(number) is not before
            signal.raise_signal(number)
            assert signal.getsignal(number) is before

    trainer(tmp_path / "whole", 2).run()
    assert signal.getsignal(number) is before
    records = Records()
    with pytest.raises(Stopped, match=number.name) as caught:
        trainer(tmp_path / "stopped", 4, callbacks=[Ask(), records]).run()
    assert signal.getsignal(number) is before
    assert caught.value.update == 1
    assert caught.value.path == tmp_path / "stopped" / "checkpoints" / "step_00000001"
    assert records.told == [("started", 0), ("saved", "step_00000001"), ("ended", 1)]


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


def test_no_checkpoint_after_a_bad_update(tmp_path):
    """A signal during one: the next good one is saved."""
    records = Records()

    def made(student, batch):
        bad = records.records == []
        if bad:
            signal.raise_signal(signal.SIGTERM)
        loss = student.net[0].weight.square().sum() * (torch.nan if bad else 1.0)
        return loss, {}

    with pytest.warns(UserWarning, match="skipped"), pytest.raises(Stopped, match="update 2"):
        trainer(tmp_path, 5, made=made, callbacks=[records]).run()
    assert saved(tmp_path) == ["step_00000002"]


# -- kills ----------------------------------------------------------------------------------------

UPDATES, KILLS = 12, 20
OPTIONS = {"ema_decay": 0.9, "accumulate": 2, "save_every": 2, "keep": 2}


def work(folder, aim, half):
    """A run; half of the aim-th file of its checkpoints is written, then it waits to be killed."""
    own, written = saves.write, []

    def write(path, data):
        written.append(path)
        if len(written) == aim:
            path.write_bytes(data[: len(data) // 2])
            half.value = 1
            time.sleep(60)
        own(path, data)

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
        assert saved(folder) == ["step_00000010", "step_00000012"]
        assert same(weights(trainer(folder, UPDATES, **OPTIONS).run()), want)
    assert half_written == KILLS // 2


def test_last_words_of_one_process_are_its_own(tmp_path):
    with pytest.raises(RuntimeError, match="gloo"), stops.last_words(tmp_path, 0, 1):
        raise RuntimeError("gloo says something")
    assert list(tmp_path.iterdir()) == []
