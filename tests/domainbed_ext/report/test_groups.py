"""Rows grouped by what trains and by what is minimised."""

import csv
import io
import itertools

import pandas as pd
import pytest
from rich.console import Console

from domainbed_ext.objectives import Objective, register_objective
from domainbed_ext.report.leave_one_out import domain_table
from domainbed_ext.report.methods import (
    adaptation_of,
    algorithm_order,
    group_starts,
    objective_of,
    objectives_of,
    row_label_of,
)
from domainbed_ext.report.pairs import against
from domainbed_ext.report.results import Results
from domainbed_ext.report.tables.differences import csv_rows
from domainbed_ext.report.tables.latex import render_document
from domainbed_ext.report.tables.objectives import objectives_table
from domainbed_ext.report.tables.table import print_tables
from tests.domainbed_ext.fabricated_records import left_out, left_out_run

NAMES = ["BA", "BA+CORAL", "BOnly@rank=8", "BOnly@rank=16", "BOnly+CORAL@rank=8", "LP", "FullFT"]


def comparison_of(records):
    (comparison,) = Results(records).leave_one_out.main
    return comparison


def test_an_id_has_an_adaptation_and_an_objective():
    assert [(adaptation_of(name), objective_of(name)) for name in ("BOnly+CORAL@rank=16", "BOnly@rank=16", "LP")] == [
        ("LoRA-FA", "CORAL"),
        ("LoRA-FA", "ERM"),
        ("linear probe", "ERM"),
    ]
    # An algorithm of upstream's is not declared here: what it minimises is not known.
    assert (adaptation_of("SagNet"), objective_of("SagNet")) == ("SagNet", "")


def test_rows_are_ordered_by_adaptation_then_objective_then_variant():
    mixed = NAMES[::-1]
    assert sorted(mixed, key=algorithm_order) == NAMES


@pytest.mark.usefixtures("registries")
def test_an_objective_is_shown_as_it_declares_itself():
    @register_objective("Zzz", label="my objective", order=-1)
    class Mine(Objective):
        pass

    names = ["BA+Zzz", "BA", "BA+Aaa", "LP"]  # Aaa is not registered here
    mixed = names[::-1]
    assert sorted(mixed, key=algorithm_order) == names
    assert objectives_of(names) == ["my objective", "ERM", "Aaa"]
    table = objectives_table(comparison_of(left_out(names)), "PACS")
    assert table.columns == ["Adaptation", "my objective", "ERM", "Aaa"]
    assert row_label_of("BA+Zzz@rank=4") == "BA+Zzz@rank=4 (LoRA + my objective)"


def test_groups_are_apart_where_one_has_several_rows():
    assert group_starts(NAMES) == {2, 5}
    assert group_starts(["AOnly", "LP", "BA", "BA+CORAL"]) == {2}
    assert group_starts(["BA", "BOnly@rank=8", "BOnly@rank=16", "LP"]) == set() == group_starts([])


@pytest.fixture(scope="module")
def table():
    return domain_table(comparison_of(left_out(NAMES)))


def test_a_table_names_both_and_keeps_the_ids(table):
    assert table.columns[:4] == ["Algorithm", "Adaptation", "Objective", "A"] and table.texts == 3
    assert [row[:3] for row in table.rows] == [
        ["BA", "LoRA", "ERM"],
        ["BA+CORAL", "LoRA", "CORAL"],
        ["BOnly@rank=8", "LoRA-FA", "ERM"],
        ["BOnly@rank=16", "LoRA-FA", "ERM"],
        ["BOnly+CORAL@rank=8", "LoRA-FA", "CORAL"],
        ["LP", "linear probe", "ERM"],
        ["FullFT", "full fine-tuning", "ERM"],
    ]
    # Cells are where they were, beside the two columns more.
    assert min(column for _, column in table.best | table.second | table.origins.keys()) == 3
    assert {origin.run for origin in table.origins[1, 3]} == {"BA+CORAL-0-0", "BA+CORAL-0-1"}


