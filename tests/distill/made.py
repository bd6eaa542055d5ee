"""What the tiny recipes read, made: checkpoints as the clients write them, and data."""

import io
import math
import string
from pathlib import Path

import torch

from imf_kernels.models import checkpoints
from imf_kernels.models.token_encoder import ConformerEncoder
from tests.hosts.cosyvoice_host import small
from tests.models.tools import small_model

RATE = 24_000
VOCAB = string.ascii_lowercase[:20]


def wave(index: int, seconds: float) -> torch.Tensor:
    """A tone that slides, with a breath of noise."""
    time = torch.arange(int(RATE * seconds)) / RATE
    pitch = 110 * 2 ** (index / 12) * (1 + 0.1 * torch.sin(3 * time))
    phase = 2 * math.pi * torch.cumsum(pitch, 0) / RATE
    noise = torch.randn(time.shape, generator=torch.Generator().manual_seed(index))
    return 0.3 * torch.sin(phase) + 0.01 * noise


def f5(folder: Path, count: int = 12) -> None:
    """`pretrained/model.safetensors`, `pretrained/vocab.txt` and `audio/` with transcripts."""
    import soundfile

    (folder / "pretrained").mkdir()
    (folder / "audio").mkdir()
    model = small_model("f5_v1", channels=100, heads=1, head_dim=64)
    weights = {f"ema_model.transformer.{k}": v for k, v in model.state_dict().items()}
    checkpoints.write(folder / "pretrained/model.safetensors", weights)
    (folder / "pretrained/vocab.txt").write_text("".join(f"{token}\n" for token in VOCAB))
    for i in range(count):
        path = folder / f"audio/{i:02d}.wav"
        soundfile.write(path, wave(i, 0.4 + 0.03 * i).numpy(), RATE)
        path.with_suffix(".txt").write_text(VOCAB[i % 7 : i % 7 + 4 + i % 5])


def cosyvoice2(folder: Path, count: int = 12) -> None:
    """`pretrained/flow.pt` and `data/data.list` with a parquet file."""
    import pyarrow
    import pyarrow.parquet
    import soundfile

    (folder / "pretrained").mkdir()
    (folder / "data").mkdir()
    torch.manual_seed(0)
    sizes = {"vocab": 30, "dim": 32, "channels": 80, "speaker": 192, "heads": 2, "inner": 48}
    encoder = ConformerEncoder(**sizes, blocks=1, up_blocks=1, lookahead=3)
    weights = {f"decoder.estimator.{k}": v for k, v in small("unet").state_dict().items()}
    checkpoints.write(folder / "pretrained/flow.pt", encoder.state_dict() | weights)
    rows = []
    for i in range(count):
        seconds, file = 1.0 + 0.04 * i, io.BytesIO()
        soundfile.write(file, wave(i, seconds).numpy(), RATE, format="WAV")
        generator = torch.Generator().manual_seed(i)
        speaker = torch.randn(192, generator=generator).tolist()
        tokens = torch.randint(30, (int(25 * seconds),), generator=generator).tolist()
        row = {"utt": f"utt_{i:02d}", "audio_data": file.getvalue(), "speech_token": tokens}
        rows.append({**row, "utt_embedding": speaker, "spk_embedding": speaker})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data/0.parquet")
    (folder / "data/data.list").write_text("data/0.parquet\n")
