"""The parts of a run, made from its arguments and checked before any work is done."""

import random
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from domainbed_ext import hparams_registry, protocols
from domainbed_ext.algorithms.base import Algorithm
from domainbed_ext.algorithms.names import canonical_name, get_algorithm_class
from domainbed_ext.averaging.base import Average
from domainbed_ext.averaging.choice import make_average
from domainbed_ext.data.splits import Split, environment_of, make_splits
from domainbed_ext.datasets.base import MultipleDomainDataset
from domainbed_ext.datasets.digest import digest
from domainbed_ext.datasets.environment_names import list_environments, names_in
from domainbed_ext.datasets.image_files import unreadable
from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models import backbones
from domainbed_ext.models.determinism import compute_reproducibly
from domainbed_ext.models.device import find_device, using_device
from domainbed_ext.models.inputs import Inputs
from domainbed_ext.objectives.base import Objective
from domainbed_ext.runs.arguments import CompleteArguments, RunArguments
from domainbed_ext.runs.imports import load
from domainbed_ext.runs.provenance import machine, own_sources, versions
from vitlorafa import count_parameters, keep_freed_memory

WORKERS = 4  # with a GPU, which one core does not keep busy


@dataclass(frozen=True)
class Setup:
    """The parts of a run.

    Attributes:
        args: Arguments of the run, completed; environments are indices.
        test_envs: Indices of the environments that it is tested on.
        hparams: Final hyperparameters.
        dataset: Data set with all its environments.
        inputs: Size and statistics of the backbone's input.
        splits: Samples of "env0_in", "env0_out", "env0_uda" and so on; an empty split is left out.
        steps: Number of training steps.
        checkpoint_freq: Number of steps from one evaluation to the next without `--evaluations`; 0 to evaluate at the
            last step alone.
    """

    args: CompleteArguments
    test_envs: list[int]
    hparams: dict[str, Any]
    dataset: MultipleDomainDataset
    inputs: Inputs
    splits: dict[str, Split]
    steps: int
    checkpoint_freq: int

    @property
    def train_envs(self) -> list[int]:
        """Indices of the environments that are trained on."""
        return [i for i in range(len(self.dataset)) if i not in self.test_envs]

    @property
    def validation_splits(self) -> list[str]:
        """Names of the splits that steps are selected by."""
        return [f"env{i}_out" for i in self.train_envs]

    @property
    def other_splits(self) -> list[str]:
        """Names of all other splits."""
        return [name for name in self.splits if name not in self.validation_splits]

    def evaluated(self, name: str) -> Split:
        """The samples of a split that its accuracy is measured on: of those that are trained on, `--train_eval_share`.

        Args:
            name: Name of the split, e.g. "env0_in".
        """
        split = self.splits[name]
        if environment_of(name) not in self.train_envs or not name.endswith("_in"):
            return split
        # The first part, whose order is the seeded shuffle's.
        return Split(split.environment, split.keys[: max(1, round(len(split) * self.args.train_eval_share))])

    @cached_property
    def data_digest(self) -> list[str]:
        """The digest of each environment."""
        return digest(self.dataset)

    @property
    def augmentation(self) -> str:
        """Name in `augmentation.AUGMENTATIONS` of the augmentation of training images."""
        return self.dataset.AUGMENTATION if self.hparams["data_augmentation"] else "none"

    def make_algorithm(self) -> Algorithm:
        """Builds the algorithm; the same seed gives the same one."""
        return make_algorithm(self.args, self.hparams, self.inputs, self.dataset.classes, len(self.train_envs))

    @cached_property
    def evaluated_steps(self) -> list[int]:
        """Indices of the steps after which it is evaluated, ascending, the last step's among them.

        These are `--evaluations` of them, evenly spaced; without it every `checkpoint_freq`-th from the first on.
        """
        if count := self.args.evaluations:
            return [round(number * self.steps / count) - 1 for number in range(1, count + 1)]
        last = self.steps - 1
        return [*(range(0, last, self.checkpoint_freq) if self.checkpoint_freq else ()), last]

    def is_evaluated(self, step: int) -> bool:
        """Whether it is evaluated after a step.

        Args:
            step: Index of the step.
        """
        return self.count_evaluations(step) > self.count_evaluations(step + 1)

    def count_evaluations(self, first: int = 0) -> int:
        """Counts the evaluations after a step and all later ones.

        Args:
            first: Index of the step.
        """
        return len(self.evaluated_steps) - bisect_left(self.evaluated_steps, first)

    def make_average(self) -> Average:
        """Makes the average of weights over steps.

        Raises:
            BenchmarkError: The run is too short for it, or has too few evaluations.
        """
        return make_average(self.hparams, self.steps, self.count_evaluations())

    @property
    def steps_per_epoch(self) -> float:
        """Number of steps in which the smallest training environment is seen once: DomainBed's epoch."""
        sizes = [len(self.splits[f"env{i}_in"]) for i in range(len(self.dataset))]
        return min(sizes) / self.images_a_domain

    @property
    def images_a_domain(self) -> int:
        """Number of images of each training environment in a step."""
        return count_images_a_domain(self.hparams)

    @property
    def images_a_step(self) -> int:
        """Number of images in a step."""
        return len(self.train_envs) * self.images_a_domain


