"""Hyperparameters of methods: defaults and random draws, which may differ between data sets.

Why these defaults. The factors of an adapter start at zero or at random and must move far in few steps, and
Adam's step has the size of the learning rate, so they need about 20 times the rate of pretrained weights.
Of 5e-4, 1e-3 and 2e-3, 1e-3 had the best in-domain accuracy for `BOnly` on PACS with ViT-Ti and 24 images a step.
Full fine-tuning has DomainBed's rate, which keeps pretrained weights near their start; the small backbone needs a
higher one. A linear probe is a convex problem, for which a large rate is safe. The weight decay is DomainBed's: zero.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.random import RandomState

SMALL_IMAGES = ("Debug28", "RotatedMNIST", "ColoredMNIST", "DigitsShift")
DEBUG = ("Debug28", "Debug224")

Draw = Callable[[RandomState], Any]


@dataclass(frozen=True)
class Hyperparameter:
    """A hyperparameter of a method: its default and its random draw.

    Attributes:
        default: Value for `hparams_seed` 0. Other values must have its type, unless it is None.
        draw: Function that draws a random value, for all other seeds; None for the default.
        aliases: Other names that `--hparams` and the `@` in a method's name accept for it.
        read: Function that brings a value into its canonical spelling.
        exceptions: Data sets with their own default and draw, added by `on`; the last one counts.
        later: Whether the method has runs from before the hyperparameter: its default does what they did, and is left
            out of the names of run folders, so that these stay.
    """

    default: Any
    draw: Draw | None = None
    aliases: tuple[str, ...] = ()
    read: Callable[[Any], Any] = field(default=lambda value: value)
    exceptions: tuple[tuple[frozenset[str], Any, Draw | None], ...] = ()
    later: bool = False

    def on(self, datasets: Collection[str], default: Any, draw: Draw | None = None) -> "Hyperparameter":
        """Returns the hyperparameter with another default and draw on some data sets.

        Args:
            datasets: Names of the data sets.
            default: Default on these.
            draw: Draw on these; None for the default.
        """
        return replace(self, exceptions=(*self.exceptions, (frozenset(datasets), default, draw)))

    def for_dataset(self, dataset: str) -> tuple[Any, Draw]:
        """Returns default and draw on a data set.

        Args:
            dataset: Name.
        """
        default, draw = self.default, self.draw
        for datasets, its_default, its_draw in self.exceptions:
            if dataset in datasets:
                default, draw = its_default, its_draw
        return default, draw or (lambda generator: default)


Hyperparameters = Mapping[str, Hyperparameter]
"""Hyperparameters of a method, by name."""


def choice(*options: Any) -> Draw:
    """Returns a draw of one of several values."""
    return lambda generator: generator.choice(options)


def log_uniform(low: float, high: float) -> Draw:
    """Returns a draw from 10^low to 10^high, uniform in the exponent."""
    return lambda generator: 10 ** generator.uniform(low, high)


def power_of_two(low: float, high: float) -> Draw:
    """Returns a draw of a whole number from 2^low to 2^high, uniform in the exponent."""
    return lambda generator: int(2 ** generator.uniform(low, high))


def _targets(value: Any) -> Any:
    """Targets as one string; a list and PEFT's "all-linear" are accepted."""
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        value = ",".join(value)
    return "all" if value == "all-linear" else value


COMMON: Hyperparameters = {
    "backbone": Hyperparameter("vit_base_patch16_224.augreg_in21k", aliases=("model",)).on(
        SMALL_IMAGES, "vit_pico_patch8_32"
    ),
    "weights": Hyperparameter("pretrained"),
    "precision": Hyperparameter("auto"),
    "image_size": Hyperparameter(None, aliases=("img_size",)),
    "data_augmentation": Hyperparameter(True),
    "class_balanced": Hyperparameter(False),
    # DomainBed's own.
    "lr": Hyperparameter(5e-5, log_uniform(-5, -3.5), aliases=("learning_rate",)).on(
        SMALL_IMAGES, 1e-3, log_uniform(-4.5, -2.5)
    ),
    "weight_decay": Hyperparameter(0.0, log_uniform(-6, -2), aliases=("wd",)).on(SMALL_IMAGES, 0.0),
    "batch_size": Hyperparameter(32, power_of_two(3, 5.5), aliases=("bs",))
    .on(("DomainNet",), 32, power_of_two(3, 5.0))
    .on(SMALL_IMAGES, 64, power_of_two(3, 9)),
}
"""Hyperparameters of every method, with DomainBed's values."""


def _lr(default: float, draw: Draw) -> Hyperparameter:
    return Hyperparameter(default, draw, aliases=COMMON["lr"].aliases)


TUNED: Hyperparameters = {
    **COMMON,
    "batch_size": COMMON["batch_size"]
    # Environments of some 450 images: a holdout has 90.
    .on(SMALL_IMAGES, 16, power_of_two(3, 6))
    # A training split has 13 images.
    .on(DEBUG, 8, power_of_two(1, 3.5)),
}
"""Hyperparameters of this project's methods, with smaller batches on small data sets."""

ADAPTER: Hyperparameters = {
    **TUNED,
    "lr": _lr(1e-3, log_uniform(-3.5, -2)),
    "rank": Hyperparameter(
        8, lambda generator: int(2 ** generator.randint(2, 6)), aliases=("r", "lora_rank", "lora_r")
    ),
    "alpha": Hyperparameter(None, aliases=("lora_alpha",)),  # None is 2·rank
    # The parameter counts of Zhu et al. (2024) imply q and v.
    "targets": Hyperparameter("q,v", aliases=("target_modules",), read=_targets).on(SMALL_IMAGES, "all"),
    "adapter_dropout": Hyperparameter(0.0, choice(0.0, 0.1), aliases=("lora_dropout",)),
    "compute": Hyperparameter("folded"),  # or "separate": see vitlorafa.AdapterConfig
}
FROZEN_FACTOR: Hyperparameters = {**ADAPTER, "gradient_correction": Hyperparameter(False)}
PROBE: Hyperparameters = {**TUNED, "lr": _lr(3e-3, log_uniform(-3.5, -2))}
FULL: Hyperparameters = {
    **TUNED,
    "lr": _lr(5e-5, log_uniform(-5, -3.5)).on(SMALL_IMAGES, 3e-4, log_uniform(-4.5, -3)),
}
FEW: Hyperparameters = {**TUNED, "lr": _lr(1e-3, log_uniform(-3.5, -2))}
"""Hyperparameters of methods that train few parameters of the backbone, such as its biases."""
LAST_BLOCKS: Hyperparameters = {**FULL, "n": Hyperparameter(2, choice(1, 2, 3))}
DOMAINBED: Hyperparameters = {
    **COMMON,
    "resnet_dropout": Hyperparameter(0.0, choice(0.0, 0.1, 0.5)),
    "vit_dropout": Hyperparameter(0.0, choice(0.0, 0.1, 0.5)),
    "nonlinear_classifier": Hyperparameter(False),
}