def test_what_runs_lack_is_beside_the_id():
    records = [*left_out(["BA", "BA+CORAL"]), *left_out_run("LP", 0, 0, 0.5)]
    tables = Results(records).tables()
    table = next(table for table in tables if table.title == "PACS, generalisation")
    assert table.rows[2][:3] == ["LP (1 of 4 environments)", "linear probe", "ERM"]


def test_groups_are_apart_in_every_form(table):
    text = io.StringIO()
    print_tables(Console(file=text, width=200), [table], "")
    lines = text.getvalue().splitlines()
    apart = [line.split()[0] for before, line in itertools.pairwise(lines) if line.strip() and not before.strip()]
    assert apart[-3:-1] == ["BOnly@rank=8", "LP"]
    latex = render_document([table])
    assert latex.count(r"\addlinespace") == 2 and "\\addlinespace\n\\method{LoRA-FA}{rank 8} & LoRA-FA & ERM &" in latex
    rows = list(csv.reader(io.StringIO(table.to_csv())))
    assert rows[0][:3] == ["Algorithm", "Adaptation", "Objective"] and len(rows) == 8
    assert table.to_markdown().splitlines()[1].startswith("| --- | --- | --- | ---: |")


def test_without_objectives_tables_have_no_more_columns():
    (table, *_) = Results(left_out(["BA", "LP"])).tables()
    assert table.columns[:2] == ["Algorithm", "A"] and table.breaks == set()
    assert objectives_table(comparison_of(left_out(["BA", "LP"])), "PACS") is None


def test_objectives_are_columns_of_their_own_table():
    records = left_out(["BA", "BA+CORAL", "LP", "FullFT", "FullFT+MMD"])
    comparison = comparison_of(records)
    table = objectives_table(comparison, "PACS")
    assert table.columns == ["Adaptation", "ERM", "CORAL", "MMD"]
    assert [row[0] for row in table.rows] == ["LoRA", "full fine-tuning"]  # LP has one objective alone
    summary = comparison.summary("BA+CORAL", "out_of_domain")
    assert table.rows[0][2] == f"{summary.mean:.1f}±{summary.err:.1f}" and table.rows[0][3] == "-"
    assert {origin.run.partition("-")[0] for origin in table.origins[0, 2]} == {"BA+CORAL"}
    assert table.origins[0, 3] == []


def test_variants_of_an_adaptation_are_rows_of_the_table_of_objectives():
    table = objectives_table(comparison_of(left_out(NAMES)), "PACS")
    # Rank 16 was run with one objective alone.
    assert [row[0] for row in table.rows] == ["LoRA", "LoRA-FA, rank 8"]
    assert "-: not run" not in table.caption


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        # Each has the learning rate that was best for it, which is not part of what trains.
        (["BA@lr=0.01", "BA@lr=0.001,rank=16", "BA+CORAL@lr=0.002,mmd_gamma=0.5"], ["LoRA"]),
        (["BA@lr=0.01", "BA@lr=0.001", "BA+CORAL@lr=0.001"], ["LoRA, lr 0.001"]),
        (["BA@lr=0.01", "BA+CORAL@lr=0.002,mmd_gamma=0.5", "LP@lr=0.1", "LP+CORAL"], ["LoRA", "linear probe"]),
    ],
)
def test_training_and_objective_make_no_row_of_their_own(names, rows):
    table = objectives_table(comparison_of(left_out(names, trials=1)), "PACS")
    assert [row[0] for row in table.rows] == rows


def test_csv_files_have_both():
    results = Results(left_out(["BA", "BA+CORAL"]))
    differences = pd.DataFrame([row for each in results.compare(against("BA")) for row in csv_rows(each)])
    for frame in (results.tidy(), results.selected(), differences):
        assert dict(zip(frame["algorithm"], frame["objective"], strict=True)).get("BA+CORAL") == "CORAL"
        assert set(frame["adaptation"]) == {"LoRA"}
