"""Train the teacher that the quickstart ships: conditional flow matching on the espeak corpus.

    python -m examples.quickstart.train_teacher --minutes 20

`v(z_t, t)` is regressed on `z_1 - z_0` along `z_t = (1 - t) z_0 + t z_1` (arXiv 2210.02747), with
mu, spks and prompt dropped together in a fifth of the rows, so that the model can be guided.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from rich.progress import Progress, TextColumn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from examples.quickstart.corpus import build_corpus
from examples.quickstart.data import training_batches
from examples.quickstart.model import TEACHER, Token2Mel, save_teacher, teacher_config
from imf_kernels.objectives import Batch

DROP = 0.2
BATCH_SIZE = 12
WARMUP = 100
EMA_DECAY = 0.998
CLIP = 1.0


def flow_matching_loss(model: Token2Mel, batch: Batch, generator: torch.Generator) -> Tensor:
    """Mean squared error over all valid frames; t is drawn as CosyVoice draws it."""
    x1, lengths = batch.x1, batch.lengths
    rows = x1.shape[0]
    t = 1 - torch.cos(torch.pi / 2 * torch.rand(rows, generator=generator))
    z0 = torch.randn(x1.shape, generator=generator)
    z = torch.lerp(z0, x1, t[:, None, None])
    keep = (torch.rand(rows, generator=generator) >= DROP).float()
    features = model.encoder(batch.conditions["phonemes"], batch.conditions["speakers"])
    cond = model.estimator.prepare(
        batch.conditions["prompt"] * keep[:, None, None],
        lengths,
        mu=features["mu"] * keep[:, None, None],
        spks=features["spks"] * keep[:, None],
    )
    error = (model(z, t, t, cond) - (x1 - z0)).square()
    inside = batch.valid()
    return (error * inside[:, :, None]).sum() / (inside.sum() * x1.shape[2])


def train(minutes: float, seed: int, peak: float) -> Token2Mel:
    """Train for `minutes` of wall time; warm-up, then a cosine to 0 over the time left."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    corpus = build_corpus(seed)
    model = Token2Mel(corpus.symbols, corpus.speakers, teacher_config())
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), fused=True)
    batches = training_batches(corpus.train, BATCH_SIZE, generator, torch.device("cpu"))

    start, budget = time.monotonic(), 60 * minutes
    columns = (*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.4f}"))
    with Progress(*columns) as progress:
        task = progress.add_task("training the teacher", total=budget, loss=math.nan)
        mean, update = math.nan, 0
        while (elapsed := time.monotonic() - start) < budget:
            decay = 0.5 * (1 + math.cos(math.pi * elapsed / budget))
            optimizer.param_groups[0]["lr"] = peak * min(1, (update + 1) / WARMUP) * decay
            loss = flow_matching_loss(model, next(batches), generator)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            ema.update_parameters(model)
            update += 1
            mean = loss.item() if math.isnan(mean) else 0.98 * mean + 0.02 * loss.item()
            progress.update(task, completed=elapsed, loss=mean)
            if update % 100 == 0:
                progress.console.print(f"update {update}: loss {mean:.4f}, {elapsed:.0f} s")
    return ema.module.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=TEACHER)
    args = parser.parse_args()
    save_teacher(train(args.minutes, args.seed, args.lr), args.out)


if __name__ == "__main__":
    main()
