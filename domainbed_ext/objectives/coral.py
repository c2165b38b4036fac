"""CORAL (Sun and Saenko 2016): equal means and covariances of the domains' features."""

from torch import Tensor

from domainbed_ext.objectives.feature_matching import FeatureMatching


class CORAL(FeatureMatching):
    """Mean squared differences of means and of covariances, as in DomainBed."""

    least_images = 2

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean squared difference of the means, plus that of the covariances."""
        means = (x.mean(0) - y.mean(0)).pow(2).mean()
        covariances = (_covariance(x) - _covariance(y)).pow(2).mean()
        return means + covariances


def _covariance(x: Tensor) -> Tensor:
    """The sample covariance [width, width] of features [images, width]; `Tensor.cov` has the host wait for a GPU."""
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)