def make_algorithm(
    args: CompleteArguments, hparams: dict[str, Any], inputs: Inputs, classes: Sequence[str], num_domains: int
) -> Algorithm:
    """Builds an algorithm; the same seed gives the same one.

    Args:
        args: Arguments of the run.
        hparams: Final hyperparameters.
        inputs: Size and statistics of the backbone's input.
        classes: Names of the classes.
        num_domains: Number of training environments.
    """
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(args.seed)
    make = get_algorithm_class(args.algorithm)
    with using_device(args.device):
        algorithm = make(inputs.shape, len(classes), num_domains, hparams)
    # So that a saved model says which images and classes it was trained on.
    backbone: Any = algorithm.backbone
    trained_on = inputs.to_timm() | {"label_names": list(map(str, classes))}
    backbone.pretrained_cfg = {**(getattr(backbone, "pretrained_cfg", None) or {}), **trained_on}
    return algorithm


def count_images_a_domain(hparams: Mapping[str, Any]) -> int:
    """Counts the images of each training environment in a step: `accumulate` minibatches.

    Args:
        hparams: Hyperparameters of a run.
    """
    return int(hparams["batch_size"]) * int(hparams.get("accumulate", 1))


def collect_facts(setup: Setup, algorithm: Algorithm | None = None) -> dict[str, Any]:
    """Collects what every record of a run holds about the run.

    Args:
        setup: Parts of the run.
        algorithm: Algorithm that is trained; None makes it.
    """
    algorithm = algorithm or setup.make_algorithm()
    objective = getattr(algorithm, "objective", nn.Module())  # a method may build itself in its own way
    # What the objective trains beside the model is in no prediction.
    trainable, total = np.subtract(count_parameters(algorithm), count_parameters(objective)).tolist()
    return {
        "args": asdict(setup.args),
        "hparams": setup.hparams,
        "environments": list(setup.dataset.environments),
        "data_digest": setup.data_digest,
        "split_sizes": {name: len(split) for name, split in setup.splits.items()},
        "precision": algorithm.precision,
        "weights_digest": backbones.digest(setup.hparams["weights"], setup.hparams["backbone"]),
        "backbone_digest": getattr(algorithm, "backbone_digest", None),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "versions": versions(),
        "imports": load(setup.args.imports),
        "sources": {
            **own_sources(type(algorithm), Algorithm),
            **own_sources(type(objective), Objective),
            **own_sources(type(setup.dataset), MultipleDomainDataset),
        },
        "machine": machine() | _about_device(algorithm.device),
    }


def _about_device(device: torch.device) -> dict[str, Any]:
    """What a record's "machine" says of the device of the run."""
    if device.type == "cpu":
        return {"gpu": None}
    return {} if torch.are_deterministic_algorithms_enabled() else {"deterministic": False}


