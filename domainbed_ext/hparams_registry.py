"""The hyperparameters of a run: the defaults or a random draw of its method, and the options that override them.

A method declares its hyperparameters where it registers itself: see `algorithms.registry`. A random value comes from a
generator seeded by the seed and the hyperparameter's name, as in DomainBed, so it depends on no order.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.random import RandomState

from domainbed_ext.algorithms.hyperparameters import ADAPTER
from domainbed_ext.algorithms.names import parse_name
from domainbed_ext.algorithms.registry import METHODS, OBJECTIVE, Method
from domainbed_ext.errors import BenchmarkError, unknown
from domainbed_ext.hyperparameter import Hyperparameter
from domainbed_ext.objectives.registry import DEFAULT, OBJECTIVES, Declaration
from domainbed_ext.protocols import PRECISIONS
from domainbed_ext.seeds import seed_hash
from domainbed_ext.system import option_values

OPTIONS = ("backbone", "weights", "precision")
"""Hyperparameters that are options of commands too."""


def plain(value: Any) -> Any:
    """Returns a plain Python value: NumPy scalars change seeds, and JSON and weights_only loading refuse them."""
    return value.item() if isinstance(value, np.generic) else value


def default_hparams(algorithm: str, dataset: str) -> dict[str, Any]:
    """Returns the default hyperparameters (`hparams_seed` 0).

    Args:
        algorithm: Name, without "@".
        dataset: Name.

    Returns:
        Name to plain Python value.
    """
    return {name: kind.for_dataset(dataset)[0] for name, kind in METHODS.find(algorithm).hyperparameters.items()}


def random_hparams(algorithm: str, dataset: str, seed: int) -> dict[str, Any]:
    """Draws random hyperparameters, as DomainBed does.

    Args:
        algorithm: Name, without "@".
        dataset: Name.
        seed: Seed, `seed_hash(hparams_seed, trial_seed)`.

    Returns:
        Name to plain Python value.
    """
    generator = RandomState()
    drawn = {}
    for name, kind in METHODS.find(algorithm).hyperparameters.items():
        draw = kind.for_dataset(dataset)[1]
        generator.seed(seed_hash(seed, name))  # the same as a new generator, in a hundredth of the time
        drawn[name] = plain(draw(generator))
    return drawn


def without_later_defaults(hparams: Mapping[str, Any], algorithm: str, dataset: str) -> dict[str, Any]:
    """Returns hyperparameters without those of a later version that have their default, so that they change nothing.

    Args:
        hparams: Final hyperparameters of a run.
        algorithm: Name, with or without fixed hyperparameters.
        dataset: Name.
    """
    later = later_defaults(algorithm, dataset)
    return {name: value for name, value in hparams.items() if name not in later or value != later[name]}


def later_defaults(algorithm: str, dataset: str) -> dict[str, Any]:
    """Returns the defaults of hyperparameters of a later version, which are what runs did that do not record them.

    Args:
        algorithm: Name, with or without fixed hyperparameters.
        dataset: Name.
    """
    kinds = METHODS.find(parse_name(algorithm)[0]).hyperparameters
    return {name: kind.for_dataset(dataset)[0] for name, kind in kinds.items() if kind.later}


def parse_hparams(text: str | None) -> dict[str, Any]:
    """Reads `--hparams`.

    Args:
        text: JSON object; None or empty for none.

    Returns:
        Values by name.

    Raises:
        BenchmarkError: The text is not a JSON object, or names the objective.
    """
    if not text:
        return {}
    try:
        hparams = json.loads(text)
    except json.JSONDecodeError as error:
        raise BenchmarkError(
            f"--hparams is not JSON ({error}): write it like rank=16, or '{{\"rank\": 16}}'"
        ) from error
    if not isinstance(hparams, dict):
        raise BenchmarkError(f"--hparams is not a JSON object but {text}: write it like '{{\"rank\": 16}}'")
    if OBJECTIVE in hparams:
        raise BenchmarkError("--hparams gives the objective: write it in the method's name, as in BOnly+CORAL")
    return hparams


def names() -> set[str]:
    """Returns the names and aliases of all algorithms' and objectives' hyperparameters."""
    declared = _all(dict(METHODS.importable()), dict(OBJECTIVES.importable()))
    return {each for _, name, kind in declared for each in (name, *kind.aliases)}


def canonical(algorithm: str, typed: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Returns hyperparameters by their canonical names, with values in their canonical spelling.

    Args:
        algorithm: Name, without "@".
        typed: Values by name or alias. Names that the algorithm does not have stay as they are.
        source: Where they come from, for the error.

    Raises:
        BenchmarkError: A hyperparameter is there by two names.
    """
    method = METHODS.find(algorithm)
    by_name: dict[str, str] = {}
    values = {}
    for alias, value in typed.items():
        name = method.canonical_hyperparameter(alias)
        if name in by_name:
            raise BenchmarkError(f"{source} gives {name} twice, as {by_name[name]} and as {alias}: give it once")
        by_name[name] = alias
        values[name] = method.hyperparameters[name].read(value) if name in method.hyperparameters else value
    return values


