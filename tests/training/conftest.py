from collections.abc import Iterator

import pytest
import torch

from tests.training.cohorts import Drawn, draw_cohort
from tests.training.train_runs import EASY


@pytest.fixture(autouse=True)
def _threads_kept() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def patients() -> list[Drawn]:
    return draw_cohort(120, EASY)
