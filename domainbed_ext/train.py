"""One run: trains an algorithm on all environments but the test ones, and records its accuracy on every split.

python -m domainbed_ext.train --algorithm BOnly --test_envs 0 --output_dir runs/one
"""

import argparse
import json
import random
import shutil
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from domainbed_ext import backbones, hparams_registry, precision
from domainbed_ext.algorithms import ALGORITHMS, Algorithm, get_algorithm_class, get_hparams
from domainbed_ext.data import Inputs, Minibatches, Split, evaluation_stream, training_stream, transform
from domainbed_ext.datasets import DATASETS, MultipleDomainDataset, get_dataset_class
from domainbed_ext.datasets.folders import unreadable
from domainbed_ext.errors import BenchmarkError, CommandLine, exit_cleanly
from domainbed_ext.provenance import machine, versions
from domainbed_ext.records import RunFolder, State
from domainbed_ext.seeds import holdout_split, seed_hash, split
from vitlorafa import count_parameters

EVALUATION_BATCH = 64  # as upstream; fixed, since another batch shape may round differently

# Options over DomainBed's that change a run's numbers, with what holds when they are not given. A sweep
# passes those that are given on to its runs and makes them part of a run's identity.
NUMBERS: dict[str, Any] = {
    "checkpoint_freq": None,
    "backbone": None,
    "weights": None,
    "precision": None,
    "input_stats": "backbone",
    "train_eval_share": 1.0,
    "threads": 1,
}


def add_number_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options in `NUMBERS`, which runs and sweeps share."""
    group = parser.add_argument_group("what else changes the numbers, and is written in every record")
    group.add_argument(
        "--checkpoint_freq", type=int, metavar="N", help="evaluate every N steps and at the last; 0: at the last alone"
    )
    group.add_argument("--backbone", metavar="NAME", help="any timm model, e.g. vit_tiny_patch16_224")
    group.add_argument("--weights", metavar="FILE", help="a .safetensors file, 'pretrained' (timm's own way) or 'none'")
    group.add_argument("--precision", choices=precision.PRECISIONS, help="auto: bf16 where the processor has it")
    group.add_argument(
        "--input_stats",
        choices=backbones.INPUT_STATS,
        help="images are normalised by the backbone's own mean and std (so unless told), or ImageNet's as in DomainBed",
    )
    group.add_argument(
        "--train_eval_share",
        type=float,
        metavar="SHARE",
        help="of each training environment's `in` split, on which train accuracy is measured (1)",
    )
    group.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads of a run (1: runs go side by side instead); another number rounds differently",
    )


def make_parser() -> argparse.ArgumentParser:
    """The command line: DomainBed's arguments, and those in `NUMBERS`."""
    parser = CommandLine(
        prog="python -m domainbed_ext.train",
        description="Trains one algorithm with some environments held out, as DomainBed does.",
        epilog="example:\n  python -m domainbed_ext.train --dataset PACS --data_dir data --algorithm BOnly@rank=16 "
        "--test_envs 3 \\\n    --steps 300 --output_dir runs/sketch",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data_dir", metavar="DIR", help="folder that holds the data sets")
    parser.add_argument("--dataset", default="DigitsShift", metavar="NAME", help=f"{', '.join(DATASETS)} (%(default)s)")
    parser.add_argument(
        "--algorithm", default="BOnly", metavar="NAME", help=f"{', '.join(ALGORITHMS)}, or NAME@rank=16 (%(default)s)"
    )
    parser.add_argument("--task", default="domain_generalization", metavar="NAME", help="%(default)s")
    parser.add_argument("--hparams", metavar="JSON", help="hyperparameters, over the defaults or the random draw")
    parser.add_argument("--hparams_seed", type=int, default=0, metavar="N", help="0: the defaults (%(default)s)")
    parser.add_argument("--trial_seed", type=int, default=0, metavar="N", help="of splits and random hyperparameters")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything else")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps (the data set's)")
    parser.add_argument(
        "--test_envs", type=int, nargs="+", default=[0], metavar="N", help="indices of the held-out environments (0)"
    )
    parser.add_argument("--output_dir", default="train_output", metavar="DIR", help="the run's folder (%(default)s)")
    parser.add_argument("--holdout_fraction", type=float, default=0.2, metavar="SHARE", help="(%(default)s)")
    parser.add_argument(
        "--uda_holdout_fraction", type=float, default=0.0, metavar="SHARE", help="of a test environment, kept from `in`"
    )
    parser.add_argument("--skip_model_save", action="store_true", help="do not save what was trained")
    parser.add_argument("--save_model_every_checkpoint", action="store_true", help="save it at every evaluation too")
    add_number_options(parser)
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that prepare images; 0: the run itself does"
    )
    parser.add_argument("--verify_images", action="store_true", help="check every image file before the start")
    parser.set_defaults(**{name: value for name, value in NUMBERS.items() if value is not None})
    return parser


