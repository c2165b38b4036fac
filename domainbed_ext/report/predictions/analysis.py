"""What an analysis of predictions consists of."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from domainbed_ext.report.predictions.tested import Predicted
from domainbed_ext.report.tables.table import Table


@dataclass(frozen=True)
class Analysis:
    """An analysis of predictions: a table and a file for each comparison.

    Attributes:
        name: Name of the file, without its ending.
        table: Function that makes the table; None where there is nothing to show.
        rows: Function that makes the rows of the file.
    """

    name: str
    table: Callable[[Predicted], Table | None]
    rows: Callable[[Predicted], Iterator[dict[str, Any]]]