def set_up_process(args: CompleteArguments) -> None:
    """Sets up this process: the same arguments give the same numbers, and memory is not asked for again every step.

    Args:
        args: Arguments of a run, completed.
    """
    torch.set_num_threads(args.threads)
    device = find_device(args.device)
    if device.index is not None:
        torch.cuda.set_device(device)
    compute_reproducibly(device)
    keep_freed_memory()


def set_up(args: RunArguments, recorded_hparams: Mapping[str, Any] | None = None) -> Setup:
    """Checks the arguments of a run and makes its parts.

    Args:
        args: Arguments of the run.
        recorded_hparams: Recorded final hyperparameters of an earlier run, which override those of the arguments.

    Raises:
        BenchmarkError: Something would stop the run later.
    """
    args = args.complete(workers=WORKERS if find_device(args.device).type == "cuda" else 0)
    load(args.imports)
    args = replace(args, algorithm=canonical_name(args.algorithm), dataset=DATASETS.canonical(args.dataset))
    hparams = args.resolve_hparams() | dict(recorded_hparams or {})
    hparams_registry.check(hparams)
    if args.task != "domain_generalization":
        raise BenchmarkError(f"--task {args.task}: no algorithm here uses unlabelled images; leave --task out")

    dataset = _make_dataset(args, hparams)
    test_envs, source_envs = protocols.environments_of_a_run(
        args.protocol, args.dataset, names_in(dataset), args.test_envs, args.source_envs
    )
    args = replace(args, test_envs=test_envs, source_envs=source_envs)
    protocols.check_evaluate(args.evaluate, source_envs is None and len(test_envs) > 1)
    fractions = args.holdout_fraction, args.uda_holdout_fraction
    splits = make_splits(dataset, test_envs, *fractions, args.trial_seed, args.split_by)
    for i, environment in enumerate(dataset.datasets):
        if i not in test_envs and hparams["batch_size"] > (size := len(splits[f"env{i}_in"])):
            raise BenchmarkError(
                f"batch_size {hparams['batch_size']} is larger than the {size} training images of environment "
                f"{environment.name}: lower it, e.g. --hparams '{{\"batch_size\": {min(32, size)}}}'"
            )
    if args.verify_images:
        broken: dict[str, str] = {}
        for environment in dataset.datasets:
            broken |= environment.verify()
        if broken:
            raise unreadable(broken)

    steps = dataset.N_STEPS if args.steps is None else args.steps
    freq = dataset.CHECKPOINT_FREQ if args.checkpoint_freq is None else args.checkpoint_freq
    inputs = backbones.inputs(hparams["backbone"], hparams["image_size"], args.input_stats)
    setup = Setup(args, test_envs, hparams, dataset, inputs, splits, steps, freq)
    _check_evaluations(setup)
    return setup


def _check_evaluations(setup: Setup) -> None:
    """Refuses evaluations that cannot be, and averages and early stopping that have no use for those that are."""
    count = setup.args.evaluations or 0
    if count > setup.steps:
        raise BenchmarkError(f"--evaluations {count} is more than the run's {setup.steps} steps: lower it")
    if setup.make_average().judges and setup.args.early_stopping:
        raise BenchmarkError(
            f"--early_stopping follows the validation accuracy, which average={setup.hparams['average']} measures at "
            "the last step alone: leave it out, for such a run ends with the valley of its validation loss"
        )


def _make_dataset(args: CompleteArguments, hparams: dict[str, Any]) -> MultipleDomainDataset:
    """Makes the data set, which takes indices of test environments, as DomainBed's do."""
    test_envs = [0] if args.test_envs is None else args.test_envs
    indices = [env for env in test_envs if isinstance(env, int)]
    if len(indices) < len(test_envs):
        indices = protocols.find_test_envs(args.dataset, list_environments(args.dataset, args.data_dir), test_envs)
    return DATASETS[args.dataset](args.data_dir, indices, hparams)
