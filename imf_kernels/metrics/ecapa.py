"""ECAPA-TDNN over the hidden states of a speech model (Desplanques et al., arXiv 2005.07143).

Module names are the public checkpoints', so that their weights load as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from imf_kernels.models import state_dicts

BLOCKS = {"layer2": 2, "layer3": 3, "layer4": 4}
"""The residual blocks and their dilations."""


class ECAPA(nn.Module):
    """Hidden states `(L, B, F, N)` to embeddings `(B, D)`: mixed, normalised, convolved, pooled.

    Args:
        states: L, mixed by softmax weights.
        features: F.
        channels: Of the blocks.
        scale: Parts of a block's multi-scale convolution.
        squeeze: Width of the blocks' channel gates.
        pooled: Channels before pooling.
        attention: Width of the pooling's attention.
        dim: D.
    """

    def __init__(
        self,
        states: int,
        features: int,
        channels: int,
        scale: int,
        squeeze: int,
        pooled: int,
        attention: int,
        dim: int,
    ) -> None:
        super().__init__()
        self.feature_weight = nn.Parameter(torch.zeros(states))
        self.instance_norm = nn.InstanceNorm1d(features)
        self.layer1 = _ConvReluNorm(features, channels, 5)
        for name, dilation in BLOCKS.items():
            setattr(self, name, _Block(channels, scale, squeeze, dilation))
        self.conv = nn.Conv1d(channels * len(BLOCKS), pooled, 1)
        self.pooling = _Pooling(pooled, attention)
        self.bn = nn.BatchNorm1d(2 * pooled)
        self.linear = nn.Linear(2 * pooled, dim)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> ECAPA:
        """With these weights, whose shapes tell the sizes.

        Raises:
            ValueError: missing, unexpected or misshapen weights.
        """
        shapes = {name: tuple(value.shape) for name, value in state_dict.items()}

        def size(name: str, ndim: int, axis: int = 0) -> int:
            return state_dicts.shape(shapes, name, ndim)[axis]

        head = cls(
            states=size("feature_weight", 1),
            features=size("layer1.conv.weight", 3, 1),
            channels=size("layer1.conv.weight", 3),
            scale=1 + state_dicts.count(shapes, "layer2.Res2Conv1dReluBn.convs."),
            squeeze=size("layer2.SE_Connect.linear1.weight", 2),
            pooled=size("conv.weight", 3),
            attention=size("pooling.linear1.weight", 3),
            dim=size("linear.weight", 2),
        )
        counted = {k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}
        expected = head.state_dict()
        state_dicts.check(
            {k: v for k, v in expected.items() if not k.endswith("num_batches_tracked")}, counted
        )
        head.load_state_dict(expected | counted)
        return head.eval()

    def forward(self, states: Tensor) -> Tensor:
        mixed = torch.einsum("l,lbfn->bfn", self.feature_weight.softmax(0), states)
        x = self.layer1(self.instance_norm(mixed))
        outputs = []
        for name in BLOCKS:
            x = getattr(self, name)(x)
            outputs.append(x)
        x = self.conv(torch.cat(outputs, dim=1)).relu()
        return self.linear(self.bn(self.pooling(x)))


class _ConvReluNorm(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2)
        self.bn = nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x).relu())


class _Block(nn.Module):
    """Squeeze-excitation Res2 block: project, convolve at several scales, project, gate."""

    def __init__(self, channels: int, scale: int, squeeze: int, dilation: int) -> None:
        super().__init__()
        self.Conv1dReluBn1 = _ConvReluNorm(channels, channels)
        self.Res2Conv1dReluBn = _MultiScale(channels, scale, dilation)
        self.Conv1dReluBn2 = _ConvReluNorm(channels, channels)
        self.SE_Connect = _Gate(channels, squeeze)

    def forward(self, x: Tensor) -> Tensor:
        out = self.Conv1dReluBn2(self.Res2Conv1dReluBn(self.Conv1dReluBn1(x)))
        return x + self.SE_Connect(out)


class _MultiScale(nn.Module):
    """Each part of the channels is convolved together with the part before; the last passes."""

    def __init__(self, channels: int, scale: int, dilation: int) -> None:
        super().__init__()
        width = channels // scale
        self.convs = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
            for _ in range(scale - 1)
        )
        self.bns = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(scale - 1))

    def forward(self, x: Tensor) -> Tensor:
        *parts, last = x.chunk(len(self.convs) + 1, dim=1)
        outputs: list[Tensor] = []
        for part, conv, norm in zip(parts, self.convs, self.bns, strict=True):
            outputs.append(norm(conv(part + outputs[-1] if outputs else part).relu()))
        return torch.cat([*outputs, last], dim=1)


class _Gate(nn.Module):
    def __init__(self, channels: int, squeeze: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(channels, squeeze)
        self.linear2 = nn.Linear(squeeze, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.linear2(self.linear1(x.mean(dim=2)).relu()).sigmoid()[:, :, None]


class _Pooling(nn.Module):
    """Mean and standard deviation over the frames, weighted by attention per channel."""

    def __init__(self, channels: int, attention: int) -> None:
        super().__init__()
        self.linear1 = nn.Conv1d(channels, attention, 1)
        self.linear2 = nn.Conv1d(attention, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear2(self.linear1(x).tanh()).softmax(dim=2)
        mean = (weight * x).sum(dim=2)
        variance = (weight * x.square()).sum(dim=2) - mean.square()
        return torch.cat([mean, variance.clamp(min=1e-9).sqrt()], dim=1)
