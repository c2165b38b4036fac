"""The pixels that a run trains on and looks at: out of the cache where they can be kept, else decoded each time."""

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
        environment: whose images.
        prepare: done to each, e.g. a resize.
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
    """Images at the size that a backbone is fed.

    Args:
        images: pixels.
        augmentation: what they undergo; `AUGMENTATIONS["none"]` for plain ones.
        size: (height, width) in pixels.
    """

    def __init__(self, images: Images, augmentation: Augmentation, size: tuple[int, int]) -> None:
        self.images, self.augmentation, self.size = images, augmentation, size

    def batch(self, keys: Sequence[int], generator: np.random.Generator) -> Tensor:
        """uint8 [len(keys), 3, height, width]."""
        return self.augmentation([self.images[key] for key in keys], self.size, generator)


def entries(args: RunArguments) -> Entries | None:
    """The cache that a run's arguments name; None if they say "none"."""
    folder = choose_folder(args.cache_dir)
    return None if folder is None else Entries(folder, int(args.cache_gb * 10**9))


def open_images(
    setup: Setup, variant: Variant, envs: Sequence[int], processes: int = 1, progress: Advance | None = None
) -> dict[int, Images]:
    """Environments' pixels, out of the cache, where they are put if they were not there.

    Args:
        setup: of a run.
        variant: the size that they are wanted at.
        envs: indices of the environments.
        processes: that decode.
        progress: see `open_cached`.

    Returns:
        By environment, its pixels. Those that are no files, or for which the cache has no room, are made at each use.

    Raises:
        BenchmarkError: images that cannot be read, all of them named.
    """
    environments = [setup.dataset[env] for env in envs]
    files = [environment for environment in environments if isinstance(environment, FileEnvironment)]
    cache = entries(setup.args) if len(files) == len(environments) else None
    if cache is not None:
        try:
            stored = open_cached(setup.args.dataset, files, variant, cache, processes, progress)
            return dict(zip(envs, stored, strict=True))
        except NoRoom as error:
            print(f"{error}; until then images are decoded each time", file=sys.stderr)
    return {env: Uncached(environment, variant) for env, environment in zip(envs, environments, strict=True)}


class RunImages:
    """A run's pixels by environment, opened when the first is asked for.

    Args:
        setup: the run's parts.
        progress: told how far the cache is, see `open_cached`.
    """

    def __init__(self, setup: Setup, progress: Advance | None = None) -> None:
        self.setup, self.progress = setup, progress

    @property
    def variants(self) -> dict[Variant, bool]:
        """At which sizes it takes images, each with whether it is for looking at them, or for training."""
        return {self.plain: True} | ({} if self.setup.augmentation == "none" else {self.original: False})

    @property
    def plain(self) -> Variant:
        """What is looked at: as the backbone is fed."""
        return Resized(*self.setup.inputs.size)

    @property
    def original(self) -> Variant:
        """What is augmented: as decoded, or (`--training_images resized`) a little larger than the backbone is fed."""
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
        """Every environment's images as the backbone is fed."""
        return open_images(self.setup, self.plain, range(len(self.setup.dataset)), progress=self.progress)

    @cached_property
    def training(self) -> dict[int, Images]:
        """Every training environment's images as they are augmented."""
        return open_images(self.setup, self.original, self.setup.train_envs, progress=self.progress)
