"""Differences between the facts of two runs, or of a run and the present, in words.

Arguments, hyperparameters and weights are a run's identity, which names its folder. Whatever else its numbers depend on
is in its records: the data, versions, the precision that "auto" resolved to, the backbone's weights as they were
loaded, and the user's source files.
"""

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from domainbed_ext.hparams_registry import later_defaults
from domainbed_ext.runs.arguments import PLACES
from domainbed_ext.system import strict_json

_NAMED = 3  # of many differences


class Kind(str, Enum):
    """What may differ."""

    ARGUMENTS = "arguments"
    DATA = "data"
    WEIGHTS = "weights"
    VERSIONS = "versions"
    PRECISION = "precision"
    SOURCES = "source files"


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[Kind, str]:
    """Compares facts, wherever data and weights are stored. What only one of them has is no difference.

    Facts of earlier versions lack hyperparameters of later ones: there these have their defaults.

    Args:
        then: Facts of a record or a checkpoint, see `setup.collect_facts`.
        now: Facts of a run that starts, or a part of them.

    Returns:
        By kind, the difference in words; empty if there is none.
    """
    words_of = {
        Kind.ARGUMENTS: _arguments(then, now),
        Kind.DATA: _data(then, now),
        Kind.WEIGHTS: _weights(then, now),
        Kind.VERSIONS: changed(then.get("versions") or {}, now.get("versions") or {}),
        Kind.PRECISION: changed(_part(then, "precision"), _part(now, "precision")),
        Kind.SOURCES: _sources(then, now),
    }
    return {kind: words for kind, words in words_of.items() if words}


def changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The values of common keys that differ: "torch 2.13.0 then, 2.14.1 now"; empty if nothing."""
    names = [name for name in then if name in now and then[name] != now[name]]
    return "; ".join(
        [f"{name} {then[name]} then, {now[name]} now" for name in names[:_NAMED]]
        + ([f"and {len(names) - _NAMED} more"] if len(names) > _NAMED else [])
    )


def environments_that_differ(
    names: Sequence[str], digests: Sequence[str], other_names: Sequence[str], other_digests: Sequence[str]
) -> str:
    """Returns the differences between two data sets of one name.

    Args:
        names: Labels of the first one's environments.
        digests: Its `data_digest`.
        other_names: Labels of the other's environments.
        other_digests: The other's `data_digest`.

    Returns:
        Words; empty if they are the same.
    """
    if list(names) != list(other_names):
        return f"environments {', '.join(names)} there, {', '.join(other_names)} here"
    differing = [name for name, one, other in zip(names, digests, other_digests, strict=False) if one != other]
    if not differing:
        return ""
    where = f"environment {differing[0]}" if len(differing) == 1 else f"environments {', '.join(differing)}"
    return f"{where}: names, sizes or labels of images, or names of classes"


def _part(facts: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: facts[name] for name in names if facts.get(name) is not None}


def _arguments(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    later = later_defaults(now["args"]["algorithm"], now["args"]["dataset"]) if "hparams" in now else {}

    def identity(facts: Mapping[str, Any]) -> dict[str, Any]:
        args = {name: value for name, value in facts.get("args", {}).items() if name not in PLACES}
        hparams = {
            name: value for name, value in facts.get("hparams", {}).items() if name not in ("weights", "precision")
        }
        # A hyperparameter's final value replaces the argument that set it. As JSON, like the facts from a file.
        both: dict[str, Any] = json.loads(strict_json.dumps({**args, **(later if hparams else {}), **hparams}))
        return both

    return changed(identity(then), identity(now))


def _data(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if not (then.get("environments") and now.get("environments")):
        return ""
    if then.get("data_digest") and now.get("data_digest"):
        digests = then["data_digest"], now["data_digest"]
    else:
        digests = (), ()
    return environments_that_differ(then["environments"], digests[0], now["environments"], digests[1]) or changed(
        then.get("split_sizes") or {}, now.get("split_sizes") or {}
    )


def _weights(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Compares the content of files, the words "pretrained" and "none", and what was loaded if both record it."""
    if "hparams" in then and "hparams" in now and _weights_identity(then) != _weights_identity(now):
        return f"{then['hparams']['weights']} then, {now['hparams']['weights']} now"
    loaded = "backbone_digest"
    return "loaded from the same place, but different" if changed(_part(then, loaded), _part(now, loaded)) else ""


def _weights_identity(facts: Mapping[str, Any]) -> Any:
    return facts.get("weights_digest") or facts["hparams"].get("weights")


def _sources(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Source files of the method's and the data set's classes, and what `--import` named, if one of these is of it."""
    classes, imports = (_changed(then, now, kind) for kind in ("sources", "imports"))
    of_classes = [then["sources"][name] for name in classes]
    files = [name for name in imports if then.get("sources") and then["imports"][name] not in of_classes]
    words = [f"the source file of {' and of '.join(classes)} has changed"] if classes else []
    return "; ".join([*words, *(f"{name} has changed" for name in files)])


def _changed(then: Mapping[str, Any], now: Mapping[str, Any], kind: str) -> list[str]:
    """The names of a kind of digests that differ."""
    before, after = then.get(kind) or {}, now.get(kind) or {}
    return sorted(name for name in before if name in after and before[name] != after[name])
