"""The files of paired differences: `differences.csv`, `.md`, `.tex`, `_tables.tex`, `.json`, or `pairs.csv` etc."""

from collections.abc import Sequence

import pandas as pd

from domainbed_ext.report.files import encode
from domainbed_ext.report.pairs import ComparedPairs
from domainbed_ext.report.tables.differences import as_json, csv_rows, pairs_table
from domainbed_ext.report.tables.latex import render_document, render_fragment
from domainbed_ext.report.tables.table import render_markdown
from domainbed_ext.system import strict_json


def difference_files(compared: Sequence[ComparedPairs], name: str = "differences") -> dict[str, bytes]:
    """Renders the files.

    Args:
        compared: Pairs of methods of each comparison.
        name: What the files' names begin with: `differences` to one method, or `pairs` that were asked for.

    Returns:
        Contents by name; none if nothing was compared.
    """
    if not compared:
        return {}
    tables = [pairs_table(each) for each in compared]
    frame = pd.DataFrame([row for each in compared for row in csv_rows(each)])
    frame["trials_needed"] = frame["trials_needed"].astype("Int64")  # whole numbers, of which some are missing
    resampling = compared[0].comparison.resampling
    document = {
        "seed": resampling.seed,
        "resamples": resampling.resamples,
        "differences": [row for each in compared for row in as_json(each)],
    }
    return {
        f"{name}.csv": encode(frame.to_csv(index=False)),
        f"{name}.md": encode(render_markdown(tables, heading="Paired differences")),
        f"{name}.tex": encode(render_document(tables)),
        f"{name}_tables.tex": encode(render_fragment(tables)),
        f"{name}.json": encode(strict_json.dumps(document, indent=2) + "\n"),
    }
