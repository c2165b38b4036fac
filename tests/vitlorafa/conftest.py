from collections.abc import Callable, Iterator

import pytest
import torch
from small_models import ARCHITECTURES
from timm.layers import set_fused_attn, use_fused_attn

from vitlorafa import AdapterConfig

torch.set_num_threads(1)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def all_targets() -> Callable[..., AdapterConfig]:
    return lambda **kwargs: AdapterConfig(**{"rank": 4, "targets": "all", "seed": 0, **kwargs})


@pytest.fixture
def unfused() -> Iterator[None]:
    """Attention made of plain products: CPU's fused one knows no forward-mode gradients."""
    before = bool(use_fused_attn())
    set_fused_attn(False)
    yield
    set_fused_attn(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
