"""MMD (Li et al. 2018): equal distributions of the domains' features, by the maximum mean discrepancy."""

import torch
from torch import Tensor

from domainbed_ext.objectives.feature_matching import FeatureMatching

GAMMAS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)


class MMD(FeatureMatching):
    """Maximum mean discrepancy by a sum of Gaussian kernels exp(-γ·d²), one for each of `GAMMAS`."""

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """The squared maximum mean discrepancy."""
        return _kernel(x, x).mean() + _kernel(y, y).mean() - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    # Differences, not |x|² + |y|² - 2·x·y, whose rounding the largest γ would multiply by 1000.
    squared = (x.unsqueeze(1) - y.unsqueeze(0)).pow(2).sum(-1)
    return torch.stack([torch.exp(-gamma * squared) for gamma in GAMMAS]).sum(0)
