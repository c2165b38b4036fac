"""What upstream's code (facebookresearch/DomainBed @ b93c22a) made of fixed input, held against ours without it."""

import json
import re

import numpy as np
import pytest

from domainbed_ext.model_selection import get_selection_method
from domainbed_ext.report.leave_one_out import averages_table, domain_table
from domainbed_ext.report.results import Results
from tests.compat import compare

GOLDEN = json.loads(compare.GOLDEN.read_text())


@pytest.mark.parametrize("name", compare.UPSTREAM_METHODS)
@pytest.mark.parametrize("seed", compare.GOLDEN_SEEDS)
def test_tables_are_upstreams(seed, name):
    figures = Results(compare.generate(np.random.RandomState(seed)), [get_selection_method(name)]).leave_one_out
    for title, columns, *rows in GOLDEN["tables"][str(seed)][name]:
        dataset = re.match(r"(?:Dataset: )?(\w+), model selection method: ", title)[1]
        if dataset == "Averages":
            ours = averages_table(
                [figures.comparison(get_selection_method(name), each) for each in figures.environments]
            )
        else:
            ours = domain_table(figures.comparison(get_selection_method(name), dataset))
        assert ours.columns == columns
        cells = sorted([compare.algorithm_of(row), *row[1:]] for row in ours.rows)
        for mine, theirs in zip(cells, rows, strict=True):
            for cell, their_cell in zip(mine, theirs, strict=True):
                assert their_cell in (cell, compare.with_error_of_one_trial(cell))


@pytest.mark.parametrize("line", compare.SWEEPS)
def test_jobs_have_upstreams_names_in_its_order(line):
    jobs = compare.our_jobs(compare.parse_sweep(line, "PACS"))
    assert [job.domainbed_hash for job in jobs] == GOLDEN["folders"]["PACS"][line]
