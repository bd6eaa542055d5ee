"""What holds of every objective."""

import pytest
import torch
from torch import multiprocessing

from imf_kernels import Teacher
from tests.flows import GUIDED
from tests.objectives import ranks
from tests.objectives.tools import Scale, batch, real_batch, real_student, seeded

NAMES = list(ranks.objectives(Teacher(GUIDED["linear"], 2.0), 0))
EVERY = pytest.mark.parametrize("name", NAMES)


def test_two_processes_train_as_one(tmp_path):
    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    multiprocessing.spawn(ranks.work, (rendezvous,), nprocs=2)
