"""`--hparams`: hyperparameters as JSON, or as words `name=value`."""

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any

from domainbed_ext.algorithms.registry import read_value


def add_hparams_option(parser: argparse._ActionsContainer, meaning: str) -> None:
    """Adds `--hparams`, whose value is the text of a JSON object.

    Args:
        parser: Parser, or a group of it.
        meaning: What the hyperparameters do, for the help.
    """
    parser.add_argument(
        "--hparams",
        nargs="+",
        action=_Hparams,
        metavar="NAME=VALUE",
        help=f"""{meaning}: rank=16 lr=0.001, or as JSON: '{{"rank": 16, "lr": 0.001}}'""",
    )


class _Hparams(argparse.Action):
    """Stores words as one JSON object. JSON stays as it was typed, for DomainBed's names of folders depend on that."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            setattr(namespace, self.dest, join_hparams(values))
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None


def join_hparams(words: Sequence[str]) -> str:
    """Returns hyperparameters as the text of a JSON object.

    Args:
        words: One JSON object, which is returned as it is and not checked; or `name=value` each, with values as they
            are written in the name of a method.

    Raises:
        ValueError: A word is not `name=value`, or a name is given twice.
    """
    if len(words) == 1 and not re.match(r"\s*[A-Za-z_]", words[0]):
        return words[0]
    hparams: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name.isidentifier() and equals and value):
            example = "write them like rank=16 lr=0.001, or as one JSON object in quotes"
            raise ValueError(f"{word!r} is not NAME=VALUE: {example}")
        if name in hparams:
            raise ValueError(f"{name} is given twice: give it once")
        hparams[name] = read_value(value)
    return json.dumps(hparams)
