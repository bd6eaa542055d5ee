"""The classifier two-sample test of mel patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from imf_kernels.metrics import mels


@torch.inference_mode(False)  # the classifier trains, whatever mode the caller is in
def c2st(generated: Sequence[Tensor], truth: Sequence[Tensor], seed: int = 0) -> float:
    """Classifier two-sample test: how often a small network tells generated frames from true ones.

    Balanced accuracy per frame; .5 (indistinguishable) is best, 1 is worst. The classifier sees
    3-frame patches (a convolution of kernel 3, C to 48 channels, ReLU, one output) and is judged
    only on utterances it was not trained on: two folds, each judged by the other's classifier.

    Args:
        generated: At least two mels `(N_i, C)`, of about unit variance.
        truth: Their true counterparts, of the same shapes; both of a pair are in the same fold.
        seed: Of the folds and the classifier's weights; the result varies by about .02 with it.
    """
    mels.check(generated, truth)
    if len(generated) < 2:
        raise ValueError(
            f"generated: expected at least 2 mels, for two folds, got {len(generated)}"
        )
    fakes, trues = mels.patches(generated), mels.patches(truth)
    order = torch.randperm(len(fakes), generator=torch.Generator().manual_seed(seed)).tolist()
    folds = [
        (torch.cat([fakes[i] for i in half]), torch.cat([trues[i] for i in half]))
        for half in (order[::2], order[1::2])
    ]
    correct = torch.zeros(2)  # of generated, of true frames
    for (train_fakes, train_trues), (held_fakes, held_trues) in (folds, folds[::-1]):
        classifier = _trained(train_fakes, train_trues, seed)
        with torch.no_grad():
            correct[0] += (classifier(held_fakes) > 0).sum()
            correct[1] += (classifier(held_trues) <= 0).sum()
    return (correct / sum(len(fake) for fake in fakes)).mean().item()


def _trained(fakes: Tensor, trues: Tensor, seed: int) -> nn.Module:
    """The two-layer classifier, fitted full batch; positive output means generated."""
    patches = torch.cat([fakes, trues])
    labels = torch.cat([torch.ones(len(fakes), 1), torch.zeros(len(trues), 1)])
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        classifier = nn.Sequential(nn.Linear(patches.shape[1], 48), nn.ReLU(), nn.Linear(48, 1))
        optimizer = torch.optim.Adam(classifier.parameters(), lr=3e-3)
        for _ in range(120):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(classifier(patches), labels).backward()
            optimizer.step()
    return classifier
