"""How good generated mels are: five numbers, because each alone can be fooled.

Mel-cepstral distortion rewards blur: the mean of all plausible mels beats any single one. The
Frechet distance and the sharpness see blur, and the classifier sees whatever is left; the
distance to the teacher tells how much of the error is the student's own.

All functions take two lists of normalised log-mels, `(N_i, 80)` float each, on any device:
`generated[i]` and `truth[i]` are the same utterance, frame by frame, prompt frames cut off.
They are deterministic, and work on the CPU.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from examples.quickstart.audio import natural_log_mel

CEPSTRA = 13
PATCH_FRAMES = 3


def mcd(generated: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Mel-cepstral distortion in dB, frames aligned as they are (no time warping); 0 is best.

    `10 / ln 10 * sqrt(2 * sum_m (c_m - c'_m)^2)`, averaged over all frames, where the natural
    log-mel is `sum_m c_m cos(pi m (k + 1/2) / 80)` and m = 1 to 13: the root mean square over
    the mel axis of the difference between the two smoothed spectra, loudness (m = 0) left out.
    """
    _check_pairs(generated, truth)
    difference = natural_log_mel(_frames(generated)) - natural_log_mel(_frames(truth))
    channels = difference.shape[1]
    m = torch.arange(1, CEPSTRA + 1, dtype=torch.float64)
    k = torch.arange(channels, dtype=torch.float64)
    basis = 2 / channels * torch.cos(math.pi / channels * (k[:, None] + 0.5) * m)  # DCT-II
    per_frame = (2 * (difference @ basis).square().sum(dim=1)).sqrt()
    return 10 / math.log(10) * per_frame.mean().item()


def frechet(generated: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Squared Frechet distance between Gaussians fitted to 3-frame patches; 0 is best.

    `|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2))` over the 240 values of a patch, in squared units
    of the normalised log-mel (a patch's total variance is about 240). Some thousand patches
    determine the 240 x 240 covariances; nothing is inverted, so near-singular ones do no harm.
    """
    _check_pairs(generated, truth)
    (mean_g, cov_g), (mean_t, cov_t) = (
        (patches.mean(dim=0), torch.cov(patches.T))
        for patches in (torch.cat(_patches(mels)).double() for mels in (generated, truth))
    )
    # tr (S S')^(1/2) = tr (S^(1/2) S' S^(1/2))^(1/2), whose argument is symmetric.
    eigenvalues, vectors = torch.linalg.eigh(cov_t)
    root = vectors * eigenvalues.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_g @ root).clamp(min=0).sqrt().sum()
    spread = cov_g.trace() + cov_t.trace() - 2 * cross
    return ((mean_g - mean_t).square().sum() + spread).clamp(min=0).item()


def sharpness(generated: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Mel-axis detail relative to the truth; 1 is equal, below is blur, above is noise.

    The mean magnitude of the second difference along the mel axis (harmonics and formant edges,
    not spectral slope), generated over truth.
    """
    _check_pairs(generated, truth)
    detail_g, detail_t = (
        _frames(mels).diff(n=2, dim=1).abs().mean().item() for mels in (generated, truth)
    )
    return detail_g / detail_t


@torch.inference_mode(False)  # the classifier trains, whatever mode the caller is in
def c2st(generated: Sequence[Tensor], truth: Sequence[Tensor], seed: int = 0) -> float:
    """Classifier two-sample test: how often a small network tells generated frames from true ones.

    Balanced accuracy per frame; .5 (indistinguishable) is best, 1 is worst. The classifier sees
    3-frame patches (a convolution of kernel 3, 80 to 48 channels, ReLU, one output) and is judged
    only on utterances it was not trained on: two folds, each judged by the other's classifier.

    Args:
        generated: At least two mels.
        truth: Their true counterparts; both of a pair are in the same fold.
        seed: Of the folds and the classifier's weights; the result varies by about .02 with it.
    """
    _check_pairs(generated, truth)
    if len(generated) < 2:
        raise ValueError(f"generated must hold at least 2 mels for two folds, got {len(generated)}")
    fakes, trues = _patches(generated), _patches(truth)
    order = torch.randperm(len(fakes), generator=torch.Generator().manual_seed(seed)).tolist()
    folds = [
        (torch.cat([fakes[i] for i in half]), torch.cat([trues[i] for i in half]))
        for half in (order[::2], order[1::2])
    ]
    correct = torch.zeros(2)  # of generated, of true frames
    for (train_fakes, train_trues), (held_fakes, held_trues) in (folds, folds[::-1]):
        classifier = _train_classifier(train_fakes, train_trues, seed)
        with torch.no_grad():
            correct[0] += (classifier(held_fakes) > 0).sum()
            correct[1] += (classifier(held_trues) <= 0).sum()
    return (correct / sum(len(fake) for fake in fakes)).mean().item()


def to_teacher(generated: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Root mean square distance to the teacher's fine solve from the same noise; 0 is best.

    In units of the normalised log-mel, over all frames and channels.
    """
    _check_pairs(generated, reference)
    return (_frames(generated) - _frames(reference)).square().mean().sqrt().item()


def _check_pairs(generated: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    if not generated or len(generated) != len(truth):
        raise ValueError(
            f"expected as many generated mels as true ones, at least one: "
            f"got {len(generated)} and {len(truth)}"
        )
    for index, (one, other) in enumerate(zip(generated, truth, strict=True)):
        if one.dim() != 2 or one.shape != other.shape or len(one) < PATCH_FRAMES:
            raise ValueError(
                f"expected mels of equal shape (N >= {PATCH_FRAMES}, 80) at index {index}: "
                f"got {tuple(one.shape)} and {tuple(other.shape)}"
            )


def _frames(mels: Sequence[Tensor]) -> Tensor:
    """All frames of all mels, `(sum N_i, 80)` float64."""
    return torch.cat([mel.detach().cpu().double() for mel in mels])


def _patches(mels: Sequence[Tensor]) -> list[Tensor]:
    """Every run of 3 frames of each mel, flattened: `(N_i - 2, 240)` float32 each."""
    return [
        mel.detach().cpu().float().unfold(0, PATCH_FRAMES, 1).flatten(start_dim=1) for mel in mels
    ]


def _train_classifier(fakes: Tensor, trues: Tensor, seed: int) -> nn.Module:
    """Fit the two-layer classifier, full batch; positive output means generated."""
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
