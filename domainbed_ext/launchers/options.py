"""Options of launchers: each launcher's are the fields of one dataclass, which says everything about them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_type_hints

from domainbed_ext.errors import BenchmarkError, unknown

T = TypeVar("T")


def option(default: Any, help: str, above: float | None = None, least: float | None = None) -> Any:
    """Makes a field of a launcher's options.

    Args:
        default: Value if none is given.
        help: Meaning, as a line of a table.
        above: Number that it has to be greater than.
        least: Smallest number that it may be.
    """
    return dataclasses.field(default=default, metadata={"help": help, "above": above, "least": least})


def read(kind: type[T], launcher: str, values: Mapping[str, Any]) -> T:
    """Checks the values of a launcher's options.

    Args:
        kind: Dataclass whose fields are made by `option`, of type int, float, str or bool, or one of these or None.
        launcher: Name of the launcher.
        values: Values, or their text as on a command line; None counts as not given.

    Returns:
        The options.

    Raises:
        BenchmarkError: There is no such option, or the value is not of its type.
    """
    fields = {each.name: each for each in dataclasses.fields(kind)}  # type: ignore[arg-type]
    types = get_type_hints(kind)
    converted = {}
    for name, value in values.items():
        if value is None:
            continue
        if name not in fields:
            if not fields:
                raise BenchmarkError(f"launcher {launcher} has no options: leave {name!r} out of --launcher_options")
            raise unknown(f"option of launcher {launcher}:", name, fields)
        wanted = next(each for each in get_args(types[name]) or (types[name],) if each is not type(None))
        converted[name] = _convert(f"option {name} of launcher {launcher}", value, wanted, fields[name].metadata)
    return kind(**converted)


def list_options(kind: type) -> list[tuple[str, str, str]]:
    """Lists name, default and meaning of each option.

    Args:
        kind: Dataclass as in `read`.
    """
    return [
        (each.name, "" if each.default is None else str(each.default), each.metadata["help"])
        for each in dataclasses.fields(kind)
    ]


def _convert(what: str, value: Any, wanted: type, bounds: Mapping[str, float | None]) -> Any:
    if wanted is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() in words:
            return words[str(value).lower()]
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
