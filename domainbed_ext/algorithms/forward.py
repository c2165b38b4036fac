"""The model of an algorithm as its objective sees it."""

from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from domainbed_ext.errors import BenchmarkError, warn_once
from domainbed_ext.models import precision
from domainbed_ext.objectives.base import Batch, Objective, Outputs
from vitlorafa import classifiers

if TYPE_CHECKING:
    from domainbed_ext.algorithms.base import Algorithm


class Forward:
    """The forward pass of an algorithm in the precision of its run, through `Algorithm.logits`.

    Args:
        algorithm: Algorithm that is trained.
    """

    def __init__(self, algorithm: "Algorithm") -> None:
        self.algorithm = algorithm
        self._last: tuple[Tensor, Tensor] | None = None  # images, and their logits without gradients

    def logits(self, images: Tensor) -> Tensor:
        """[n, channels, height, width] → [n, classes] in float32."""
        with self.autocast():
            logits = self.algorithm.logits(images).float()
        self._last = images, logits.detach()
        return logits

    def domain_losses(self, batch: Batch, label_smoothing: float) -> Tensor | None:
        """The mean cross-entropy of each domain [domains], if logits of the batch's images were computed last.

        Args:
            batch: Images and labels of all training domains.
            label_smoothing: Share of a label's probability that is spread over all classes.

        Returns:
            Losses without gradients; None where the objective changes images, as Mixup does.
        """
        if self._last is None or self._last[0] is not batch.images:
            return None
        cross_entropy = partial(F.cross_entropy, label_smoothing=label_smoothing)
        return batch.cross_entropies(self._last[1], cross_entropy)

    def outputs(self, images: Tensor) -> Outputs:
        """[n, channels, height, width] → the classifier's input [n, width] and logits [n, classes], in float32."""
        read: list[Tensor] = []
        (classifier,) = classifiers(self.algorithm.backbone)
        with classifier.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])):
            logits = self.logits(images)
        if not read:
            raise BenchmarkError(f"{type(self.algorithm).__name__} has logits without its backbone's classifier")
        return Outputs(read[-1].flatten(1).float(), logits)

    def classify(self, features: Tensor) -> Tensor:
        """[n, width] → [n, classes] in float32, by the classifier alone."""
        (classifier,) = classifiers(self.algorithm.backbone)
        with self.autocast():
            logits: Tensor = classifier(features)
        return logits.float()

    def weights(self) -> dict[str, Tensor]:
        """The trained weights of the backbone without its classifier."""
        return self.algorithm.weights()

    def autocast(self) -> AbstractContextManager:
        """The context of the run's precision."""
        return precision.autocast(self.algorithm.precision, self.algorithm.device)

    def check(self, objective: Objective) -> None:
        """Refuses an objective that this model cannot be trained by.

        Args:
            objective: Objective of the algorithm.

        Raises:
            BenchmarkError: A minibatch has too few images; it reads features, and the model has more than one
                classifier; or it shapes features, and only the classifier trains.
        """
        backbone, heads = self.algorithm.backbone, classifiers(self.algorithm.backbone)
        method, loss = type(self.algorithm).__name__, type(objective).__name__
        if objective.num_domains == 1 and objective.compares_domains:
            warn_once(f"{loss} compares training domains, and there is one: {method}+{loss} trains as {method} does")
        if (size := self.algorithm.hparams["batch_size"]) < (least := objective.least_images):
            raise BenchmarkError(f"{loss} needs {least} images of each domain a step, not batch_size {size}: raise it")
        if objective.reads_features and len(heads) != 1:
            raise BenchmarkError(
                f"{method}+{loss} on {self.algorithm.hparams['backbone']}: {loss} reads the features of one "
                f"classifier, and this backbone has {len(heads)}: choose another --backbone or objective"
            )
        head = {parameter for each in heads for parameter in each.parameters()}
        if objective.shapes_features and not any(p.requires_grad for p in set(backbone.parameters()) - head):
            raise BenchmarkError(
                f"{method}+{loss}: {loss} shapes features, which {method} does not train: choose another method, or "
                "an objective of the logits, such as IRM, VREx or GroupDRO"
            )
