"""Hyperparameters of methods: defaults and random draws, which may differ between data sets.

Why these defaults. The factors of an adapter start at zero or at random and must move far in few steps, and
Adam's step has the size of the learning rate, so they need about 20 times the rate of pretrained weights.
Of 5e-4, 1e-3 and 2e-3, 1e-3 had the best in-domain accuracy for `BOnly` on PACS with ViT-Ti and 24 images a step.
Full fine-tuning has DomainBed's rate, which keeps pretrained weights near their start; the small backbone needs a
higher one. A linear probe is a convex problem, for which a large rate is safe. The weight decay is DomainBed's: zero.
"""

from collections.abc import Mapping
from types import NoneType
from typing import Any

from domainbed_ext.algorithms.schedules import SCHEDULES
from domainbed_ext.averaging.hyperparameters import AVERAGE
from domainbed_ext.hyperparameter import (
    A_COUNT,
    NOT_BELOW_0_AND_BELOW_1,
    Allowed,
    Draw,
    Hyperparameter,
    Hyperparameters,
    choice,
    log_uniform,
    one_of,
    power_of_two,
)

SMALL_IMAGES = ("Debug28", "RotatedMNIST", "ColoredMNIST", "DigitsShift")
DEBUG = ("Debug28", "Debug224")


def _targets(value: Any) -> Any:
    """Targets as one string; a list and PEFT's "all-linear" are accepted."""
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        value = ",".join(value)
    return "all" if value == "all-linear" else value


def _text(value: Any) -> Any:
    """A mapping, a list or a number as it is written behind the "@": "all=uniform,fc2=gaussian", "0,1", "3"."""
    if isinstance(value, Mapping):
        return ",".join(f"{target}={name}" for target, name in value.items())
    if isinstance(value, list):
        return ",".join(map(str, value))
    return value if isinstance(value, (str, bool, NoneType)) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


HEAD_STARTS = ("random", "zero", "probe")
"""Where the head starts: as timm draws it, at zero, or at the linear probe on the pretrained backbone's features."""

COMMON: Hyperparameters = {
    "backbone": Hyperparameter("vit_base_patch16_224.augreg_in21k", aliases=("model",)).on(
        SMALL_IMAGES, "vit_pico_patch8_32"
    ),
    "weights": Hyperparameter("pretrained"),
    "precision": Hyperparameter("auto"),
    "image_size": Hyperparameter(None, aliases=("img_size",)),
    "data_augmentation": Hyperparameter(True),
    "class_balanced": Hyperparameter(False),
    "head_start": Hyperparameter("random", later=True, allowed=one_of(*HEAD_STARTS), words="{} head"),
    # DomainBed's own.
    "lr": Hyperparameter(5e-5, log_uniform(-5, -3.5), aliases=("learning_rate",)).on(
        SMALL_IMAGES, 1e-3, log_uniform(-4.5, -2.5)
    ),
    "weight_decay": Hyperparameter(0.0, log_uniform(-6, -2), aliases=("wd",)).on(SMALL_IMAGES, 0.0),
    "batch_size": Hyperparameter(32, power_of_two(3, 5.5), aliases=("bs",))
    .on(("DomainNet",), 32, power_of_two(3, 5.0))
    .on(SMALL_IMAGES, 64, power_of_two(3, 9)),
    # Not DomainBed's: see `schedules.Schedule`, and `Algorithm.update`.
    "schedule": Hyperparameter(
        "constant", aliases=("lr_schedule",), later=True, allowed=one_of(*SCHEDULES), words="{} schedule"
    ),
    "warmup": Hyperparameter(
        0.0, aliases=("warmup_ratio",), later=True, allowed=NOT_BELOW_0_AND_BELOW_1, words="warm-up {}"
    ),
    "clip_grad": Hyperparameter(
        None,
        aliases=("max_grad_norm",),
        later=True,
        allowed=Allowed("a number above 0, or null", lambda value: value is None or (_is_number(value) and value > 0)),
        words="gradients clipped at {}",
    ),
    "label_smoothing": Hyperparameter(0.0, later=True, allowed=NOT_BELOW_0_AND_BELOW_1),
    "accumulate": Hyperparameter(
        1,
        aliases=("gradient_accumulation_steps",),
        later=True,
        allowed=A_COUNT,
        words="{} minibatches a step",
    ),
    **AVERAGE,
}
"""Hyperparameters of every method, with DomainBed's values where it has them."""


def is_changed(name: str, hparams: Mapping[str, Any]) -> bool:
    """Returns whether a hyperparameter of all methods has another value than its default.

    Args:
        name: Name in `COMMON`.
        hparams: Hyperparameters of a run; those of earlier versions may lack it.
    """
    return name in hparams and bool(hparams[name] != COMMON[name].default)


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
    "targets": Hyperparameter("q,v", aliases=("target_modules",), read=_targets, words="{}").on(SMALL_IMAGES, "all"),
    "adapter_dropout": Hyperparameter(0.0, choice(0.0, 0.1), aliases=("lora_dropout",)),
    "compute": Hyperparameter("folded"),  # or "separate": see vitlorafa.AdapterConfig
    # None, "int8" or "nf4".
    "quantise": Hyperparameter(None, aliases=("quantize", "quantization"), later=True, words="{} base"),
    # None follows from the factors that train.
    "init_A": Hyperparameter(None, read=_text, later=True),
    "init_B": Hyperparameter(None, read=_text, later=True),
    "rank_stabilised": Hyperparameter(False, aliases=("use_rslora",), later=True),
    "blocks": Hyperparameter(None, aliases=("layers_to_transform",), read=_text, later=True),  # None is all
    # None: from the run's seed.
    "adapter_seed": Hyperparameter(
        None,
        later=True,
        allowed=Allowed(
            "a whole number from 0 to 2^63 - 1, or null",
            lambda value: value is None or (type(value) is int and 0 <= value < 2**63),
        ),
    ),
}
BOTH_FACTORS: Hyperparameters = {
    **ADAPTER,
    "lr_B_ratio": Hyperparameter(1.0, aliases=("loraplus_lr_ratio",), later=True, words="ratio {}"),
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
