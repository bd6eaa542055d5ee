"""Hosts whose solves go through the machinery of graphs answer what they answered without."""

import copy
import pickle

import pytest
import torch

from imf_kernels.hosts.cosyvoice import CFM
from imf_kernels.hosts.f5_tts import F5TTS
from tests.hosts.cosyvoice_host import host_inputs, small
from tests.models.tools import relative_rms, small_model

BUCKETS = [(1, 40), (2, 40)]


def listening(model):
    student = model.student().eval()
    with torch.no_grad():
        student.time_embed_mixer.weight += 0.1 * torch.randn_like(student.time_embed_mixer.weight)
    return student


def request():
    """Two rows of a guided host, or of a student's."""
    return {
        "cond": torch.randn(2, 9, 12),
        "text": torch.tensor([[1, 2, 3, -1], [4, 5, 6, 7]]),
        "duration": torch.tensor([40, 23]),
        "lens": torch.tensor([9, 5]),
        "cfg_strength": 1.5,
        "sway_sampling_coef": -1.0,
        "seed": 3,
    }


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("variant", ["f5_v0", "f5_v1"])
def test_f5(taped, variant, distilled):
    model = small_model(variant)
    host = F5TTS(listening(model) if distilled else model, nfe=3 if distilled else None).eval()
    given = request() | {"steps": 3}
    with torch.inference_mode():
        want, states = host.sample(**given)
        graphs = host.capture(None if distilled else 3, buckets=BUCKETS)
        got, last = host.sample(**given)
    assert graphs.stats().hits == 1
    assert relative_rms(got, want) <= 1e-5
    assert relative_rms(last, states) <= 1e-5
    host.sample(**given, trajectory=True)
    if not distilled:
        host.sample(**given | {"steps": 2})
        host.sample(**given | {"cfg_strength": 0.0})
    assert graphs.stats().hits == 1, "what was not captured runs as before"
    for copied in (copy.deepcopy(host), pickle.loads(pickle.dumps(host))):
        assert torch.equal(copied.sample(**given)[0], want)
    host.capture(2, buckets=BUCKETS)
    with pytest.raises(RuntimeError, match="closed"):
        graphs.warm_up()


def test_f5_told_its_guidance(taped):
    host = F5TTS(small_model("f5_v1")).student((1.0, 4.0), nfe=3).eval()
    torch.nn.init.normal_(host.transformer.guidance_embed.mlp[2].weight, std=0.1)
    requests = [given := request() | {"cfg_strength": 0.0}, given | {"cfg_strength": 2.0}]
    wants = [host.sample(**one)[0] for one in requests]
    assert relative_rms(*wants) > 1e-3
    graphs = host.capture(buckets=BUCKETS)
    for one, want in zip(requests, wants, strict=True):
        assert relative_rms(host.sample(**one)[0], want) <= 1e-5
    assert graphs.stats().hits == 2


@pytest.mark.parametrize("family", ["dit", "unet"])
@pytest.mark.parametrize("distilled", [False, True])
def test_cosyvoice(taped, family, distilled):
    model = small(family)
    cfm = CFM(listening(model) if distilled else model, nfe=2 if distilled else None).eval()
    given = host_inputs([40, 23]) | {"n_timesteps": 10}
    want, _ = cfm(**given)
    graphs = cfm.capture(buckets=BUCKETS)
    assert graphs.nfe == (2 if distilled else 10)
    got, _ = cfm(**given)
    assert graphs.stats().hits == 1
    assert relative_rms(got, want) <= 1e-5
    assert not got[1, :, 23:].any()
    cfm(**given, streaming=True)
    cfm.grid = "uniform"
    assert relative_rms(cfm(**given)[0], want) > 1e-4, "another grid needs no other capture"
    assert graphs.stats().hits == 2
    assert copy.deepcopy(cfm)(**given)[0].shape == want.shape
