"""The options of launchers: each launcher's are the fields of one class, which is all that there is to say of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_type_hints

from domainbed_ext.errors import BenchmarkError, unknown

T = TypeVar("T")


def option(default: Any, help: str, above: float | None = None, least: float | None = None) -> Any:
    """A field of a launcher's options.

    Args:
        default: its value unless it is given.
        help: what it means, as a line of a table.
        above: a number has to be greater than this.
        least: the smallest number that it may be.
    """
    return dataclasses.field(default=default, metadata={"help": help, "above": above, "least": least})


def read(kind: type[T], launcher: str, given: Mapping[str, Any]) -> T:
    """Checks what was given for a launcher's options.

    Args:
        kind: a dataclass whose fields are made by `option`, of type int, float, str or bool, or one of these or None.
        launcher: its name.
        given: values, or words of a command line that stand for them.

    Returns:
        The options.

    Raises:
        BenchmarkError: there is no such option, or the value is not of its type.
    """
    fields = {each.name: each for each in dataclasses.fields(kind)}  # type: ignore[arg-type]
    types = get_type_hints(kind)
    values = {}
    for name, value in given.items():
        if value is None:
            continue
        if name not in fields:
            if not fields:
                raise BenchmarkError(f"launcher {launcher} has no options, so none named {name!r}: leave it out")
            raise unknown(f"option of launcher {launcher}:", name, fields)
        wanted = next(each for each in get_args(types[name]) or (types[name],) if each is not type(None))
        values[name] = _convert(f"option {name} of launcher {launcher}", value, wanted, fields[name].metadata)
    return kind(**values)


def table(kind: type) -> list[tuple[str, str, str]]:
    """Name, default and meaning of each option of a launcher."""
    return [
        (each.name, "" if each.default is None else str(each.default), each.metadata["help"])
        for each in dataclasses.fields(kind)
    ]


def _convert(what: str, value: Any, wanted: type, bounds: Mapping[str, float | None]) -> Any:
    if wanted is bool:
        known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() in known:
            return known[str(value).lower()]
        raise BenchmarkError(f"{what} is {value!r}: give true or false")
    try:
        result = wanted(value if wanted is float else str(value))
    except (TypeError, ValueError) as error:
        kind = "a whole number" if wanted is int else "a number"
        raise BenchmarkError(f"{what} is {value!r}: give {kind}") from error
    above, least = bounds["above"], bounds["least"]
    if above is not None and not result > above:
        raise BenchmarkError(f"{what} is {value!r}: give a number above {above:g}")
    if least is not None and not result >= least:
        raise BenchmarkError(f"{what} is {value!r}: give a number of at least {least:g}")
    return result
