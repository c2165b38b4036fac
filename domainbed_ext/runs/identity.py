"""What a run computes, and the name that follows from it: the same wherever it runs and its data lie."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from domainbed_ext import hparams_registry
from domainbed_ext.datasets.registry import get_dataset_class
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs.arguments import NUMBERS, RunArguments
from domainbed_ext.system import strict_json

Computation = dict[str, Any]
"""All that a run's numbers follow from, but for versions and machine: "args", "hparams" and "weights"."""

Resolve = Callable[..., Mapping[str, Any]]

_RESOLVED = ("algorithm", "dataset", "hparams_seed", "trial_seed", "hparams", *hparams_registry.OPTIONS)
_ARGUMENTS = (
    *("dataset", "algorithm", "task", "test_envs", "trial_seed", "hparams_seed", "seed", "steps"),
    *("holdout_fraction", "uda_holdout_fraction"),
    *(name for name in NUMBERS if name not in hparams_registry.OPTIONS),
)


class Computations:
    """What runs compute, for as many as there are: hyperparameters are resolved and weights are read once."""

    def __init__(self) -> None:
        self._resolve = cache(hparams_registry.resolve)
        self._weights = cache(_weights)

    def of(self, args: RunArguments) -> Computation:
        """What a run computes.

        Args:
            args: Arguments of the run; not checked: a run that cannot be needs no name.

        Raises:
            BenchmarkError: an unknown name, or weights that are not there to be told from others.
        """
        args = args.complete()
        hparams = hparams_of(args, self._resolve)
        weights = self._weights(hparams.pop("weights"), hparams["backbone"])
        hparams["backbone"] = _one_spelling(hparams["backbone"])
        return {"args": _said(asdict(args), args.dataset), "hparams": hparams, "weights": weights}


def hparams_of(args: RunArguments, resolve: Resolve = hparams_registry.resolve) -> dict[str, Any]:
    """The hyperparameters that a run ends up with.

    Args:
        args: Arguments of the run, with its protocol's choices.
        resolve: Function that resolves them; what it returns is not changed.
    """
    return dict(resolve(**{name: getattr(args, name) for name in _RESOLVED}))


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
    from domainbed_ext.models import backbones

    args, hparams = record["args"], dict(record.get("hparams") or {})
    weights = hparams.pop("weights", None)
    if "backbone" in hparams:
        hparams["backbone"] = _one_spelling(hparams["backbone"])
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


def _one_spelling(backbone: str) -> str:
    from domainbed_ext.models import backbone_names  # here, for with timm comes torch, which takes seconds

    return backbone_names.identity(backbone)


def _weights(weights: str, backbone: str) -> str:
    from domainbed_ext.models import backbones

    digest = backbones.digest(weights, backbone)
    if digest is None:
        if weights in backbones.NO_FILE:
            return weights
        raise BenchmarkError(
            f"no weights file {Path(weights).expanduser()}: runs are told apart by what is in it; give --weights a "
            ".safetensors file, or leave it out for timm's own"
        )
    return digest
