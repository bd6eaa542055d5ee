"""The real F5-TTS and CosyVoice3 models' numbers, computed once by their own code."""

import pytest
import torch

from imf_kernels import grids, guidance, sampler
from imf_kernels.models import DiT
from tests.models.tools import golden

F5 = [("f5_base_b1", "f5_v0"), ("f5_v1_b1", "f5_v1")]


@pytest.fixture(params=F5, ids=lambda item: item[1])
def f5(request):
    name, variant = request.param
    tensors, metadata, state = golden(name)
    model = DiT.from_state_dict(state, variant).eval()
    cond = model.prepare(tensors["cond_padded"], text=tensors["text"], guided=True)
    return model, cond, tensors, metadata


def test_f5_forward(f5):
    model, cond, tensors, metadata = f5
    t = torch.tensor([float(metadata["t"])])
    with torch.no_grad():
        conditional, unconditional = model(tensors["x"], t, t, cond).chunk(2)
    torch.testing.assert_close(conditional, tensors["pred_cond"], rtol=0, atol=2e-5)
    torch.testing.assert_close(unconditional, tensors["pred_uncond"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("guided", [True, False])
def test_f5_sample(f5, guided):
    model, cond, tensors, metadata = f5
    grid = grids.epss(int(metadata["steps"]), float(metadata["sway"]))
    w = guidance.from_f5(float(metadata["cfg_strength"])) if guided else None
    cond = cond if guided else cond.conditional(1)
    mel = sampler.sample(model, tensors["noise"], cond, grid, guidance=w)
    prompt = tensors["cond"]
    mel[:, : prompt.shape[1]] = prompt
    expected = tensors["sample_cfg2" if guided else "sample_nocfg"]
    torch.testing.assert_close(mel, expected, rtol=0, atol=1e-4)


@pytest.fixture(params=["cosy3_dit", "cosy3_dit_stream"])
def cosyvoice3(request):
    tensors, metadata, state = golden(request.param)
    model = DiT.from_state_dict(state, "cosyvoice3").eval()
    tensors = {k: v.mT if v.ndim == 3 else v for k, v in tensors.items()}
    cond = model.prepare(
        tensors["cond"],
        mu=tensors["mu"],
        spks=tensors["spks"],
        guided=True,
        streaming=metadata["streaming"] == "True",
    )
    return model, cond, tensors, metadata


def test_cosyvoice3_forward(cosyvoice3):
    model, cond, tensors, metadata = cosyvoice3
    t = torch.tensor([float(metadata["t"])])
    with torch.no_grad():
        both = model(tensors["x"], t, t, cond)
    torch.testing.assert_close(both, tensors["estimator_out"], rtol=0, atol=2e-5)


def test_cosyvoice3_sample(cosyvoice3):
    model, cond, tensors, metadata = cosyvoice3
    w = guidance.from_cosyvoice(float(metadata["inference_cfg_rate"]))
    grid = grids.cosine(int(metadata["steps"]))
    mel = sampler.sample(model, tensors["noise"], cond, grid, guidance=w)
    torch.testing.assert_close(mel, tensors["mel"], rtol=0, atol=1e-4)


def test_the_variants_differ_where_the_state_dicts_do_not():
    tensors, _, state = golden("f5_v1_b1")
    t = torch.tensor([0.3])
    with torch.no_grad():
        out = []
        for variant in ("f5_v0", "f5_v1"):
            model = DiT.from_state_dict(state, variant).eval()
            cond = model.prepare(tensors["cond_padded"], text=tensors["text"])
            out.append(model(tensors["x"], t, t, cond))
    assert (out[0] - out[1]).abs().max() > 1e-2
