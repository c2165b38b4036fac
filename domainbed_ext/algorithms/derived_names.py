"""The names of derived runs: that of a method, and what was made of its runs, as in `BOnly@rank=16 soup(trials)`."""

import re

KINDS = ("soup", "strength")
SELECTED_STRENGTH = "strength(selected)"  # of a run at the strength that validation selects
_DERIVED = re.compile(rf"(.+) ((?:{'|'.join(KINDS)})(?:\([^()]*\))?)")


def split_derived(name: str) -> tuple[str, str]:
    """Splits the name of a derived run.

    Args:
        name: Name of a method as records have it.

    Returns:
        The method's name, and what was made of its runs, such as "soup(trials)": empty of a run that was trained.
    """
    match = _DERIVED.fullmatch(name)
    return (match[1], match[2]) if match else (name, "")


def join_derived(method: str, derived: str) -> str:
    """Joins what `split_derived` returned.

    Args:
        method: Name of a method.
        derived: What was made of its runs; empty for nothing.
    """
    return f"{method} {derived}" if derived else method
