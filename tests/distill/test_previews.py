import numpy
import pytest
import torch

from imf_kernels import Teacher
from imf_kernels.distill.held_out import FineSolves
from imf_kernels.distill.logs import TensorBoard
from imf_kernels.distill.previews import Previews
from tests.distill.runs import Line, batches, fake_trainer, record

COLUMNS = ["truth", "teacher", "nfe 1", "nfe 2"]


def previews(tmp_path, **options):
    solves = FineSolves(Teacher(Line(), 2.0), tmp_path / "solves", steps=4)
    return Previews(batches(1)[0], solves, every=2, nfe=(1, 2), **options)


def test_columns_are_what_they_are_called(tmp_path):
    shown, trainer = previews(tmp_path), fake_trainer(tmp_path, Line(3.0).train())
    columns, batch = shown.mels(trainer), shown.batch
    assert list(columns) == COLUMNS
    mask = batch.counted("span")
    for name, mels in columns.items():
        assert [len(mel) for mel in mels] == batch.lengths.tolist()
        for mel, truth, counted in zip(mels, batch.x1, mask, strict=True):
            counted = counted[: len(mel)]
            assert torch.equal(mel[~counted], truth[: len(mel)][~counted]), "the prompt is given"
            assert torch.equal(mel, truth[: len(mel)]) == (name == "truth")
    fine = shown.solves.of(batch)
    assert torch.equal(columns["teacher"][0][1:4], fine[0, 1:4])


def test_pictures_and_sounds(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    from matplotlib.image import imread

    heard = []

    def vocoder(mel):
        heard.append(mel.shape)
        return torch.linspace(-0.5, 0.5, 100 * mel.shape[1])

    board, trainer = TensorBoard(), fake_trainer(tmp_path, Line().train(), updates=3)
    shown = previews(tmp_path, vocoder=vocoder, rate=8000, tensorboard=board)
    board.started(trainer)
    for update in (1, 2, 3):
        trainer.update = update
        shown.updated(trainer, record(update))
    board.ended(trainer)
    folder = tmp_path / "previews"
    assert sorted(path.name for path in folder.glob("*.png")) == ["00000002.png", "00000003.png"]
    image = imread(folder / "00000003.png")
    assert image.ndim == 3
    assert numpy.ptp(image) > 0.5
    assert set(heard) == {(4, 6), (4, 2)}, "(C, n) of each utterance"
    names = sorted(path.name for path in folder.glob("00000003_*.wav"))
    assert names == sorted(
        f"00000003_{i}_{name.replace(' ', '')}.wav" for i in (0, 1) for name in COLUMNS
    )
    samples, rate = soundfile.read(folder / "00000003_0_nfe1.wav")
    assert (len(samples), rate) == (600, 8000)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Images("previews")] == [2, 3]
    assert [e.step for e in events.Audio("previews/1_teacher")] == [2, 3]


def test_other_ranks_compute_and_do_not_write(tmp_path):
    trainer = fake_trainer(tmp_path, Line().train(), rank=1, ranks=2, update=2)
    previews(tmp_path).updated(trainer, record(2))
    assert trainer.student.asked, "sharded weights want all ranks"
    assert not (tmp_path / "previews").exists()


def test_a_vocoder_and_its_rate(tmp_path):
    with pytest.raises(ValueError, match="rate: expected one with a vocoder"):
        previews(tmp_path, rate=8000)
