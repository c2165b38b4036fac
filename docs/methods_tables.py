"""Writes the tables of docs/methods.md from what methods and objectives declare: `make format` runs it."""

import re
from pathlib import Path

from domainbed_ext.algorithms import listing
from domainbed_ext.algorithms.hyperparameters import COMMON
from domainbed_ext.algorithms.listing import OBJECTIVES_GROUP, Entry

PAGE = Path(__file__).with_name("methods.md")


def fill(page: str) -> str:
    """Returns the page with its tables as they should be.

    Args:
        page: Text of the page.
    """
    entries = listing.built_in_entries()
    methods = [entry for entry in entries if entry.group != OBJECTIVES_GROUP]
    objectives = [entry for entry in entries if entry.group == OBJECTIVES_GROUP]
    tables = {
        "adaptations": [
            "| id | label | what trains | hyperparameters and defaults | paper |",
            "|---|---|---|---|---|",
            *_grouped(methods),
        ],
        "objectives": [
            "| after the `+` | what is minimised | hyperparameters and defaults | paper |",
            "|---|---|---|---|",
            *(f"| `{each.name}` | {_what(each)} | {_settings(each)} | {_paper(each)} |" for each in objectives),
        ],
        "common": [", ".join(f"`{name}={value}`" for name, value in _written(listing.defaults(COMMON)).items())],
    }
    for name, lines in tables.items():
        block = "\n".join([f"<!-- {name} -->", *lines, f"<!-- /{name} -->"])
        page = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, block=block: block, page, flags=re.DOTALL)
    return page


def _grouped(methods: list[Entry]) -> list[str]:
    """The rows, the first of each group with the group's name above it."""
    rows, group, above = [], "", {}
    for each in methods:
        if each.group != group:
            group = each.group
            rows.append(f"| **{listing.HEADINGS.get(group, group)}** | | | | |")
        own = each.own_defaults()
        if own and own == {name: default for name, default in above.items() if name not in each.in_name}:
            shown = "as above"
        else:
            shown, above = _settings(each), own
        rows.append(f"| `{each.name}` | {each.label} | {_what(each)} | {shown} | {_paper(each)} |")
    return rows


def _what(entry: Entry) -> str:
    return entry.explanation.replace("|", "\\|")


def _settings(entry: Entry) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in _written(entry.own_defaults()).items())


def _written(values: dict[str, object]) -> dict[str, str]:
    return {name: listing.written(value) for name, value in values.items()}


def _paper(entry: Entry) -> str:
    number = entry.paper.partition("arxiv.org/abs/")[2]
    return f"[{f'arXiv:{number}' if number else 'paper'}]({entry.paper})" if entry.paper else ""


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
