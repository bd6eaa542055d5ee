"""Train the teacher that text2mel ships: F5-TTS's flow matching on the espeak corpus.

    python -m examples.text2mel.train_teacher --updates 6000 --folder out/text2mel_teacher

Infilling of spans of .7 to 1 of the utterance; the prompt is dropped in .3 of the batches, prompt
and text together in .2, so that the model can be guided. The start is the quickstart's teacher,
which knows mels from aligned phonemes; over the first updates the alignment is taken away.

Interrupted, the same command goes on from the last checkpoint in the folder: batches and noise are
functions of the update's number. More `--updates` continue a finished run too, on the longer
schedule.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from examples.quickstart.corpus import Utterance, build_corpus
from examples.quickstart.model import load_teacher as load_aligned
from examples.quickstart.split import Split
from examples.text2mel.data import TrainingBatches, continuation, generator_of
from examples.text2mel.model import save_teacher, untrained
from examples.text2mel.recogniser import accuracy, train_recogniser
from imf_kernels import grids
from imf_kernels.files import replacing
from imf_kernels.models import DiT
from imf_kernels.objectives import Batch

BATCH_SIZE = 12
WARMUP = 100
EMA_DECAY = 0.998
CLIP = 1.0
DROP_PROMPT = 0.3
DROP_ALL = 0.2
ALIGNED_SHARE = 0.25
"""Share of the updates over which the text goes from its true places to even ones."""

HEARD_STEPS = 16
HEARD_GUIDANCE = 3.0
SAVE_SECONDS = 180.0
HEAR_SECONDS = 600.0


def flow_matching_loss(model: DiT, batch: Batch, generator: torch.Generator) -> Tensor:
    """Mean squared error over the spans; t is drawn as CosyVoice draws it, early times more."""
    x1, rows = batch.x1, batch.x1.shape[0]
    t = 1 - torch.cos(torch.pi / 2 * torch.rand(rows, generator=generator))
    z0 = torch.randn(x1.shape, generator=generator)
    z = torch.lerp(z0, x1, t[:, None, None])
    drop_prompt, drop_all = torch.rand(2, generator=generator).tolist()
    prompt, dropped = batch.conditions["prompt"], drop_all < DROP_ALL
    if drop_prompt < DROP_PROMPT:
        prompt = torch.zeros_like(prompt)
    text = batch.conditions["text"]
    cond = model.prepare(prompt, batch.lengths, text=text, guided=dropped)
    if dropped:
        cond = cond.take(slice(rows, None))
    error = (model(z, t, t, cond) - (x1 - z0)).square()
    inside = batch.counted("span")
    return (error * inside[:, :, None]).sum() / (inside.sum() * x1.shape[2])


class Run:
    """A training run and its state: weights, their average, the optimizer, the updates done."""

    def __init__(
        self, model: DiT, utterances: list[Utterance], updates: int, peak: float, seed: int
    ) -> None:
        self.model, self.updates, self.peak, self.seed = model.train(), updates, peak, seed
        model.fuse_weights()
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=peak, betas=(0.9, 0.98), fused=True
        )
        self.batches = TrainingBatches(utterances, BATCH_SIZE, seed)
        self.update = 0

    def step(self) -> float:
        """One update: warm-up, then a cosine to 0; returns the loss."""
        done = self.update / self.updates
        warm = min(1.0, (self.update + 1) / WARMUP)
        rate = self.peak * warm * 0.5 * (1 + math.cos(math.pi * done))
        self.optimizer.param_groups[0]["lr"] = rate
        batch = self.batches(self.update, evenness=min(1.0, done / ALIGNED_SHARE))
        noise = generator_of(self.seed, "noise", self.update)
        loss = flow_matching_loss(self.model, batch, noise)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.ema.update_parameters(self.model)
        self.update += 1
        return loss.item()

    @property
    def averaged(self) -> DiT:
        return self.ema.module

    def save(self, path: Path) -> None:
        parts = {"model": self.model, "ema": self.ema, "optimizer": self.optimizer}
        state = {name: part.state_dict() for name, part in parts.items()}
        with replacing(path) as temporary:
            torch.save({**state, "update": self.update}, temporary)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.update = state["update"]


def training_utterances(symbols: Sequence[str], corpora: int) -> list[Utterance]:
    """The training splits of some corpora, without what any of them keeps for dev and test."""
    built = [build_corpus(seed, symbols) for seed in range(corpora)]
    kept_out = {u.text for corpus in built for u in (*corpus.dev, *corpus.test)}
    return [u for corpus in built for u in corpus.train if u.text not in kept_out]


def train(folder: Path, updates: int, corpora: int, peak: float, seed: int) -> None:
    torch.manual_seed(seed)
    start = time.monotonic()
    aligned = load_aligned()
    corpus = build_corpus(0, aligned.symbols)
    recogniser = train_recogniser(corpus.train, len(aligned.symbols), seed)
    dev = Split(corpus.dev, seed, torch.device("cpu"), continuation)

    def heard(mels: Sequence[Tensor]) -> float:
        return accuracy(recogniser, mels, [u.phonemes for u in dev.utterances], dev.prompts)

    ceiling = heard([u.mel for u in dev.utterances])
    print(f"phoneme accuracy of the true dev mels: {ceiling:.3f}", flush=True)

    utterances = training_utterances(aligned.symbols, corpora)
    run = Run(untrained(aligned), utterances, updates, peak, seed)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        run.load(checkpoint)
        print(f"resumed at update {run.update}", flush=True)
    saved = listened = time.monotonic()
    mean = math.nan
    while run.update < updates:
        loss = run.step()
        mean = loss if math.isnan(mean) else 0.98 * mean + 0.02 * loss
        now, last = time.monotonic(), run.update == updates
        if run.update % 25 == 0 or last:
            print(
                f"update {run.update}/{updates}: loss {mean:.4f}, {now - start:.0f} s", flush=True
            )
        if last or now - saved > SAVE_SECONDS:
            run.save(checkpoint)
            save_teacher(run.averaged, aligned.symbols, folder / "teacher.safetensors")
            saved = time.monotonic()
        if last or now - listened > HEAR_SECONDS:
            got = heard(dev.solve(run.averaged, grids.uniform(HEARD_STEPS), HEARD_GUIDANCE))
            print(f"update {run.update}: phoneme accuracy {got:.3f} on dev", flush=True)
            listened = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints and the teacher")
    parser.add_argument("--updates", type=int, default=6000)
    parser.add_argument("--corpora", type=int, default=6, help="espeak corpora of 704 utterances")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    train(args.folder, args.updates, args.corpora, args.lr, args.seed)


if __name__ == "__main__":
    main()
