"""What a user did wrong, in one sentence: what is wrong, where, and what to do. And warnings."""

import sys
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path

_SIMILAR = 0.52  # least similarity (`SequenceMatcher.ratio`) of a name that is suggested; any two short names have 0.5
_AS_SIMILAR = 0.03  # how much less similar than the nearest name others may be that are suggested too
_SUGGESTED = 3
_LISTED = 20


class BenchmarkError(Exception):
    """A mistake in the input. Its message is one sentence for the user; the command line prints no traceback."""


def unknown(
    kind: str, name: str, names: Iterable[str], synonyms: Mapping[str, str] | None = None, otherwise: str = ""
) -> BenchmarkError:
    """The error for a name that is not in a registry: it suggests the nearest names, or lists the names.

    Args:
        kind: What the name should be, e.g. "algorithm".
        name: The unknown name.
        names: The valid names.
        synonyms: What else people call them, each with the valid name that is meant.
        otherwise: What to do if none of the names is meant, as the end of a sentence.

    Returns:
        The error, to be raised by the caller.
    """
    valid = sorted(names)
    near = _nearest(name.lower(), valid, synonyms or {})
    if near:
        hint = f"did you mean {' or '.join(filter(None, [', '.join(near[:-1]), near[-1]]))}?"
    else:
        rest = f" and {len(valid) - _LISTED} more" if len(valid) > _LISTED else ""
        hint = f"choose one of {', '.join(valid[:_LISTED])}{rest}{otherwise}."
    return BenchmarkError(f"unknown {kind} {name!r}: {hint}")


def _nearest(name: str, valid: list[str], synonyms: Mapping[str, str]) -> list[str]:
    """The valid names, quoted, that are most similar to a name in lower case, or whose synonyms are."""
    meant = {synonym.lower(): target for synonym, target in synonyms.items() if target in valid}
    meant |= {target.lower(): target for target in valid}
    if name in meant:
        return [repr(meant[name])]
    matcher = SequenceMatcher(b=name)
    similarity: dict[str, float] = {}
    for spelling, target in meant.items():
        matcher.set_seq1(spelling)
        similarity[target] = max(matcher.ratio(), similarity.get(target, 0))
    least = max(_SIMILAR, max(similarity.values(), default=0) - _AS_SIMILAR)
    near = [target for target, ratio in similarity.items() if ratio >= least]
    return [repr(target) for target in sorted(near, key=lambda target: (-similarity[target], target))[:_SUGGESTED]]


def not_writable(path: Path, error: OSError) -> BenchmarkError:
    """The error for a folder or file that cannot be written."""
    return BenchmarkError(f"cannot write to {path} ({error.strerror or error}): give another --output_dir")


@cache
def warn_once(sentence: str) -> None:
    """Prints a warning to stderr, unless this process has done so before.

    Args:
        sentence: What is wrong, and what happens instead.
    """
    print(f"warning: {sentence}", file=sys.stderr)


def print_errors(errors: Mapping[str, int], things: str) -> None:
    """Prints the errors of a command that continued with the rest.

    Args:
        errors: Number of things that ended with each error.
        things: Their name in the plural.
    """
    for sentence, count in errors.items():
        print(
            f"error: {sentence}" + (f" (and {count - 1} more {things} like it)" if count > 1 else ""), file=sys.stderr
        )
