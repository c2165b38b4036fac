"""Differences to a reference, paired by trial."""

import io

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from domainbed_ext.collect_results import collect
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.report.differences import difference_over_trials
from domainbed_ext.report.plots.differences import difference_plot
from domainbed_ext.report.plots.plots import draw_plots
from domainbed_ext.report.results import Results
from domainbed_ext.report.tables.differences import difference_table
from tests.domainbed_ext.fabricated_records import left_out_run, paper_like, write_runs


def test_an_interval_by_hand():
    # Mean 2, standard deviation 1; Student's t of 2 degrees of freedom is 4.303 at 97.5 %: 4.303 / sqrt(3) = 2.48.
    assert str(difference_over_trials([0.01, 0.02, 0.03])) == "+2.0 (-0.5 to +4.5)"
    assert str(difference_over_trials([-0.01])) == "-1.0" and difference_over_trials([]) is None
    assert str(difference_over_trials([0.01, float("nan")])) == "-"


def test_intervals_hold_the_true_difference_as_often_as_they_say():
    rng = np.random.default_rng(0)
    intervals = [difference_over_trials(list(rng.normal(0.01, 0.02, 3))).interval for _ in range(2000)]
    assert np.mean([low <= 1 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.015)


def runs(lp_envs=(0, 1, 2, 3)):
    """LP is behind BOnly by 1, 2 and 3 points in three trials, on domains that differ by far more."""
    records = []
    for trial in range(3):
        for env in range(4):
            level = 0.5 + 0.1 * env + 0.02 * trial
            records += left_out_run("BOnly", trial, env, level)
            if env in lp_envs:
                records += left_out_run("LP", trial, env, level - 0.01 * (trial + 1), 0.7)
    return records


def table_of(records, reference="BOnly"):
    (comparison,) = Results(records).leave_one_out.main
    return difference_table(comparison, reference, "PACS")


def test_trials_are_paired():
    table = table_of(runs())
    assert table.columns == ["Algorithm", "Out-of-domain", "In-domain", "Gap source", "Gap target", "Trials"]
    assert table.title == "PACS, difference to BOnly (LoRA-FA)"
    assert table.rows == [
        ["BOnly (LoRA-FA)", "-", "-", "-", "-", "3"],
        [
            "LP (linear probe)",
            "-2.0 (-4.5 to +0.5)",
            "-10.0 (-10.0 to -10.0)",
            "+10.0 (+10.0 to +10.0)",
            "+2.0 (-0.5 to +4.5)",
            "3",
        ],
    ]
    assert {origin.run for origin in table.origins[1, 1]} == {record["run"] for record in runs()}


def test_only_domains_that_both_have_count():
    table = table_of(runs(lp_envs=(0, 1)))
    assert table.rows[1][1] == "-2.0 (-4.5 to +0.5)" and "2 of 4 environments" in table.rows[1][0]
    records = [record for record in runs() if record["args"]["algorithm"] == "BOnly" or record["args"]["trial_seed"]]
    assert table_of(records).rows[1][-1] == "2"


def test_nothing_in_common_is_missing():
    records = [*left_out_run("BOnly", 0, 0, 0.5), *left_out_run("LP", 0, 1, 0.5)]
    assert table_of(records).rows[1][1:] == ["X", "X", "X", "X", "0"]


def test_there_is_no_such_table_without_a_reference():
    results = Results(runs())
    before, after = ([table.title for table in results.tables(name)] for name in (None, "BOnly"))
    assert [title for title in after if title not in before] == ["PACS, difference to BOnly (LoRA-FA)"]
    single = Results(paper_like(2)).tables("LP")
    assert [table.title for table in single if "difference" in table.title] == [
        "PACS, single source C, difference to LP (linear probe)"
    ]


def test_the_command_writes_them(tmp_path):
    write_runs(tmp_path, runs())
    text = io.StringIO()
    paths = collect(tmp_path, console=Console(file=text, width=200), reference="lora-fa")
    assert "difference to BOnly (LoRA-FA)" in text.getvalue()
    frame = pd.read_csv(next(path for path in paths if path.name == "differences.csv"))
    (row,) = frame[frame["metric"] == "out_of_domain"].to_dict("records")
    assert (row["algorithm"], row["reference"], row["trials"], row["adaptation"]) == ("LP", "BOnly", 3, "linear probe")
    assert [row[name] for name in ("mean", "low", "high")] == pytest.approx([-2, -4.484, 0.484], abs=1e-3)
    assert tmp_path / "tables" / "differences.svg" in paths
    page = (tmp_path / "tables" / "index.html").read_text(encoding="utf-8")
    assert 'id="differences-figure"' in page and '−2.0 <span class="error">(−4.5 to +0.5)</span>' in page


def test_a_reference_without_runs(tmp_path):
    write_runs(tmp_path, runs())
    with pytest.raises(BenchmarkError, match="--reference BA: there are no runs of BA: choose one of BOnly, LP"):
        collect(tmp_path, console=Console(quiet=True), reference="BA")


def test_the_plot_has_a_bar_for_each_method_but_the_reference():
    records = runs()
    for record in [record for record in runs() if record["args"]["algorithm"] == "LP"]:
        args = {**record["args"], "algorithm": "FullFT"}
        level = {f"env{env}_in_acc": record[f"env{env}_in_acc"] - 0.1 for env in args["test_envs"]}
        records.append({**record, "args": args, "run": record["run"].replace("LP", "FullFT"), **level})
    results = Results(records)
    (axes,) = draw_plots(results, "BOnly")["differences"].axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["linear probe", "full fine-tuning"]
    points = [line for line in axes.lines if line.get_marker() == "o"]
    # The interval of LP holds 0 (see above), that of FullFT does not.
    assert [float(point.get_xdata()[0]) for point in points] == pytest.approx([-2, -12])
    assert points[0].get_markerfacecolor() == "white" != points[1].get_markerfacecolor()
    (low, high), _ = [bar.get_segments()[0][:, 0] for bar in axes.collections]
    assert (low, high) == pytest.approx((-4.484, 0.484), abs=1e-3)
    assert "differences" not in draw_plots(results)


def test_the_plot_claims_nothing_of_a_difference_without_an_interval():
    (axes,) = draw_plots(Results([*runs(()), *soup_of([0, 1, 2], 0.74)]), "BOnly")["differences"].axes
    (point,) = [line for line in axes.lines if line.get_marker() == "s"]
    assert float(point.get_xdata()[0]) == pytest.approx(22) and point.get_markerfacecolor() == "white"
    assert not axes.collections


def test_there_is_no_plot_of_nothing():
    assert difference_plot(Results(left_out_run("BOnly", 0, 0, 0.5)), "BOnly") is None


def soup_of(trials, level, unmeasured=""):
    """A soup over trials, on each domain."""
    derived = {"trials": list(trials), **({"unmeasured": unmeasured} if unmeasured else {})}
    for env in range(4):
        record = left_out_run("BOnly soup(trials)", trials[0], env, level + 0.1 * env)[-1]
        if unmeasured:
            record = {name: value for name, value in record.items() if not _is_in_domain(name, env)}
        yield {**record, "derived": derived}


def _is_in_domain(name, test_env):
    return name.endswith("_out_acc") and name != f"env{test_env}_out_acc"


def test_a_soup_is_paired_with_the_mean_over_its_trials():
    # BOnly has 0.50, 0.52 and 0.54 in its trials: the soup of the first two gains 3 points over their mean.
    records = [*runs(()), *soup_of([0, 1], 0.54)]
    assert table_of(records).rows[1][1:] == ["+3.0", "+0.0", "+0.0", "-3.0", "1"]
    (row, _) = table_of(records, "BOnly soup(trials)").rows
    assert row == ["BOnly (LoRA-FA)", "-3.0", "+0.0", "+0.0", "+3.0", "1"]
    both = [*records, *soup_of([2], 0.55)]  # gains 3 and 1
    assert table_of(both).rows[1][1] == "+2.0 (-10.7 to +14.7)"


def test_a_soup_over_all_trials_is_complete():
    (comparison,) = Results([*runs(()), *soup_of([0, 1, 2], 0.5)]).leave_one_out.main
    assert comparison.incomplete("BOnly soup(trials)") == ""
    (comparison,) = Results([*runs(()), *soup_of([0, 1], 0.5)]).leave_one_out.main
    assert comparison.incomplete("BOnly soup(trials)") == "8 of 12 results"


def test_what_was_not_measured_is_a_dash_with_a_reason():
    records = [*runs(()), *soup_of([0, 1, 2], 0.5, "no in-domain accuracy: too few images")]
    results = Results(records)
    assert table_of(records).rows[1][2] == "-"
    table = next(table for table in results.tables() if "generalisation" in table.title)
    assert [table.rows[1][column] for column in (2, 3, 4, 5, 6)] == ["-", "65.0", "90.0", "-", "25.0"]
    assert "BOnly soup(trials) has no in-domain accuracy: too few images." in table.caption
    assert "diverged" not in {row["metric"] for row in results.tidy().to_dict("records")}
    assert not results.tidy().query("algorithm == 'BOnly soup(trials)' and metric == 'in_domain'").size
    figure = draw_plots(results)["plot"]
    assert "not drawn, without in-domain accuracy: LoRA-FA, soup(trials)" in figure.get_supxlabel()
