import math

import pytest
import torch

from imf_kernels.distill import by_interval
from tests.distill.tools import Records, trainer
from tests.objectives.tools import Small


def test_means_over_batches():
    infos = [
        {"row_error": torch.tensor([1.0, 5.0, 2.0]), "interval": torch.tensor([0.1, 1.0, 0.0])},
        {"row_error": torch.tensor([6.0]), "interval": torch.tensor([0.24])},
    ]
    added = {}
    for info in infos:
        for name, value in by_interval.sums(info).items():
            added[name] = added.get(name, 0.0) + float(value)
    added["frames"] = 7.0
    assert by_interval.means(added) == {"error/0.00-0.25": 3.0, "error/0.75-1.00": 5.0}
    assert added == {"frames": 7.0}


def test_a_broken_row_shows_in_its_own_part_alone():
    info = {"row_error": torch.tensor([math.nan, 5.0]), "interval": torch.tensor([0.3, 0.6])}
    found = by_interval.means({name: float(v) for name, v in by_interval.sums(info).items()})
    assert math.isnan(found.pop("error/0.25-0.50"))
    assert found == {"error/0.50-0.75": 5.0}


@pytest.mark.parametrize("info", [{}, {"row_error": torch.ones(2)}, {"interval": torch.ones(2)}])
def test_an_objective_that_tells_less(info):
    assert by_interval.sums(info) == {}


def test_a_run_tells_them(tmp_path):
    records = Records()

    def objective(student, batch):
        loss = sum(p.square().sum() for p in student.parameters())
        rows = {"row_error": torch.tensor([1.0, 2.0]), "interval": torch.tensor([0.1, 0.6])}
        return loss, {"loss": loss.detach(), **rows}

    trainer(tmp_path, 1, Small(), objective, accumulate=2, callbacks=[records]).run()
    found = {name: v for name, v in records.records[0].items() if name.startswith("error")}
    assert found == {"error/0.00-0.25": 1.0, "error/0.50-0.75": 2.0}
    assert not any(name.startswith("rows") for name in records.records[0])
