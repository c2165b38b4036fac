"""The pixels that a run trains on and evaluates: from the cache if they fit there, else decoded each time."""

import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from domainbed_ext.cache.entries import Entries, NoRoom, choose_folder
from domainbed_ext.cache.images import Advance, open_cached
from domainbed_ext.cache.variants import Decoded, Resized, Shorter, Variant, find_side_for_crops
from domainbed_ext.data.augmentation import Augmentation, Pixels
from domainbed_ext.datasets.base import Environment
from domainbed_ext.datasets.folders import FileEnvironment
from domainbed_ext.runs.arguments import RunArguments
from domainbed_ext.runs.setup import Setup


class Images(Protocol):
    """Pixels by index, uint8 [height, width, 3]; of any height and width, and not to be written to."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Pixels: ...


class Uncached:
    """Images that are decoded each time.

    Args:
        environment: Environment of the images.
        prepare: Function that is applied to each, e.g. a resize.
    """

    def __init__(
        self, environment: Environment, prepare: Callable[[Image.Image], Image.Image] = lambda image: image
    ) -> None:
        self.environment, self.prepare = environment, prepare

    def __len__(self) -> int:
        return len(self.environment)

    def __getitem__(self, index: int) -> Pixels:
        return np.asarray(self.prepare(self.environment.load(index)))


class Augmented:
    """Images at the backbone's input size.

    Args:
        images: Pixels.
        augmentation: Augmentation of them; `AUGMENTATIONS["none"]` for plain images.
        size: Input size, (height, width) in pixels.
    """

    def __init__(self, images: Images, augmentation: Augmentation, size: tuple[int, int]) -> None:
        self.images, self.augmentation, self.size = images, augmentation, size

    def batch(self, keys: Sequence[int], generator: np.random.Generator) -> Tensor:
        """uint8 [len(keys), 3, height, width]."""
        return self.augmentation([self.images[key] for key in keys], self.size, generator)


def entries(args: RunArguments) -> Entries | None:
    """Opens the cache of a run's arguments; None if they say "none"."""
    folder = choose_folder(args.cache_dir)
    return None if folder is None else Entries(folder, int(args.cache_gb * 10**9))


def open_images(
    setup: Setup, variant: Variant, envs: Sequence[int], processes: int = 1, progress: Advance | None = None
) -> dict[int, Images]:
    """Opens environments' pixels, from the cache, to which they are added if they were not there.

    Args:
        setup: Parts of a run.
        variant: Size of the images.
        envs: Indices of the environments.
        processes: Number of processes that decode.
        progress: Function that is told the progress, see `open_cached`.

    Returns:
        Pixels by environment. Those that are not files, or for which the cache has no room, are decoded at each use.

    Raises:
        BenchmarkError: Images cannot be read; all of them are named.
    """
    environments = [setup.dataset[env] for env in envs]
    files = [environment for environment in environments if isinstance(environment, FileEnvironment)]
    cache = entries(setup.args) if len(files) == len(environments) else None
    if cache is not None:
        try:
            stored = open_cached(setup.args.dataset, files, variant, cache, processes, progress)
            return dict(zip(envs, stored, strict=True))
        except NoRoom as error:
            print(f"warning: {error}; until then images are decoded each time", file=sys.stderr)
    return {env: Uncached(environment, variant) for env, environment in zip(envs, environments, strict=True)}


class RunImages:
    """A run's pixels by environment, opened at first use.

    Args:
        setup: Parts of the run.
        progress: Function that is told the progress of caching, see `open_cached`.
    """

    def __init__(self, setup: Setup, progress: Advance | None = None) -> None:
        self.setup, self.progress = setup, progress

    @property
    def variants(self) -> dict[Variant, bool]:
        """The sizes at which the run takes images, each with whether it is for evaluation (else training)."""
        return {self.plain: True} | ({} if self.setup.augmentation == "none" else {self.original: False})

    @property
    def plain(self) -> Variant:
        """The size of images that are evaluated: the backbone's input size."""
        return Resized(*self.setup.inputs.size)

    @property
    def original(self) -> Variant:
        """The size of images that are augmented: as decoded, or 9/8 of the input size (`--training_images resized`)."""
        if self.setup.args.training_images == "exact":
            return Decoded()
        return Shorter(find_side_for_crops(min(self.setup.inputs.size)))

    @cached_property
    def decodes(self) -> bool:
        """Whether image files are decoded each time that a batch is made."""
        opened = self.evaluation.values()
        return any(isinstance(each, Uncached) and isinstance(each.environment, FileEnvironment) for each in opened)

    @cached_property
    def evaluation(self) -> dict[int, Images]:
        """Every environment's images at the backbone's input size."""
        return open_images(self.setup, self.plain, range(len(self.setup.dataset)), progress=self.progress)

    @cached_property
    def training(self) -> dict[int, Images]:
        """Every training environment's images before augmentation."""
        return open_images(self.setup, self.original, self.setup.train_envs, progress=self.progress)