@dataclass(frozen=True)
class Setup:
    """A run's parts, checked, before any work is done.

    Attributes:
        hparams: final hyperparameters.
        dataset: with all its environments.
        inputs: what the backbone is fed.
        splits: "env0_in", "env0_out", "env0_uda", ... to the samples; an empty split is left out.
        steps: number of training steps.
        checkpoint_freq: steps from one evaluation to the next; 0 for none but the last.
    """

    hparams: dict[str, Any]
    dataset: MultipleDomainDataset
    inputs: Inputs
    splits: dict[str, Split]
    steps: int
    checkpoint_freq: int

    def train_envs(self, test_envs: Sequence[int]) -> list[int]:
        """Indices of the environments that are not held out."""
        return [i for i in range(len(self.dataset)) if i not in test_envs]

    def make_algorithm(self, args: argparse.Namespace) -> Algorithm:
        """Builds the algorithm; the same seed gives the same one."""
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(args.seed)
        domains = len(self.train_envs(args.test_envs))
        return get_algorithm_class(args.algorithm)(self.inputs.shape, self.dataset.num_classes, domains, self.hparams)


def set_up(args: argparse.Namespace) -> Setup:
    """Checks the arguments of a run and makes its parts.

    Args:
        args: of `make_parser`.

    Returns:
        The parts.

    Raises:
        BenchmarkError: anything that would stop the run later, in one sentence.
    """
    hparams = get_hparams(args.algorithm, args.dataset, args.hparams_seed, args.trial_seed)
    given = {name: getattr(args, name) for name in ("backbone", "weights", "precision")}
    hparams_registry.apply(hparams, {k: v for k, v in given.items() if v is not None}, "the arguments")
    others = hparams_registry.names(args.dataset)
    hparams_registry.apply(hparams, hparams_registry.parse_hparams(args.hparams), "--hparams", others)
    hparams_registry.check(hparams)
    if args.task != "domain_generalization":
        raise BenchmarkError(f"--task {args.task}: no algorithm here uses unlabelled images; leave --task out")

    dataset = get_dataset_class(args.dataset)(args.data_dir, args.test_envs, hparams)
    _check_range("--holdout_fraction", args.holdout_fraction, 0, 1)
    _check_range("--uda_holdout_fraction", args.uda_holdout_fraction, 0, 1, low_allowed=True)
    _check_range("--train_eval_share", args.train_eval_share, 0, 1, high_allowed=True)
    _check_test_envs(args.test_envs, dataset)
    splits = _split(dataset, args)
    _check_batch_size(hparams["batch_size"], splits, args.test_envs, dataset)
    if args.verify_images:
        broken = [path for environment in dataset.datasets for path in environment.verify()]
        if broken:
            raise unreadable(broken)

    steps = dataset.N_STEPS if args.steps is None else args.steps
    freq = dataset.CHECKPOINT_FREQ if args.checkpoint_freq is None else args.checkpoint_freq
    if steps < 1 or freq < 0 or args.threads < 1 or args.workers < 0:
        raise BenchmarkError("--steps and --threads start at 1, --checkpoint_freq and --workers at 0")
    inputs = backbones.inputs(hparams["backbone"], hparams["image_size"], args.input_stats)
    return Setup(hparams, dataset, inputs, splits, steps, freq)


