"""A run's parts, made from its arguments and checked before any work is done."""

import random
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from domainbed_ext import hparams_registry, protocols
from domainbed_ext.algorithms.base import Algorithm
from domainbed_ext.algorithms.registry import canonical_name, get_algorithm_class
from domainbed_ext.data.splits import Split, environment_of, make_splits
from domainbed_ext.datasets.base import MultipleDomainDataset
from domainbed_ext.datasets.digest import digest
from domainbed_ext.datasets.image_files import unreadable
from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models import backbones
from domainbed_ext.models.inputs import Inputs
from domainbed_ext.runs.identity import hparams_of
from domainbed_ext.runs.provenance import machine, own_sources, versions
from vitlorafa import count_parameters

WORKERS = 4  # beside a GPU, which one core does not keep busy


@dataclass(frozen=True)
class Setup:
    """A run's parts.

    Attributes:
        args: of `options.make_parser`, with what was not given filled in.
        hparams: final hyperparameters.
        dataset: with all its environments.
        inputs: what the backbone is fed.
        splits: "env0_in", "env0_out", "env0_uda", ... to the samples; an empty split is left out.
        steps: number of training steps.
        checkpoint_freq: steps from one evaluation to the next; 0 for none but the last.
    """

    args: Namespace
    hparams: dict[str, Any]
    dataset: MultipleDomainDataset
    inputs: Inputs
    splits: dict[str, Split]
    steps: int
    checkpoint_freq: int

    @property
    def train_envs(self) -> list[int]:
        """Indices of the environments that are trained on."""
        return [i for i in range(len(self.dataset)) if i not in self.args.test_envs]

    @property
    def validation_splits(self) -> list[str]:
        """Names of the splits that steps are selected by."""
        return [f"env{i}_out" for i in self.train_envs]

    @property
    def other_splits(self) -> list[str]:
        """Names of all other splits."""
        return [name for name in self.splits if name not in self.validation_splits]

    def evaluated(self, name: str) -> Split:
        """What of a split its accuracy is measured on: of those that are trained on `--train_eval_share`.

        Args:
            name: of the split, e.g. "env0_in".
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
        """Name in `augmentation.AUGMENTATIONS` of what training images undergo."""
        return self.dataset.AUGMENTATION if self.hparams["data_augmentation"] else "none"

    def make_algorithm(self) -> Algorithm:
        """Builds the algorithm; the same seed gives the same one."""
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(self.args.seed)
        make = get_algorithm_class(self.args.algorithm)
        algorithm = make(self.inputs.shape, self.dataset.num_classes, len(self.train_envs), self.hparams)
        # What is saved of it then says what images and classes it was trained on.
        backbone: Any = algorithm.backbone
        trained_on = self.inputs.to_timm() | {"label_names": list(map(str, self.dataset.classes))}
        backbone.pretrained_cfg = {**(getattr(backbone, "pretrained_cfg", None) or {}), **trained_on}
        return algorithm

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which the smallest training environment is seen once, as DomainBed counts epochs."""
        sizes = [len(self.splits[f"env{i}_in"]) for i in range(len(self.dataset))]
        return min(sizes) / int(self.hparams["batch_size"])


def facts(setup: Setup, algorithm: Algorithm | None = None) -> dict[str, Any]:
    """What every record of a run says of it.

    Args:
        setup: the run's parts.
        algorithm: that is trained; None makes it.
    """
    algorithm = algorithm or setup.make_algorithm()
    trainable, total = count_parameters(algorithm)
    return {
        "args": vars(setup.args),
        "hparams": setup.hparams,
        "environments": list(setup.dataset.environments),
        "data_digest": setup.data_digest,
        "split_sizes": {name: len(split) for name, split in setup.splits.items()},
        "precision": algorithm.precision,
        "weights_digest": backbones.digest(setup.hparams["weights"], setup.hparams["backbone"]),
        "backbone_digest": getattr(algorithm, "backbone_digest", None),  # a method may build itself in its own way
        "trainable_parameters": trainable,
        "total_parameters": total,
        "versions": versions(),
        "sources": {
            **own_sources(type(algorithm), Algorithm),
            **own_sources(type(setup.dataset), MultipleDomainDataset),
        },
        "machine": machine(),
    }


def compute_exactly(args: Namespace) -> None:
    """Sets torch, for this process, so that the same arguments give the same numbers.

    Args:
        args: of a run, resolved.
    """
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def set_up(args: Namespace, recorded_hparams: Mapping[str, Any] | None = None) -> Setup:
    """Checks the arguments of a run and makes its parts.

    Args:
        args: of `options.make_parser`; not changed.
        recorded_hparams: final hyperparameters of a run that was, over those that its arguments give now.

    Returns:
        The parts.

    Raises:
        BenchmarkError: anything that would stop the run later, in one sentence.
    """
    args = protocols.resolve(args)
    if args.workers is None:
        args.workers = WORKERS if torch.cuda.is_available() else 0
    args.algorithm, args.dataset = canonical_name(args.algorithm), DATASETS.canonical(args.dataset)
    hparams = hparams_of(args) | dict(recorded_hparams or {})
    hparams_registry.check(hparams)
    if args.task != "domain_generalization":
        raise BenchmarkError(f"--task {args.task}: no algorithm here uses unlabelled images; leave --task out")

    dataset = DATASETS[args.dataset](args.data_dir, args.test_envs, hparams)
    args.test_envs, args.source_envs = protocols.environments_of_a_run(args, environment_names(dataset))
    protocols.check_evaluate(args.evaluate, args.source_envs is None and len(args.test_envs) > 1)
    splits = make_splits(dataset, args.test_envs, args.holdout_fraction, args.uda_holdout_fraction, args.trial_seed)
    for i, environment in enumerate(dataset.datasets):
        if i not in args.test_envs and hparams["batch_size"] > (size := len(splits[f"env{i}_in"])):
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
    return Setup(args, hparams, dataset, inputs, splits, steps, freq)


def environment_names(dataset: MultipleDomainDataset) -> list[list[str]]:
    """What the environments of a data set may be called: each one's label, and its folder's name."""
    return [[label, part.name] for label, part in zip(dataset.environments, dataset.datasets, strict=True)]
