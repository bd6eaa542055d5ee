"""Graphs without a GPU: a capture writes down every operation, a replay repeats just these.

As with a CUDA graph, Python does not run again: what it computed, numbers included, is fixed, and
only what lies in the static buffers changes. Reading a value during a capture is an error.
"""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from imf_kernels import checks
from imf_kernels.graphs import runtime


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value was read while capturing")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))  # keeps ids alive, too
        return out

    def replay(self):
        now = {}

        def current(value):
            return now.get(id(value), value) if isinstance(value, Tensor) else value

        for func, args, kwargs, before in self.calls:
            out = func(*tree_map(current, args), **tree_map(current, kwargs))
            for old, new in zip(tree_leaves(before), tree_leaves(out), strict=True):
                now[id(old)] = new


_ONE_CAPTURE = threading.Lock()


class TapeSlot:
    def __init__(self, device):
        self.busy = self.closed = False

    def capture(self, function):
        with _ONE_CAPTURE, torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(checks, "readable", lambda *tensors: False)  # as on CUDA
            function()
            with Tape() as tape:
                function()
        return tape

    def replay(self, ins, graphs, outs):
        assert not self.busy, "two replays at once in one slot"
        self.busy = True
        runtime.launch(ins, graphs, outs)
        self.busy = False

    def bytes_held(self):
        return 0

    def close(self):
        self.closed = True
