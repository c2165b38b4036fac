"""What a run computes, and the name that follows from it: the same wherever it runs and its data lie."""

import hashlib
from argparse import Namespace
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from domainbed_ext import hparams_registry, protocols
from domainbed_ext.algorithms.registry import parse_name
from domainbed_ext.datasets.registry import get_dataset_class
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.hparams_registry import get_hparams
from domainbed_ext.models import backbone_names, backbones
from domainbed_ext.runs.arguments import NUMBERS
from domainbed_ext.system import option_values, strict_json

Computation = dict[str, Any]
"""All that a run's numbers follow from, but for versions and machine: "args", "hparams" and "weights"."""

_HPARAMS_TOO = ("backbone", "weights", "precision")  # arguments that only set the hyperparameters of these names
_ARGUMENTS = (
    *("dataset", "algorithm", "task", "test_envs", "trial_seed", "hparams_seed", "seed", "steps"),
    *("holdout_fraction", "uda_holdout_fraction"),
    *(name for name in NUMBERS if name not in _HPARAMS_TOO),
)


class Computations:
    """What runs compute, for as many as there are: hyperparameters are drawn and weights are read once."""

    def __init__(self) -> None:
        self._drawn = cache(get_hparams)
        self._weights = cache(_weights)

    def of(self, args: Namespace) -> Computation:
        """What a run computes.

        Args:
            args: of `options.make_parser`; not changed, and not checked: a run that cannot be needs no name.

        Raises:
            BenchmarkError: an unknown name, or weights that are not there to be told from others.
        """
        args = protocols.resolve(args)
        drawn = self._drawn(args.algorithm, args.dataset, args.hparams_seed, args.trial_seed)
        hparams = final_hparams(args, drawn)
        weights = self._weights(hparams.pop("weights"), hparams["backbone"])
        hparams["backbone"] = backbone_names.identity(hparams["backbone"])
        return {"args": _said(vars(args), args.dataset), "hparams": hparams, "weights": weights}


def final_hparams(args: Namespace, drawn: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The hyperparameters that a run ends up with.

    Args:
        args: of the run, resolved.
        drawn: those of its algorithm and seeds; None draws them.

    Returns:
        Name to plain value; not checked.
    """
    hparams = dict(drawn or get_hparams(args.algorithm, args.dataset, args.hparams_seed, args.trial_seed))
    given = given_hparams(args)
    given |= hparams_registry.parse_hparams(args.hparams)
    given |= parse_name(args.algorithm)[1]  # a row is what its name says
    hparams |= {name: value for name, value in given.items() if name in hparams}
    if isinstance(weights := hparams["weights"], str):
        hparams["weights"] = option_values.expanded("weights", weights)
    return hparams


def given_hparams(args: Namespace) -> dict[str, Any]:
    """The hyperparameters that are arguments of their own, of those that were given."""
    return {name: value for name in _HPARAMS_TOO if (value := getattr(args, name)) is not None}


def name(computation: Computation) -> str:
    """Of the folder of a run that computes this: 32 hexadecimal digits, as DomainBed's names have."""
    text = strict_json.dumps(computation, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


def contradicts(computation: Computation, record: Mapping[str, Any]) -> bool:
    """Whether a record, ours or upstream DomainBed's, is of another computation.

    Args:
        computation: what a run computes.
        record: of a run that may be another. What it does not say contradicts nothing: upstream's runs have no
            protocol, and our first ones no digest of their weights.
    """
    args, hparams = record["args"], dict(record.get("hparams") or {})
    weights = hparams.pop("weights", None)
    if "backbone" in hparams:
        hparams["backbone"] = backbone_names.identity(hparams["backbone"])
    weights = record.get("weights_digest") or (weights if weights in backbones.NO_FILE else None)
    said = {name: value for name, value in _said(args, computation["args"]["dataset"]).items() if value is not None}
    return (
        any(computation["args"][name] != value for name, value in said.items())
        or any(computation["hparams"].get(name, value) != value for name, value in hparams.items())
        or weights not in (None, computation["weights"])
    )


def _said(args: Mapping[str, Any], dataset: str) -> dict[str, Any]:
    """The arguments that belong to a computation; of those that were not given, the data set's."""
    known = get_dataset_class(dataset)
    defaults = {"steps": known.N_STEPS, "checkpoint_freq": known.CHECKPOINT_FREQ}
    said = {name: args.get(name) for name in _ARGUMENTS}
    return said | {name: value for name, value in defaults.items() if said[name] is None}


def _weights(weights: str, backbone: str) -> str:
    digest = backbones.digest(weights, backbone)
    if digest is None:
        if weights in backbones.NO_FILE:
            return weights
        raise BenchmarkError(
            f"no weights file {Path(weights).expanduser()}: runs are told apart by what is in it; give --weights a "
            ".safetensors file, or leave it out for timm's own"
        )
    return digest
