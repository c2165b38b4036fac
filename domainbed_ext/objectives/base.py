"""The base class of all objectives, and what an objective sees of a step: images, labels, features and logits.

An objective of your own is a class in a file of yours, which `--import` brings in:

    @register_objective("Unsure", hyperparameters={"weight": 0.1})
    class Unsure(Objective):
        def loss(self, batch, model):
            logits = model.logits(batch.images)
            confidence = logits.softmax(1).square().sum(1).mean()
            return {"loss": self.cross_entropy(logits, batch.labels) + self.hparams["weight"] * confidence}

`--algorithm BOnly+Unsure@weight=0.2` trains with it. It knows nothing of what trains: adapters, a head, all.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from domainbed_ext.data.loader import Minibatch

CrossEntropy = Callable[[Tensor, Tensor], Tensor]
"""Function of logits [n, classes] and labels [n]: their mean cross-entropy."""
Values = dict[str, Tensor]
"""What a step computes, each a number: "loss" is minimised; the others are recorded beside it."""


@dataclass(frozen=True)
class Batch:
    """The images of a step: those of the first training domain, then those of the second, and so on.

    Attributes:
        images: Images [n, channels, height, width] of all domains; for a linear probe features [n, width], unless the
            objective `reads_images`.
        labels: Labels [n].
        sizes: Number of images of each domain.
    """

    images: Tensor
    labels: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, minibatches: Sequence[Minibatch], device: torch.device) -> "Batch":
        """Joins the minibatches of all training domains.

        Args:
            minibatches: Images and labels of each domain.
            device: Device of the batch.
        """
        images = torch.cat([x for x, _ in minibatches]).to(device, non_blocking=True)
        labels = torch.cat([y for _, y in minibatches]).to(device, non_blocking=True)
        return cls(images, labels, tuple(len(y) for _, y in minibatches))

    def split(self, of_images: Tensor) -> tuple[Tensor, ...]:
        """Splits a tensor [n, ...] by domain."""
        return of_images.split(self.sizes)

    def cross_entropies(self, logits: Tensor, cross_entropy: CrossEntropy = F.cross_entropy) -> Tensor:
        """The mean cross-entropy of each domain [domains].

        Args:
            logits: Logits [n, classes].
            cross_entropy: Function of the logits and labels of a domain, such as `Objective.cross_entropy`.
        """
        domains = zip(self.split(logits), self.split(self.labels), strict=True)
        return torch.stack([cross_entropy(each, labels) for each, labels in domains])

    @property
    def domains(self) -> Tensor:
        """The index of each image's domain, [n]."""
        # Made on the device: a copy of the sizes would wait for the work before it.
        device = self.labels.device
        return torch.cat([torch.full((size,), domain, device=device) for domain, size in enumerate(self.sizes)])


class Outputs(NamedTuple):
    """What a model computes of images, in float32.

    Attributes:
        features: Input of the classifier [n, width].
        logits: Logits [n, classes].
    """

    features: Tensor
    logits: Tensor


class Model(Protocol):
    """The model that is trained, as an objective sees it. Its methods compute in the precision of the run."""

    def logits(self, images: Tensor) -> Tensor:
        """Images [n, channels, height, width] → logits [n, classes] in float32."""
        ...

    def outputs(self, images: Tensor) -> Outputs:
        """Images [n, channels, height, width] → features and logits. The objective has to have `reads_features`."""
        ...

    def classify(self, features: Tensor) -> Tensor:
        """Features [n, width] → logits [n, classes] in float32, by the classifier alone."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The trained weights of the backbone without its classifier by name, differentiable, each up to a constant.

        The weight of an adapted layer is what its adapter makes of it.
        """
        ...

    def autocast(self) -> AbstractContextManager:
        """The context of the run's precision, for other modules of an objective; losses belong outside of it."""
        ...


class Objective(nn.Module):
    """A training loss. Its parameters are trained beside the model's, and predictions do not depend on them.

    Buffers and parameters are saved in checkpoints, and not with the trained model. Random draws are torch's, whose
    generator a run seeds before each step.

    Args:
        num_classes: Number of classes.
        num_domains: Number of training domains.
        hparams: Hyperparameters of the run.

    Attributes:
        reads_images: Whether it changes images or reads what the backbone computes of them, so that cached features
            cannot replace them.
        reads_features: Whether it calls `Model.outputs` or `Model.classify`, which need a model with one classifier.
        asked: Whether its loss was computed, which a method with an `update` of its own may not do.
        smoothed: Whether its `cross_entropy` was computed, so that `label_smoothing` has an effect.
        shapes_features: Whether it changes nothing but features, so that a method has to train them.
        compares_domains: Whether it is the mean cross-entropy if there is only one training domain.
        least_images: Number of images of each domain that a step needs.
    """

    reads_images: ClassVar[bool] = False
    reads_features: ClassVar[bool] = False
    shapes_features: ClassVar[bool] = False
    compares_domains: ClassVar[bool] = False
    least_images: ClassVar[int] = 1
    asked = False
    smoothed = False

    def __init__(self, num_classes: int, num_domains: int, hparams: dict[str, Any]) -> None:
        super().__init__()
        self.num_classes, self.num_domains, self.hparams = num_classes, num_domains, hparams

    def prepare(self, backbone: nn.Module) -> None:
        """Sees the pretrained backbone before the method adapts it, e.g. to copy it.

        Args:
            backbone: Timm model with a new head, on the CPU.
        """

    def attach(self, backbone: nn.Module, model: "Model") -> None:
        """Sees the model that is to be trained, e.g. to find layers for hooks or to note where weights start.

        Args:
            backbone: Adapted backbone, on the device of the run.
            model: Model of the backbone.
        """

    def optimizer_options(self) -> dict[str, Any]:
        """Options of the optimizer for the objective's own parameters, e.g. {"lr": 0.01}; others are the method's."""
        return {}

    def begin(self, steps: int) -> None:
        """Is called before the first step of a run, and not when it resumes.

        Args:
            steps: Number of training steps.
        """

    def before_step(self, optimizer: Optimizer) -> None:
        """Is called before each step."""

    def loss(self, batch: Batch, model: Model) -> Values:
        """Computes the loss of a step.

        Args:
            batch: Images and labels of all training domains.
            model: Model that is trained.

        Returns:
            "loss", which is minimised, and what else is to be recorded, by name.
        """
        raise TypeError(f"{type(self).__name__} has no method loss")

    def forward(self, batch: Batch, model: Model) -> Values:
        """Computes `loss`, and notes that it was asked for."""
        self.asked = True
        return self.loss(batch, model)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy, with labels smoothed by `label_smoothing`: what a loss takes for its predictions.

        Args:
            logits: Logits [n, classes].
            labels: Labels [n].
        """
        self.smoothed = True
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    @property
    def label_smoothing(self) -> float:
        """Share of a label's probability that is spread evenly over all classes."""
        return float(self.hparams.get("label_smoothing", 0.0))

    def gradients(self, compute: Callable[[], Values], parameters: Sequence[nn.Parameter]) -> Values:
        """Leaves the gradients of a step in the parameters.

        Args:
            compute: Function that sets the gradients to those of `loss` at the present parameters, in fp16 times a
                scale that is the same throughout a step.
            parameters: Trained parameters of the model.

        Returns:
            What is recorded of the step.
        """
        return compute()
