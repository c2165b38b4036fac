"""Files of tables as links that need no other file: the content is in the address."""

from typing import NamedTuple
from urllib.parse import quote

from domainbed_ext.report.tables.latex import render_table
from domainbed_ext.report.tables.table import Table

_KEPT = "!*'();:@$,/?[]~=+| "  # needs no escape in an address in double quotes, and blanks are common


class Download(NamedTuple):
    """A link to a file.

    Attributes:
        kind: Format, as the link says.
        name: Name of the file.
        address: Address.
    """

    kind: str
    name: str
    address: str


def table_downloads(table: Table) -> list[Download]:
    """A table as CSV and as LaTeX.

    Args:
        table: Table with rows.
    """
    name = table.slug
    return [
        Download("CSV", f"{name}.csv", _data("text/csv", table.to_csv())),
        Download("LaTeX", f"{name}.tex", _data("text/x-tex", render_table(table))),
    ]


def figure_downloads(name: str) -> list[Download]:
    """A plot as PNG and as SVG, which are beside the page.

    Args:
        name: Name of the plot.
    """
    return [Download(kind.upper(), f"{name}.{kind}", f"{name}.{kind}") for kind in ("png", "svg")]


def _data(kind: str, text: str) -> str:
    content = text.encode("utf-8", "surrogateescape")  # names of files may not be UTF-8
    return f"data:{kind};charset=utf-8,{quote(content, safe=_KEPT)}"
