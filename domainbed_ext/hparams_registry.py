"""Hyperparameters: what each algorithm has, its default, and where a random value is drawn from.

A random value comes from a generator seeded by the seed and the hyperparameter's name, as in DomainBed, so it
does not depend on the order of this file.

Why these defaults. The factors of an adapter start at zero or at random and must move far in few steps, and
Adam's step has the size of the learning rate, so they want a rate some 20 times that of the pretrained weights.
Of 5e-4, 1e-3 and 2e-3, 1e-3 had the best in-domain accuracy for `BOnly` on PACS with ViT-Ti and 24 images a step.
Full fine-tuning keeps DomainBed's rate, under which pretrained weights stay near their start; the small backbone
wants more. A linear probe is a convex problem, for which a large rate is safe. The weight decay is DomainBed's: zero.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from numpy.random import RandomState

from domainbed_ext.algorithms.registry import parse_name
from domainbed_ext.errors import BenchmarkError, unknown
from domainbed_ext.models.precision import PRECISIONS
from domainbed_ext.seeds import seed_hash

SMALL_IMAGES = ("Debug28", "RotatedMNIST", "ColoredMNIST", "DigitsShift")
DEBUG = ("Debug28", "Debug224")
_ADAPTERS = ("BA", "BOnly", "AOnly")
_OURS = (*_ADAPTERS, "LP", "FullFT")

Draw = Callable[[RandomState], Any]
Entry = tuple[Any, Draw]  # default, random


def _choice(*options: Any) -> Draw:
    return lambda r: r.choice(options)


def _fixed(value: Any) -> Entry:
    return value, lambda r: value


def _log10(low: float, high: float) -> Draw:
    return lambda r: 10 ** r.uniform(low, high)


def _entries(algorithm: str, dataset: str) -> dict[str, Entry]:
    """Every hyperparameter of an algorithm on a data set."""
    small = dataset in SMALL_IMAGES
    entries: dict[str, Entry] = {
        "backbone": _fixed("vit_pico_patch8_32" if small else "vit_base_patch16_224.augreg_in21k"),
        "weights": _fixed("pretrained"),
        "precision": _fixed("auto"),
        "image_size": _fixed(None),
        "data_augmentation": _fixed(True),
        "class_balanced": _fixed(False),
    }
    # DomainBed's own: its learning rate, decay and batch size.
    entries["lr"] = (1e-3, _log10(-4.5, -2.5)) if small else (5e-5, _log10(-5, -3.5))
    entries["weight_decay"] = _fixed(0.0) if small else (0.0, _log10(-6, -2))
    if small:
        entries["batch_size"] = (64, lambda r: int(2 ** r.uniform(3, 9)))
    else:
        largest = 5.0 if dataset == "DomainNet" else 5.5
        entries["batch_size"] = (32, lambda r: int(2 ** r.uniform(3, largest)))

    if algorithm == "ERM":
        entries["resnet_dropout"] = (0.0, _choice(0.0, 0.1, 0.5))
        entries["vit_dropout"] = (0.0, _choice(0.0, 0.1, 0.5))
        entries["nonlinear_classifier"] = _fixed(False)
    elif algorithm in _ADAPTERS:
        entries["lr"] = (1e-3, _log10(-3.5, -2))
        entries["rank"] = (8, lambda r: int(2 ** r.randint(2, 6)))
        entries["alpha"] = _fixed(None)  # 2·rank
        entries["targets"] = _fixed("all" if small else "q,v")  # the paper's parameter counts imply q and v
        entries["adapter_dropout"] = (0.0, _choice(0.0, 0.1))
        entries["compute"] = _fixed("folded")  # or "separate": see vitlorafa.AdapterConfig
        if algorithm != "BA":
            entries["gradient_correction"] = _fixed(False)  # for it takes a frozen factor
    elif algorithm == "LP":
        entries["lr"] = (3e-3, _log10(-3.5, -2))
    elif algorithm == "FullFT":
        entries["lr"] = (3e-4, _log10(-4.5, -3)) if small else (5e-5, _log10(-5, -3.5))
    if algorithm in _OURS and small:
        # Environments of some 450 images: a holdout has 90.
        entries["batch_size"] = (16, lambda r: int(2 ** r.uniform(3, 6)))
    if algorithm in _OURS and dataset in DEBUG:
        entries["batch_size"] = (8, lambda r: int(2 ** r.uniform(1, 3.5)))  # a training split has 13 images
    return entries


def plain(value: Any) -> Any:
    """A plain Python value: a NumPy scalar changes seeds, and JSON and weights_only loading refuse it."""
    return value.item() if isinstance(value, np.generic) else value


def default_hparams(algorithm: str, dataset: str) -> dict[str, Any]:
    """The default hyperparameters (`hparams_seed` 0).

    Args:
        algorithm: name, without "@".
        dataset: name.

    Returns:
        Name to plain Python value.
    """
    return {name: default for name, (default, _) in _entries(algorithm, dataset).items()}


def random_hparams(algorithm: str, dataset: str, seed: int) -> dict[str, Any]:
    """Random hyperparameters, as DomainBed draws them.

    Args:
        algorithm: name, without "@".
        dataset: name.
        seed: `seed_hash(hparams_seed, trial_seed)`.

    Returns:
        Name to plain Python value.
    """
    generator = RandomState()
    drawn = {}
    for name, (_, draw) in _entries(algorithm, dataset).items():
        generator.seed(seed_hash(seed, name))  # as a new one of that seed, in a hundredth of the time
        drawn[name] = plain(draw(generator))
    return drawn


def parse_hparams(text: str | None) -> dict[str, Any]:
    """Reads `--hparams`.

    Args:
        text: a JSON object, or nothing.

    Returns:
        Its content.

    Raises:
        BenchmarkError: it is not one.
    """
    if not text:
        return {}
    try:
        hparams = json.loads(text)
    except json.JSONDecodeError as error:
        raise BenchmarkError(f"--hparams is not JSON ({error}): write it like '{{\"rank\": 16}}'") from error
    if not isinstance(hparams, dict):
        raise BenchmarkError(f"--hparams is not a JSON object but {text}: write it like '{{\"rank\": 16}}'")
    return hparams


def names(dataset: str) -> set[str]:
    """The hyperparameters that any algorithm has on a data set."""
    return set().union(*(_entries(algorithm, dataset) for algorithm in (*_OURS, "ERM")))


def apply(hparams: dict[str, Any], overrides: Mapping[str, Any], source: str, others: Collection[str] = ()) -> None:
    """Sets hyperparameters in place.

    Args:
        hparams: an algorithm's.
        overrides: new values.
        source: where these come from, for the error.
        others: names that are other algorithms' and passed over, so that one `--hparams` serves a whole sweep.

    Raises:
        BenchmarkError: the algorithm has no such hyperparameter, or the value has another type than the default.
    """
    for name, value in overrides.items():
        if name not in hparams:
            if name in others:
                continue
            raise unknown(f"hyperparameter in {source}:", name, {*hparams, *others})
        current = hparams[name]
        number = isinstance(current, (int, float)) and not isinstance(current, bool)
        given_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if current is not None and (number != given_number or not (number or isinstance(value, type(current)))):
            raise BenchmarkError(
                f"hyperparameter {name} in {source} should be of type {type(current).__name__}, not {value!r}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise BenchmarkError(f"hyperparameter {name} in {source} is {value}: give a finite number")
        hparams[name] = value


def check(hparams: Mapping[str, Any]) -> None:
    """Checks the values that every algorithm has.

    Args:
        hparams: final hyperparameters.

    Raises:
        BenchmarkError: one is out of range; says which and what it may be.
    """
    if hparams["precision"] not in PRECISIONS:
        raise unknown("precision", str(hparams["precision"]), PRECISIONS)
    if not isinstance(hparams["batch_size"], int) or hparams["batch_size"] < 1:
        raise BenchmarkError(f"batch_size {hparams['batch_size']} should be a whole number from 1 on")
    size = hparams["image_size"]
    if size is not None and (not isinstance(size, int) or size < 1):
        raise BenchmarkError(f"image_size {size!r} should be a whole number of pixels, or null for the backbone's own")
    if not hparams["lr"] > 0:
        raise BenchmarkError(f"lr {hparams['lr']} should be above 0")
    if not hparams["weight_decay"] >= 0:
        raise BenchmarkError(f"weight_decay {hparams['weight_decay']} should be 0 or more")
    for name in ("resnet_dropout", "vit_dropout"):  # of adapters AdapterConfig checks it
        if not 0 <= hparams.get(name, 0) < 1:
            raise BenchmarkError(f"{name} {hparams[name]} should be 0 or more, and below 1")


def get_hparams(name: str, dataset: str, hparams_seed: int = 0, trial_seed: int = 0) -> dict[str, Any]:
    """The hyperparameters of an algorithm on a data set, those in its name included.

    Args:
        name: of the algorithm, with or without fixed hyperparameters.
        dataset: name.
        hparams_seed: 0 for the defaults, else of the random draw.
        trial_seed: number of the trial.

    Returns:
        Name to plain Python value.

    Raises:
        BenchmarkError: unknown algorithm, or a fixed hyperparameter it does not have.
    """
    base, fixed = parse_name(name)
    if hparams_seed == 0:
        hparams = default_hparams(base, dataset)
    else:
        hparams = random_hparams(base, dataset, seed_hash(hparams_seed, trial_seed))
    apply(hparams, fixed, f"the name {name!r}")
    return hparams