def apply(hparams: dict[str, Any], overrides: Mapping[str, Any], source: str, ignored: Collection[str] = ()) -> None:
    """Sets hyperparameters in place.

    Args:
        hparams: Hyperparameters of an algorithm.
        overrides: New values by name.
        source: Where they come from, for the error.
        ignored: Names of other algorithms' hyperparameters, so that one `--hparams` serves a whole sweep.

    Raises:
        BenchmarkError: The algorithm has no such hyperparameter, or the value has another type than the default.
    """
    for name, value in overrides.items():
        if name not in hparams:
            if name in ignored:
                continue
            if owners := _owners_of(name):
                raise BenchmarkError(
                    f"unknown hyperparameter in {source}: {name!r} belongs to {', '.join(owners)}: leave it out"
                )
            synonyms = _synonyms()
            raise unknown(f"hyperparameter in {source}:", name, {*hparams, *ignored} - synonyms.keys(), synonyms)
        current = hparams[name]
        number = isinstance(current, (int, float)) and not isinstance(current, bool)
        new_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if current is not None and (number != new_number or not (number or isinstance(value, type(current)))):
            raise BenchmarkError(
                f"hyperparameter {name} in {source} should be of type {type(current).__name__}, not {value!r}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise BenchmarkError(f"hyperparameter {name} in {source} is {value}: give a finite number")
        hparams[name] = value


def _all(
    methods: Mapping[str, Method], objectives: Mapping[str, Declaration]
) -> Iterator[tuple[str, str, Hyperparameter]]:
    """The hyperparameters of some algorithms and objectives: whose it is, its name, its declaration."""
    for method in methods.values():
        for each in method.variants.values() or (method,):
            yield from ((each.name, name, kind) for name, kind in each.hyperparameters.items())
    for owner, objective in objectives.items():
        yield from ((owner, name, kind) for name, kind in objective.hyperparameters.items())


def _owners_of(name: str) -> list[str]:
    """Who has a hyperparameter; of a method's variants the number, if it is more than one."""
    declared = _all(METHODS.registered(), OBJECTIVES.registered())
    owners: dict[str, list[str]] = {}
    for owner in (owner for owner, each, kind in declared if name in (each, *kind.aliases)):
        owners.setdefault(owner.partition("@")[0], []).append(owner)
    return [each[0] if len(each) == 1 else f"{len(each)} methods of {family}" for family, each in owners.items()]


def _synonyms() -> dict[str, str]:
    declared = _all(METHODS.registered(), OBJECTIVES.registered())
    return {alias: name for _, name, kind in declared for alias in kind.aliases}


def check(hparams: Mapping[str, Any]) -> None:
    """Checks the values of hyperparameters that all methods or those with adapters have, and of the objective's.

    Args:
        hparams: Final hyperparameters.

    Raises:
        BenchmarkError: A value is out of range.
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
    for name, kind in {**ADAPTER, **OBJECTIVES[hparams.get(OBJECTIVE, DEFAULT)].hyperparameters}.items():
        if kind.allowed and name in hparams and not kind.allowed.holds(hparams[name]):
            raise BenchmarkError(f"{name} {hparams[name]} should be {kind.allowed.words}")


def resolve(
    algorithm: str,
    dataset: str,
    hparams_seed: int = 0,
    trial_seed: int = 0,
    *,
    backbone: str | None = None,
    weights: str | None = None,
    precision: str | None = None,
    hparams: str | None = None,
) -> dict[str, Any]:
    """Returns the final hyperparameters of a run.

    Each of these overrides those before it:

    1. the algorithm's defaults on the data set (`hparams_seed` 0), or its random draw;
    2. options of the command line that are hyperparameters: `--backbone`, `--weights`, `--precision`;
    3. `--hparams`; those of other algorithms are ignored;
    4. those after the `@` in the algorithm's name, since a table's row is what its name says.

    Args:
        algorithm: Name in any spelling, with or without fixed hyperparameters.
        dataset: Name.
        hparams_seed: 0 for the defaults, else the seed of the random draw.
        trial_seed: Number of the trial, which the draw depends on too.
        backbone: Option of this name; None, as for the options below, if it was not given.
        weights: Option of this name.
        precision: Option of this name.
        hparams: Option of this name, a JSON object.

    Returns:
        Values by name, in plain Python. Their ranges are not checked: see `check`.

    Raises:
        BenchmarkError: The algorithm is unknown, it does not have a hyperparameter (for `--hparams`: no algorithm has
            it), or a value has another type than the default.
    """
    base, fixed = parse_name(algorithm)
    seed = seed_hash(hparams_seed, trial_seed)
    drawn = random_hparams(base, dataset, seed) if hparams_seed else default_hparams(base, dataset)
    options = dict(zip(OPTIONS, (backbone, weights, precision), strict=True))
    final = dict(drawn)
    for typed, source in (
        ({name: value for name, value in options.items() if value is not None}, "the arguments"),
        (parse_hparams(hparams), "--hparams"),
        (fixed, f"the name {algorithm!r}"),
    ):
        overrides = canonical(base, typed, source)
        shared = source == "--hparams" and not overrides.keys() <= drawn.keys()
        checked = dict(drawn)  # a value is compared with the default, not with one that was given before
        apply(checked, overrides, source, names() if shared else ())
        final |= {name: checked[name] for name in overrides if name in checked}
    if isinstance(final.get("weights"), str):
        final["weights"] = option_values.expand("weights", final["weights"])
    return final
