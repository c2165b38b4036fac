"""What a run computes, and its folder's name, which follows from that: wherever it runs and its data are."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from domainbed_ext import hparams_registry
from domainbed_ext.datasets.registry import get_dataset_class
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.protocols import LATER
from domainbed_ext.runs.arguments import NUMBERS, RunArguments
from domainbed_ext.system import strict_json

Computation = dict[str, Any]
"""All that a run's numbers follow from, but for versions and machine: "args", "hparams" and "weights"."""

_ARGUMENTS = (
    *("dataset", "algorithm", "task", "test_envs", "trial_seed", "hparams_seed", "seed", "steps"),
    *("holdout_fraction", "uda_holdout_fraction"),
    *(name for name in NUMBERS if name not in hparams_registry.OPTIONS),
)


class Computations:
    """What runs compute; the same hyperparameters are resolved, and the same weights are read, only once."""

    def __init__(self) -> None:
        self._resolve = cache(hparams_registry.resolve)
        self._weights = cache(_weights)

    def of(self, args: RunArguments) -> Computation:
        """Returns what a run computes.

        Args:
            args: Arguments of the run; not checked.

        Raises:
            BenchmarkError: A name is unknown, or the weights file is missing, whose content is part of the identity.
        """
        args = args.complete()
        hparams = args.resolve_hparams(self._resolve)
        weights = self._weights(hparams.pop("weights"), hparams["backbone"])
        hparams["backbone"] = _one_spelling(hparams["backbone"])
        return {"args": _arguments(asdict(args), args.dataset), "hparams": hparams, "weights": weights}


def name(computation: Computation) -> str:
    """Returns the name of the run's folder: 32 hexadecimal digits, as DomainBed's names."""
    args, hparams = computation["args"], computation["hparams"]
    hparams = hparams_registry.without_later_defaults(hparams, args["algorithm"], args["dataset"])
    args = {name: value for name, value in args.items() if name not in LATER or value != LATER[name]}
    text = strict_json.dumps(computation | {"args": args, "hparams": hparams}, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


def contradicts(computation: Computation, record: Mapping[str, Any]) -> bool:
    """Returns whether a record, of this package or of upstream DomainBed, is of another computation.

    Args:
        computation: What a run computes.
        record: Record of a run. What it lacks contradicts nothing: upstream's runs have no protocol, and early runs
            of this package no digest of their weights.
    """
    from domainbed_ext.models import backbones

    args, hparams = record["args"], dict(record.get("hparams") or {})
    weights = hparams.pop("weights", None)
    if "backbone" in hparams:
        hparams["backbone"] = _one_spelling(hparams["backbone"])
    weights = record.get("weights_digest") or (weights if weights in backbones.NO_FILE else None)
    recorded = _arguments(args, computation["args"]["dataset"])
    return (
        any(computation["args"][name] != value for name, value in recorded.items() if value is not None)
        or any(computation["hparams"].get(name, value) != value for name, value in hparams.items())
        or weights not in (None, computation["weights"])
    )


def _arguments(args: Mapping[str, Any], dataset: str) -> dict[str, Any]:
    """The arguments that belong to a computation, with the data set's defaults and what was always so before."""
    kind = get_dataset_class(dataset)
    defaults = {"steps": kind.N_STEPS, "checkpoint_freq": kind.CHECKPOINT_FREQ, **LATER}
    values = {name: args.get(name) for name in _ARGUMENTS}
    return values | {name: value for name, value in defaults.items() if values[name] is None}


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
            f"no weights file {Path(weights).expanduser()}: the names of runs depend on its content; give "
            "--weights a .safetensors file, or leave it out for timm's own"
        )
    return digest
