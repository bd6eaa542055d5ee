import numpy
import pytest
import torch

from imf_kernels.data.mels import NAMED
from imf_kernels.distill.griffin_lim import GriffinLim, seeded
from tests.distill.made import wave


@pytest.mark.parametrize("name", ["vocos", "cosyvoice2"])
def test_the_mel_of_what_it_makes_is_the_mel_it_was_given(name):
    mel = NAMED[name]
    given = mel(wave(6, 0.5))
    made = GriffinLim(mel)(given.T)
    assert numpy.array_equal(made, GriffinLim(mel)(given.T))
    assert len(made) == mel.hop * (len(given) - 1)
    again = mel(torch.from_numpy(made))[2:-2]
    silence, other = torch.full_like(given, -5.0), mel(wave(11, 0.5))
    distance = [
        float((again - x[2 : 2 + len(again)]).abs().mean()) for x in (given, silence, other)
    ]
    assert distance[0] < 0.6 * min(distance[1:])


def test_the_seed_has_the_name_of_the_librosa_at_hand(monkeypatch):
    monkeypatch.setattr("librosa.griffinlim", lambda S, *, random_state=None: S)
    assert seeded(3) == {"random_state": 3}
    monkeypatch.setattr("librosa.griffinlim", lambda S, *, rng=None, random_state=None: S)
    assert seeded(3) == {"rng": 3}