def _check_range(
    name: str, value: float, low: float, high: float, low_allowed: bool = False, high_allowed: bool = False
) -> None:
    if not (low < value < high or (low_allowed and value == low) or (high_allowed and value == high)):
        raise BenchmarkError(f"{name} {value} is out of range: give a share between {low} and {high}")


def _check_test_envs(test_envs: Sequence[int], dataset: MultipleDomainDataset) -> None:
    count = len(dataset)
    labels = ", ".join(f"{i} {label}" for i, label in enumerate(dataset.environments))
    wrong = [i for i in test_envs if not 0 <= i < count]
    if wrong:
        raise BenchmarkError(f"--test_envs {' '.join(map(str, wrong))}: there are {count} environments ({labels})")
    if len(set(test_envs)) == count:
        raise BenchmarkError(f"--test_envs names all {count} environments ({labels}): leave one to train on")


def _split(dataset: MultipleDomainDataset, args: argparse.Namespace) -> dict[str, Split]:
    splits = {}
    for i, environment in enumerate(dataset.datasets):
        held_out, kept = holdout_split(len(environment), args.holdout_fraction, args.trial_seed, i)
        uda: list[int] = []
        if i in args.test_envs:
            uda, kept = split(kept, int(len(kept) * args.uda_holdout_fraction), seed_hash(args.trial_seed, i))
        named = {"in": kept, "out": held_out, "uda": uda}
        splits.update({f"env{i}_{name}": Split(environment, keys) for name, keys in named.items() if keys})
        if not (kept and held_out):
            raise BenchmarkError(
                f"environment {environment.name} has {len(environment)} images, too few for a holdout of "
                f"{args.holdout_fraction}: add images or change --holdout_fraction"
            )
    return splits


def _check_batch_size(
    batch_size: int, splits: dict[str, Split], test_envs: Sequence[int], dataset: MultipleDomainDataset
) -> None:
    for i, environment in enumerate(dataset.datasets):
        size = len(splits[f"env{i}_in"])
        if i not in test_envs and batch_size > size:
            raise BenchmarkError(
                f"batch_size {batch_size} is larger than the {size} training images of environment "
                f"{environment.name}: lower it, e.g. --hparams '{{\"batch_size\": {min(32, size)}}}'"
            )


def accuracy(algorithm: Algorithm, split: Split, inputs: Inputs, workers: int = 0) -> float:
    """Share of a split's images that are classified right.

    Args:
        algorithm: whose `predict` is used.
        split: the images.
        inputs: what the backbone is fed.
        workers: processes that prepare images.

    Returns:
        A number in [0, 1].
    """
    algorithm.eval()
    correct = torch.zeros((), dtype=torch.long, device=algorithm.device)
    with torch.inference_mode():
        for images, labels in evaluation_stream(split, transform(inputs), EVALUATION_BATCH, workers):
            correct += (algorithm.predict(images).argmax(1) == labels.to(algorithm.device)).sum()
    return correct.item() / len(split)


