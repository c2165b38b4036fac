"""CORAL (Sun and Saenko 2016): equal means and covariances of the domains' features."""

from torch import Tensor

from domainbed_ext.objectives.feature_matching import FeatureMatching


class CORAL(FeatureMatching):
    """Mean squared differences of means and of covariances, as in DomainBed."""

    least_images = 2

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean squared difference of the means, plus that of the covariances."""
        means = (x.mean(0) - y.mean(0)).pow(2).mean()
        covariances = (x.T.cov() - y.T.cov()).pow(2).mean()
        return means + covariances
