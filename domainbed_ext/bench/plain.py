"""A run the plain way, DomainBed's: what ours is compared with in time and in accuracy.

torchvision's ImageFolder and transforms on PIL images, every image decoded each time; float32; a loader with worker
processes for each environment and each split, kept for the whole run; every split evaluated at every checkpoint, those
of the training environments augmented. Splits, hyperparameters, initial weights and the update are ours, so that only
the way differs; the model too, which in float32 does a little less work than timm's own (`vitlorafa.speed_up`).

    python -m domainbed_ext.bench.plain --dataset PACS --data_dir D --algorithm BOnly --steps 41 --output_dir O

takes the arguments of `python -m domainbed_ext.train` and writes its records; those that choose another way of
measuring (`--evaluate`, `--sampling`, ...) are passed over, but for `--train_eval_share` and `--precision bf16`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from domainbed_ext.data.loader import Minibatch
from domainbed_ext.data.splits import Split, environment_of
from domainbed_ext.datasets.folders import FolderEnvironment
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models.inputs import Inputs
from domainbed_ext.runs.arguments import RunArguments, parse
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.runs.setup import Setup, collect_facts, set_up, set_up_process
from domainbed_ext.seeds import seed_hash
from domainbed_ext.system.command_line import as_command

EVALUATION_BATCH = 64
_WORKERS = 2  # a loader; DomainBed's 8 would be 88 processes


def transforms(inputs: Inputs, augmented: bool) -> v2.Compose:
    """DomainBed's, on PIL images or tensors [3, height, width] of 8 bits.

    Args:
        inputs: The backbone's input size and input statistics.
        augmented: Whether images are augmented as for training, or only resized.
    """
    changes: list[v2.Transform] = [v2.Resize(inputs.size)]
    if augmented:
        changes = [
            v2.RandomResizedCrop(inputs.size, scale=(0.7, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.3, 0.3, 0.3, 0.3),
            v2.RandomGrayscale(p=0.1),
        ]
    numbers = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(inputs.mean, inputs.std)]
    return v2.Compose([*changes, *numbers])


def run(args: RunArguments, workers: int = _WORKERS) -> RunFolder:
    """Trains and evaluates.

    Args:
        args: Arguments of the run; the data set is one of image folders.
        workers: Number of processes of each loader; 0 for none.

    Returns:
        The run's folder, with its records.

    Raises:
        BenchmarkError: If the input has a mistake.
    """
    setup = set_up(replace(args, precision="bf16" if args.precision == "bf16" else "float32"))
    set_up_process(setup.args)
    algorithm = setup.make_algorithm()
    folder = RunFolder(args.output_dir)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.start()
    about, losses = collect_facts(setup, algorithm), []
    training = [_training(setup, env, workers) for env in setup.train_envs]
    evaluation = {name: _loader(setup, name, workers) for name in setup.splits}
    for step in range(setup.steps):
        losses.append(float(algorithm.update([next(stream) for stream in training])["loss"]))
        if setup.is_evaluated(step):
            algorithm.eval()
            accuracies = {}
            with torch.no_grad():
                for name, loader in evaluation.items():
                    right = sum((algorithm.predict(x).argmax(1).cpu() == y).sum().item() for x, y in loader)
                    accuracies[f"{name}_acc"] = right / len(setup.evaluated(name))
            folder.append({**about, **accuracies, "loss": float(np.mean(losses)), "step": step})
            losses.clear()
    folder.finish()
    return folder


def folder_of(setup: Setup, env: int) -> FolderEnvironment:
    """An environment with its image files.

    Args:
        setup: Parts of the run.
        env: Index of the environment.

    Raises:
        BenchmarkError: If it is not a folder of images.
    """
    environment = setup.dataset[env]
    if not isinstance(environment, FolderEnvironment):
        raise BenchmarkError(f"{environment.name} is no folder of images: give a data set that has them, e.g. PACS")
    return environment


def _images(setup: Setup, env: int, split: Split) -> Subset:
    environment = folder_of(setup, env)
    augmented = env in setup.train_envs and setup.hparams["data_augmentation"]
    root = str(environment.paths[0]).rsplit("/", 2)[0]
    return Subset(ImageFolder(root, transforms(setup.inputs, augmented)), split.keys)


def _training(setup: Setup, env: int, workers: int) -> Iterator[Minibatch]:
    images, size = _images(setup, env, setup.splits[f"env{env}_in"]), setup.images_a_domain
    generator = torch.Generator().manual_seed(seed_hash(setup.args.seed, env))
    sampler = RandomSampler(images, replacement=True, num_samples=size * setup.steps, generator=generator)
    return iter(DataLoader(images, size, sampler=sampler, num_workers=workers, generator=generator))


def _loader(setup: Setup, name: str, workers: int) -> DataLoader:
    images = _images(setup, environment_of(name), setup.evaluated(name))
    return DataLoader(images, EVALUATION_BATCH, num_workers=workers, persistent_workers=workers > 0)


@as_command()
def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    run(parse(argv))


if __name__ == "__main__":
    main()
