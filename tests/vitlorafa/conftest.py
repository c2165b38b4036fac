from collections.abc import Callable

import pytest
import torch
from small_models import ARCHITECTURES

from vitlorafa import AdapterConfig

torch.set_num_threads(1)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def all_targets() -> Callable[..., AdapterConfig]:
    return lambda **kwargs: AdapterConfig(**{"rank": 4, "targets": "all", "seed": 0, **kwargs})


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
