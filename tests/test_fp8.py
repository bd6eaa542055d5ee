import warnings

import pytest
import torch

from imf_kernels import fp8
from imf_kernels.fp8 import Accuracy, Timing
from imf_kernels.models.config import FP8_LAYERS
from tests.models.tools import conditions, small_model


@pytest.fixture
def model():
    return small_model("f5_v1").student().eval()


@pytest.fixture
def on_device(monkeypatch):
    """As on a device with FP8 products, where everything takes as long as its bytes."""
    monkeypatch.setattr(fp8, "runs_on", lambda device: True)

    def microseconds(run, device):
        run()
        plain, layer, x = run.args
        in_fp8 = bool(plain.config.fp8)
        frames = (x if isinstance(x, torch.Tensor) else x.q).shape[0]
        return {"qkv": 1.0 - 0.5 * in_fp8, "out": 1.0 + in_fp8, "ff": frames - 9.0 * in_fp8}[layer]

    monkeypatch.setattr(fp8, "_microseconds", microseconds)


class TestQuantize:
    def test_everything_where_nothing_is_asked(self, model):
        assert fp8.quantize(model).config.fp8 == FP8_LAYERS

    def test_nothing_where_the_device_has_no_such_products(self, model):
        with pytest.warns(RuntimeWarning, match="no layer is in FP8: cpu has no such products"):
            quantised = fp8.quantize(model, frames=[100])
        assert quantised.config.fp8 == ()
        assert quantised.dtype == torch.bfloat16

    def test_slower_layers_stay_and_it_says_so(self, model, on_device):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            quantised = fp8.quantize(model, frames=[17, 100])
        assert quantised.config.fp8 == ("qkv", "ff")
        assert [str(warning.message) for warning in said] == [
            "the layer 'out' stays in bfloat16: FP8 takes 1.0 us against 0.5 over 17 frames, "
            "1.0 us against 0.5 over 100 frames"
        ]
        assert said[0].filename == __file__

    def test_measures_every_layer_and_number_of_frames(self, model, on_device):
        timings = fp8.measure(model, [17, 100])
        assert [(t.layer, t.frames) for t in timings] == [
            (layer, frames) for layer in FP8_LAYERS for frames in (17, 100)
        ]
        assert timings[0] == Timing("qkv", 17, bfloat16=0.5, fp8=0.25)  # of two blocks each
        assert not model.config.fp8
        assert model.dtype == torch.float32

    @pytest.mark.parametrize("frames", [[], [0], [1.5]])
    def test_frames_are_positive_integers(self, model, on_device, frames):
        with pytest.raises(ValueError, match="frames: expected"):
            fp8.measure(model, frames)


class TestAccuracy:
    def solve(self, model, quantised, **options):
        noise = torch.randn(2, 30, 12)
        return fp8.accuracy(model, quantised, noise, conditions(model, [30, 20]), nfe=2, **options)

    def test_of_itself_is_zero(self, model):
        assert self.solve(model, model, bound=0.0) == Accuracy(0.0, 0.0)

    @pytest.mark.parametrize("guidance", [None, 2.0])
    def test_within_and_beyond_the_bound(self, model, guidance):
        found = self.solve(model, model.fp8(), guidance=guidance, bound=0.05)
        assert 0.002 < found.relative_rms < 0.05
        assert found.max_abs > found.relative_rms
        with pytest.raises(RuntimeError, match=r"relative RMS of 0\.001 of float32's, got Accura"):
            self.solve(model, model.fp8(), guidance=guidance, bound=0.001)

    def test_nan_is_beyond_every_bound(self, model):
        quantised = model.fp8()
        quantised.transformer_blocks[0].ff.ff[2].bias.fill_(torch.nan)
        with pytest.raises(RuntimeError, match="quantised: expected mels within"):
            self.solve(model, quantised, bound=10.0)

    def test_only_frames_of_rows_count(self, model):
        """Frames beyond a row stay noise, which is right in both."""
        quantised = model.fp8()
        noise, given = torch.randn(1, 30, 12), conditions(model, [20])
        given["prompt"] = torch.nn.functional.pad(given["prompt"], (0, 0, 0, 10))
        padded = fp8.accuracy(model, quantised, 1e3 * noise, given, nfe=1)
        alone = fp8.accuracy(model, quantised, 1e3 * noise[:, :20], conditions(model, [20]), nfe=1)
        assert padded == pytest.approx(alone, rel=0.1)

    def test_is_measured_against_float32(self, model):
        with pytest.raises(ValueError, match=r"model: expected one in float32, got torch\.bfloat"):
            self.solve(model.bfloat16(), model)