def train(args: argparse.Namespace, setup: Setup, folder: RunFolder, progress: Callable[[float], None]) -> None:
    """Trains, evaluates, records and saves.

    Args:
        args: of `make_parser`.
        setup: the run's parts.
        folder: started.
        progress: told the share of the steps that are done.
    """
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    hparams, train_envs = setup.hparams, setup.train_envs(args.test_envs)
    algorithm = setup.make_algorithm(args)
    trainable, total = count_parameters(algorithm)
    facts = {
        "args": vars(args),
        "hparams": hparams,
        "environments": list(setup.dataset.environments),
        "precision": algorithm.precision,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "versions": versions(),
        "machine": machine(),
    }
    print(json.dumps(facts, indent=2, sort_keys=True))

    augmentation = setup.dataset.AUGMENTATION if hparams["data_augmentation"] else "none"
    training = [setup.splits[f"env{i}_in"] for i in train_envs]
    minibatches = Minibatches(
        training,
        transform(setup.inputs, augmentation),
        hparams["batch_size"],
        args.seed,
        hparams["class_balanced"],
    )
    evaluated = {
        name: _share(split, args.train_eval_share) if split in training else split
        for name, split in setup.splits.items()
    }
    every_in = [len(setup.splits[f"env{i}_in"]) for i in range(len(setup.dataset))]
    steps_per_epoch = min(every_in) / hparams["batch_size"]

    best, values = -1.0, defaultdict(list)
    stream = training_stream(minibatches, range(setup.steps), args.workers)
    for step in range(setup.steps):
        start = time.perf_counter()
        batches = next(stream)
        torch.manual_seed(seed_hash(args.seed, "update", step))  # so that step t needs no history (dropout)
        for name, value in algorithm.update(batches).items():
            values[name].append(value)
        values["step_time"].append(time.perf_counter() - start)
        progress((step + 1) / setup.steps)

        last = step == setup.steps - 1
        if not (last or (setup.checkpoint_freq and step % setup.checkpoint_freq == 0)):
            continue
        accuracies = {f"{n}_acc": accuracy(algorithm, s, setup.inputs, args.workers) for n, s in evaluated.items()}
        folder.append(
            {
                **facts,
                **{name: float(np.mean(history)) for name, history in values.items()},
                **accuracies,
                "step": step,
                "epoch": step / steps_per_epoch,
                "mem_gb": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0,
            }
        )
        print(f"step {step:5d}", *(f"{name} {value:.3f}" for name, value in sorted(accuracies.items())))
        values.clear()
        if not args.skip_model_save:
            validation = float(np.mean([accuracies[f"env{i}_out_acc"] for i in train_envs]))
            if validation > best:
                best = validation
                _save(algorithm, folder.path / "selected")
            if args.save_model_every_checkpoint:
                _save(algorithm, folder.path / f"step_{step}")


def _share(split: Split, share: float) -> Split:
    """The first part of a split, whose order is the seeded shuffle's."""
    return Split(split.environment, split.keys[: max(1, round(len(split) * share))])


def _save(algorithm: Algorithm, path: Path) -> None:
    """Saves whole or not at all."""
    partial = path.with_name(f".{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    algorithm.save(partial)
    shutil.rmtree(path, ignore_errors=True)
    partial.replace(path)


def run(args: argparse.Namespace, progress: Callable[[float], None]) -> int:
    """A run from its arguments to its `done` or `failed`.

    Args:
        args: of `make_parser`.
        progress: told the share of the steps that are done.

    Returns:
        Exit code: 0 for done, 2 for a mistake in the input, 1 for anything else that failed.
    """
    folder = RunFolder(args.output_dir)
    if folder.state is State.DONE:
        raise BenchmarkError(f"{folder.path} holds a finished run: give another --output_dir, or delete it")
    folder.start()
    with folder.log():
        try:
            train(args, set_up(args), folder, progress)
            folder.finish()
        except BenchmarkError as error:
            folder.fail(str(error), exit_code=2)
            print(f"error: {error}", file=sys.stderr)
            return 2
        except Exception as error:
            traceback.print_exc()
            folder.fail(f"{type(error).__name__}: {error}", exit_code=1)
            return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command: `python -m domainbed_ext.train`."""
    args = make_parser().parse_args(argv)
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"{args.dataset} {args.algorithm}", total=100)
        return run(args, lambda share: bar.update(task, completed=round(100 * share)))


if __name__ == "__main__":
    exit_cleanly(main)
