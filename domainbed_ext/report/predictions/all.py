"""All analyses of predictions: their tables, and their files."""

import pandas as pd

from domainbed_ext.report.predictions.agreement import AGREEMENT
from domainbed_ext.report.predictions.analysis import Analysis
from domainbed_ext.report.predictions.calibration import CALIBRATION
from domainbed_ext.report.predictions.confusion import CONFUSION, PER_CLASS
from domainbed_ext.report.predictions.ensembles import ENSEMBLES
from domainbed_ext.report.predictions.mistakes import MISTAKES
from domainbed_ext.report.predictions.tested import Load, Predicted, gather
from domainbed_ext.report.results import Results
from domainbed_ext.report.tables.table import Table

ANALYSES: tuple[Analysis, ...] = (PER_CLASS, CONFUSION, CALIBRATION, AGREEMENT, ENSEMBLES, MISTAKES)


def gather_all(results: Results, load: Load) -> list[Predicted]:
    """Reads what the runs behind the main tables predict.

    Args:
        results: Figures of the runs.
        load: Function that reads the outputs of a run.

    Returns:
        What they predict, a comparison each; without those of which no run keeps its predictions.
    """
    return [predicted for comparison in results.panels if (predicted := gather(comparison, load)) is not None]


def make_tables(gathered: list[Predicted]) -> list[Table]:
    """Makes the tables of all analyses, comparison by comparison.

    Args:
        gathered: What the runs predict.
    """
    return [table for each in gathered for analysis in ANALYSES if (table := analysis.table(each)) is not None]


def make_files(gathered: list[Predicted]) -> dict[str, pd.DataFrame]:
    """Makes the files of all analyses that have rows.

    Args:
        gathered: What the runs predict.

    Returns:
        Their content by name without ending.
    """
    files = {
        analysis.name: pd.DataFrame([row for each in gathered for row in analysis.rows(each)]) for analysis in ANALYSES
    }
    return {name: file for name, file in files.items() if not file.empty}
