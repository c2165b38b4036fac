"""The methods by name."""

import json
from typing import Any

from domainbed_ext.algorithms.base import Algorithm
from domainbed_ext.algorithms.full import ERM, FullFT
from domainbed_ext.algorithms.lora import BA, AOnly, BOnly
from domainbed_ext.algorithms.probe import LP
from domainbed_ext.errors import BenchmarkError, unknown

ALGORITHMS: dict[str, type[Algorithm]] = {
    "BA": BA,
    "BOnly": BOnly,
    "AOnly": AOnly,
    "LP": LP,
    "FullFT": FullFT,
    "ERM": ERM,
}


def parse_name(name: str) -> tuple[str, dict[str, Any]]:
    """Takes `BOnly@rank=16,targets="q,v"` apart.

    Args:
        name: of an algorithm, with fixed hyperparameters or none.

    Returns:
        The registered name, and the fixed hyperparameters.

    Raises:
        BenchmarkError: unknown algorithm, or a part that is not `hyperparameter=value`.
    """
    base, _, fixed = name.partition("@")
    if base not in ALGORITHMS:
        raise unknown("algorithm", base, ALGORITHMS)
    hparams = {}
    for part in fixed.split(",") if fixed else ():
        key, equals, value = part.partition("=")
        if not (key and equals and value):
            raise BenchmarkError(f"{name!r}: {part!r} is not hyperparameter=value, as in {base}@rank=16")
        try:
            hparams[key] = json.loads(value)
        except json.JSONDecodeError:
            hparams[key] = value.replace("+", ",")  # targets=q+v: a comma parts hyperparameters
    return base, hparams


def get_algorithm_class(name: str) -> type[Algorithm]:
    """The class behind a name.

    Args:
        name: with or without fixed hyperparameters.

    Raises:
        BenchmarkError: unknown algorithm; names the nearest.
    """
    return ALGORITHMS[parse_name(name)[0]]
