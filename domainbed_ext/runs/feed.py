"""The input of an algorithm: minibatches to train on, and the images of splits in large batches."""

import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_ext.algorithms.base import Algorithm
from domainbed_ext.algorithms.probe import LP
from domainbed_ext.cache.pixels import Stored
from domainbed_ext.data.augmentation import AUGMENTATIONS
from domainbed_ext.data.loader import (
    Evaluated,
    EvaluationBatches,
    Minibatch,
    Minibatches,
    Source,
    stream,
)
from domainbed_ext.data.splits import Split, environment_of
from domainbed_ext.models.precision import autocast
from domainbed_ext.runs.features import Features, compute, features
from domainbed_ext.runs.images import Augmented, RunImages, entries
from domainbed_ext.runs.predictions import are_right, rounded
from domainbed_ext.runs.profile import Profile
from domainbed_ext.runs.setup import Setup
from domainbed_ext.seeds import seed_hash
from domainbed_ext.system.progress import bar
from domainbed_ext.system.stages import Stage, unmeasured
from vitlorafa import fastest_evaluation_batch

_SAMPLE = 8  # images

Measure = Callable[[Tensor, Tensor], Tensor]
"""Function of logits [n, classes] and labels [n] that measures each image [n, ...]."""


class Feed:
    """Feeds the images of a run to its algorithm.

    Args:
        setup: Parts of the run.
        algorithm: Algorithm of the run.
        stop: Function that is called between evaluated batches, and while images are cached; may raise.

    Attributes:
        profile: Timers and counters of the run, if `measure` was called.
        seconds_an_image: Time of evaluating an image; None before the first evaluation.

    Raises:
        BenchmarkError: Images cannot be read; all of them are named.
    """

    profile: Profile | None = None
    seconds_an_image: float | None = None

    def __init__(self, setup: Setup, algorithm: Algorithm, stop: Callable[[], None] = lambda: None) -> None:
        self.setup, self.algorithm, self.stop = setup, algorithm, stop
        self.images = RunImages(setup, lambda count: stop())
        self._features = cache(self._all_features)

    def measure(self) -> None:
        """Profiles from now on, after counting the operations of a minibatch."""
        self.profile = Profile(self.algorithm, next(self.training(range(1))))
        self.algorithm.stage = self.profile.stage

    @property
    def stage(self) -> Stage:
        """The context manager around a stage of the run."""
        return self.profile.stage if self.profile else unmeasured

    @cached_property
    def evaluation_batch(self) -> int:
        """Number of images in an evaluated batch; the same throughout a run, since another may round differently."""
        with autocast(self.algorithm.precision, self.algorithm.device):
            return fastest_evaluation_batch(self.algorithm.backbone)

    def training(self, steps: range) -> Iterator[list[Minibatch]]:
        """The minibatches of some steps, one a training environment, on the algorithm's device.

        Args:
            steps: Indices of the steps, e.g. `range(0, 300)`.

        Returns:
            An iterator over the steps' lists of (images [n, 3, height, width], labels [n]).
        """
        setup, sources = self.setup, self._trained_on()
        workers = self._workers(sources)
        minibatches = Minibatches(
            [setup.splits[f"env{i}_in"] for i in setup.train_envs],
            sources,
            setup.images_a_domain,
            setup.args.seed,
            setup.hparams["class_balanced"],
            setup.args.sampling,
            unmeasured if workers else self.stage,  # a worker has neither the run's clock nor its GPU
        )

        augmented = [] if setup.augmentation == "none" else ["augmented"]

        def ready(batches: list[Minibatch]) -> list[Minibatch]:
            self._count("forwarded", "backwarded", *augmented, of=batches)
            return [self._ready(*batch) for batch in batches]

        return stream(minibatches, steps, workers, ready, self.algorithm.device, self.stage)

    def accuracies(self, step: int, names: Iterable[str], logits: dict[str, Tensor] | None = None) -> dict[str, float]:
        """Computes the accuracies on some splits.

        Args:
            step: Step of the record; augmented images differ from one evaluation to the next, as upstream's do.
            names: Names of splits, e.g. "env0_in", in the order of evaluation.
            logits: Dict that takes the logits of each split [n, classes], in the order of its evaluated images, as
                float16 on the CPU; the same accuracies follow from these. None to keep none.

        Returns:
            Share of correctly classified images in [0, 1] by "env0_in_acc" and so on; NaN where logits are NaN or
            infinite.
        """
        if logits is None:
            return {f"{name}_acc": mean for name, mean in self._means(step, names, are_right).items()}
        accuracies = {}
        for parts, values, numbers in self._measured(step, names, _logits):
            for number, (name, part) in enumerate(parts.items()):
                logits[name] = rounded(values[numbers == number])
                is_right = are_right(logits[name], part.split.labels(part.split.keys))
                accuracies[f"{name}_acc"] = float(is_right.mean())
        return accuracies

    def losses(self, step: int, names: Iterable[str]) -> dict[str, float]:
        """Computes the mean cross-entropy on some splits, without the objective and without label smoothing.

        Args:
            step: Step of the evaluation, as in `accuracies`.
            names: Names of splits, in the order of evaluation.

        Returns:
            Mean cross-entropy by "env0_out_loss" and so on; not finite where logits are not.
        """
        return {f"{name}_loss": mean for name, mean in self._means(step, names, _cross_entropies).items()}

    def sample_outputs(self) -> Tensor:
        """Computes the logits of some validation images, on the CPU: equal as long as the algorithm predicts the same.

        Returns:
            [images, classes].
        """
        part = self._evaluated(0, self.setup.validation_splits[0])
        images, labels, _ = EvaluationBatches([part], _SAMPLE)[0]
        with torch.inference_mode():
            return self.algorithm.eval().predict(self._ready(images, labels)[0]).cpu()

    def training_images(self, count: int) -> Iterator[Tensor]:
        """The first images of the training splits without augmentation, in batches on the algorithm's device.

        Args:
            count: Number of images, evenly over the training environments; of a small environment all.

        Returns:
            An iterator over images [n, 3, height, width].
        """
        setup = self.setup
        parts = []
        for number, env in enumerate(setup.train_envs):
            split = setup.splits[f"env{env}_in"]
            share = count // len(setup.train_envs) + (number < count % len(setup.train_envs))
            parts.append(Evaluated(Split(split.environment, split.keys[:share]), self._pixels(env)))
        batches = EvaluationBatches(parts, self.evaluation_batch)
        return stream(
            batches,
            range(len(batches)),
            setup.args.workers,
            lambda batch: self._ready(*batch[:2])[0],
            self.algorithm.device,
        )

    def split_features(self, name: str) -> Minibatch:
        """Computes the features of all images of a split, without augmentation, for a linear probe.

        Args:
            name: Name of the split, e.g. "env0_in".

        Returns:
            Features [n, width] and labels [n], on the CPU.
        """
        split = self.setup.splits[name]
        return self._features(environment_of(name))[torch.as_tensor(split.keys)], split.labels(split.keys)

    def _means(self, step: int, names: Iterable[str], measure: Measure) -> dict[str, float]:
        """The mean over each split of what is measured of an image."""
        means: dict[str, float] = {}
        for parts, values, numbers in self._measured(step, names, measure):
            # On the CPU, which adds in the order of the images: a GPU adds in any.
            sums = torch.zeros(len(parts), dtype=torch.float64).index_add_(0, numbers, values)
            means |= {
                name: total / len(part.split) for (name, part), total in zip(parts.items(), sums.tolist(), strict=True)
            }
        return means

    def _measured(
        self, step: int, names: Iterable[str], measure: Measure
    ) -> Iterator[tuple[dict[str, Evaluated], Tensor, Tensor]]:
        """Splits that are evaluated together, what is measured of their images, and the number of each image's split.

        Both tensors are on the CPU.
        """
        rows: dict[object, dict[str, Evaluated]] = {}
        for name in names:  # random draws depend on the row, so what may be features has a row of its own
            part = self._evaluated(step, name)
            rows.setdefault((part.seed is None, type(part.source)), {})[name] = part
        for parts in rows.values():
            yield parts, *self._measure(parts, measure)

    def _measure(self, parts: dict[str, Evaluated], measure: Measure) -> tuple[Tensor, Tensor]:
        """What is measured of each image of some splits, and the number of the split; both on the CPU."""
        batches = EvaluationBatches(list(parts.values()), self.evaluation_batch)

        def ready(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            self._count("evaluated", of=[batch[:2]])
            return *self._ready(*batch[:2]), batch[2]

        workers = self._workers([part.source for part in parts.values()])
        rows = stream(batches, range(len(batches)), workers, ready, self.algorithm.device)
        algorithm = self.algorithm.eval()
        measured, numbers = [], []
        start, count = time.perf_counter(), sum(len(part.split) for part in parts.values())
        with bar("evaluating", count, "images") as done, torch.inference_mode(), self.stage("evaluate"):
            for images, labels, places in rows:
                self.stop()
                measured.append(measure(algorithm.predict(images), labels))
                numbers.append(places)
                done.advance(len(labels))
            values = torch.cat(measured).cpu()
        self.seconds_an_image = (time.perf_counter() - start) / max(1, count)
        return values, torch.cat(numbers)

    def _evaluated(self, step: int, name: str) -> Evaluated:
        setup, split, env = self.setup, self.setup.evaluated(name), environment_of(name)
        is_plain = env not in setup.train_envs or name.endswith("_uda")
        if is_plain or setup.args.validation_images != "augmented":
            return Evaluated(split, self._plain(env))
        return Evaluated(split, self._augmented(env), seed_hash(setup.args.seed, "evaluation", step, name))

    def _trained_on(self) -> list[Source]:
        """The source of each training environment: images of all, or features of all."""
        envs = self.setup.train_envs
        if self._probe and self._probe.objective.reads_images and self.setup.augmentation == "none":
            return [self._pixels(env) for env in envs]
        return [self._augmented(env) for env in envs]

    def _augmented(self, env: int) -> Source:
        """The source of an environment's training images."""
        if self.setup.augmentation == "none":
            return self._plain(env)
        return Augmented(self.images.training[env], AUGMENTATIONS[self.setup.augmentation], self.setup.inputs.size)

    def _plain(self, env: int) -> Source:
        """The source of an environment's images without augmentation: features if they can replace images.

        Never for some environments alone: which images share a batch changes rounding, and must not depend on what the
        cache has room for.
        """
        return self._pixels(env) if self._probe is None else Features(self._features(env))

    def _workers(self, sources: Iterable[Source]) -> int:
        """The number of processes that prepare batches: none for features, which are only looked up."""
        return 0 if all(isinstance(source, Features) for source in sources) else self.setup.args.workers

    def _pixels(self, env: int) -> Source:
        return Augmented(self.images.evaluation[env], AUGMENTATIONS["none"], self.setup.inputs.size)

    @property
    def _probe(self) -> LP | None:
        """The algorithm, if features can replace images that are not augmented."""
        return self.algorithm if isinstance(self.algorithm, LP) and self.algorithm.embeds else None

    def _all_features(self, env: int) -> Tensor:
        kept = self._make_features(env)
        if kept is None:
            probe, images = self._probe, self.images.evaluation[env]
            assert probe is not None
            inputs, workers = self.setup.inputs, self.setup.args.workers
            return compute(probe, images, inputs, self.evaluation_batch, self.stop, workers)
        return kept

    def _make_features(self, env: int) -> Tensor | None:
        """The features from the cache; None if it has no room, or there is no cache."""
        probe, images = self._probe, self.images.evaluation[env]
        if probe is None or not isinstance(images, Stored) or (cache := entries(self.setup.args)) is None:
            return None
        return features(probe, images, self.setup.inputs, self.evaluation_batch, cache, self.stop)

    def _count(self, *what: str, of: list[Minibatch]) -> None:
        if self.profile:
            are_images = any(images.dtype == torch.uint8 for images, _ in of)  # features were, when they were computed
            decoded = ["decoded"] if are_images and self.images.decodes else []
            self.profile.images.update(dict.fromkeys([*what, *decoded], sum(len(labels) for _, labels in of)))

    def _ready(self, images: Tensor, labels: Tensor) -> Minibatch:
        """Moves a minibatch to the device, and normalises its images there."""
        device = self.algorithm.device
        return self.setup.inputs.ready(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)


def _logits(logits: Tensor, labels: Tensor) -> Tensor:
    return logits


def _cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.double(), labels, reduction="none")
