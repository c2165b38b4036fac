import io

import numpy as np
import pytest
from rich.console import Console

from domainbed_ext.collect_results import collect, main
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.report.differences import difference_over_trials
from domainbed_ext.report.paper.claims import PAPER_CLAIMS, Block, Evidence, claims_table, weigh
from domainbed_ext.report.paper.tables import differences, paper_names, paper_tables, printed, tidy
from domainbed_ext.report.results import Results
from tests.domainbed_ext.fabricated_records import METHODS, paper_like, single_source_run, write_runs


def row_of(table, *start):
    return next(row for row in table.rows if row[: len(start)] == list(start))


def test_printed_tables():
    found = printed()
    assert list(found) == ["VLCS", "PACS", "OfficeHome", "TerraIncognita"]
    assert all(theirs.source == 1 and len(theirs.cells) == 7 * 2 * 4 for theirs in found.values())
    assert found["PACS"].cell("LP", "accuracy", 1) == (81.62, 0.34)
    # Table 7's means out of domain.
    assert round(found["VLCS"].cell("BA@rank=8", "accuracy", None).mean, 2) == 56.43
    assert round(found["PACS"].cell("FullFT", "accuracy", None).std, 2) == 2.43
    assert found["PACS"].cell("ERM", "accuracy", None) is None


def test_ours_beside_theirs():
    accuracy, gap = paper_tables(Results(paper_like(2)))
    assert accuracy.columns == [
        "Algorithm",
        "Whose",
        "A (OOD)",
        "C (ID)",
        "P (OOD)",
        "S (OOD)",
        "OOD mean",
    ]
    assert [row[1] for row in accuracy.rows] == ["ours", "paper", "difference"] * 7
    ours = float(row_of(accuracy, "LP (linear probe)", "ours")[3].split("±")[0])
    assert row_of(accuracy, "LP (linear probe)", "paper")[3] == "81.6±0.3"
    assert float(row_of(accuracy, "LP (linear probe)", "difference")[3]) == pytest.approx(ours - 81.62, abs=0.06)
    assert row_of(gap, "FullFT (full fine-tuning)", "paper")[2:4] == ["24.4±2.9", "1.8±0.5"]
    assert "tables 7 and 11" in accuracy.caption and "table 13" in gap.caption
    frame = tidy(Results(paper_like(2)))
    assert len(frame) == 7 * 2 * 5 and set(frame["trials"]) == {2}
    np.testing.assert_allclose(frame["difference"], frame["ours"] - frame["paper"])


def words_on(records, dataset="PACS"):
    results = Results(records)
    return differences(results, results.single_source, dataset)


def test_what_differs_is_said():
    words = words_on(paper_like(1))
    assert "300 steps" in words and "does not say for how many" in words and "we ran 1 trial," in words
    assert "levels" not in words
    tiny = single_source_run("LP", backbone="vit_tiny_patch16_224")
    words = words_on(paper_like(1, datasets=["VLCS"]) + tiny)
    assert "the backbone is vit_tiny_patch16_224, where" in words and "levels cannot be compared" in words
    assert "the backbone" not in words_on(paper_like(1, datasets=["VLCS"]) + tiny, "VLCS")
    for record in (records := single_source_run("LP", steps=(0, 99))):
        record["args"] = {**record["args"], "dataset": "TerraIncognita"}
    assert "we train for 100 steps, the paper for 20,000" in words_on(records, "TerraIncognita")


def test_methods_are_known_by_their_rank():
    records = [
        *single_source_run("BOnly", rank=8),
        *single_source_run("BOnly@lr=0.1", rank=8),
        *single_source_run("AOnly@rank=16", rank=16),
        *single_source_run("BA", 0, rank=4),
        *single_source_run("BA", 1, rank=8),
        *single_source_run("LP"),
    ]
    names = paper_names(Results(records).single_source.comparison("PACS", 1))
    assert names == {"BOnly@rank=8": "BOnly", "AOnly@rank=16": "AOnly@rank=16", "BA": "BA", "LP": "LP"}


def test_the_papers_own_counts():
    table = claims_table(Results(single_source_run("LP")))
    assert {row[2] for row in table.rows} == {"not run"} and "none of these comparisons" in table.caption
    counts = [row[-1].split(" (")[0] for row in table.rows]
    assert counts[:2] == ["12 of 12", "10 of 12"]
    # results/paper/README.md: 11 of 64 gaps are larger than LoRA's.
    assert sum(int(count.split(" ")[0]) for count in counts if count.endswith("16")) == 64 - 11
    assert {row[-2].split(" ")[2] for row in table.rows} == {"3", "4"}  # PACS alone


def test_verdicts():
    results = Results(paper_like(3))
    table = claims_table(results)
    above = row_of(table, PAPER_CLAIMS[0].text, "BOnly@rank=8 against AOnly@rank=8")
    assert above[2:4] == ["supported", "3 of 3"] and float(above[4]) > 0
    low, high = map(float, above[5].split(" to "))
    assert 0 < low < float(above[4]) < high
    assert row_of(table, PAPER_CLAIMS[1].text, "BOnly@rank=8 against BA@rank=8")[2] == "contradicted"
    assert "chance cannot" not in table.caption


def test_methods_are_paired_by_the_trials_that_both_have():
    records = paper_like(4)
    complete = [record for record in records if record["args"]["trial_seed"] < 3]
    one_is_missing = [
        record
        for record in records
        if record["args"]["trial_seed"] < 3 or not record["args"]["algorithm"].startswith("BOnly")
    ]
    rows = [
        row_of(claims_table(Results(each)), PAPER_CLAIMS[0].text, "BOnly@rank=8 against AOnly@rank=8")
        for each in (complete, one_is_missing)
    ]
    assert rows[0][:6] == rows[1][:6]


def test_one_trial_is_said():
    table = claims_table(Results(paper_like(1)))
    row = row_of(table, PAPER_CLAIMS[0].text)
    assert row[2] == "leans for it, one trial only" and row[5] == "-"
    assert "One trial has no interval: chance cannot be told from effect." in table.caption


def test_intervals_by_hand():
    one, other = np.array([[1.0, 5], [3, 5], [5, 5]]), np.array([[0.0, 5], [2, 5], [4, 5]])
    paired = weigh([Block(one, other, True)], strict=True)
    # In pairs every trial differs by 1 in the first environment and 0 in the second.
    assert paired == Evidence(1, 2, 0.5, (0.5, 0.5), 3)
    apart = weigh([Block(one, other, False)], strict=False)
    # Sums over environments vary by 4 for both methods; 4.303 is the quantile of two degrees of freedom.
    half = 4.303 * ((4 + 4) / 3) ** 0.5 / 2
    assert apart.holds == 2 and apart.interval == pytest.approx((0.5 - half, 0.5 + half), abs=1e-3)
    # Of one block in pairs, the interval is that of `compare` without images.
    varied = one + np.array([[0.0, 3], [1, 0], [2, 5]])
    of_compare = difference_over_trials(list((varied - other).mean(1) / 100))
    assert weigh([Block(varied, other, True)], strict=True).interval == pytest.approx(of_compare.interval)
    # Over blocks, each environment counts once.
    both = weigh([Block(one, other, True), Block(one[:, :1], other[:, :1] + 1, True)], strict=True)
    assert (both.of, both.difference) == (3, pytest.approx(1 / 3))


def test_verdict_of_a_tie():
    tie = Evidence(0, 1, 0.0, (0.0, 0.0), 3)
    assert tie.verdict(strict=False) == "supported" and tie.verdict(strict=True) == "undecided"
    assert Evidence(0, 1, -2.0, (-3.0, -1.0), 3).verdict(strict=True) == "contradicted"


def test_the_command(tmp_path, capsys):
    methods = {name: METHODS[name] for name in ("BA@rank=8", "BOnly@rank=8")}
    write_runs(tmp_path, paper_like(1, methods=methods))
    main(["--input_dir", str(tmp_path), "--paper"])
    printed_text = capsys.readouterr().out
    assert (
        "PACS, accuracy beside Zhu et al. (2024)" in printed_text and "leans against it, one trial only" in printed_text
    )
    assert {"paper.csv", "index.html"} <= {path.name for path in (tmp_path / "tables").iterdir()}


def test_the_command_without_single_source_runs(tmp_path):
    records = single_source_run("LP")
    for record in records:
        record["args"] = {**record["args"], "protocol": "leave_one_out", "test_envs": [0]}
    write_runs(tmp_path, records)
    with pytest.raises(BenchmarkError, match="there are none: sweep with --protocol single_source"):
        collect(tmp_path, console=Console(file=io.StringIO()), paper=True)


@pytest.mark.parametrize(("name", "jobs", "steps"), [("paper_table7_11", 63, 5001), ("paper_table12", 21, 20_000)])
def test_sweep_definitions(name, jobs, steps):
    from domainbed_ext.sweep import jobs as sweep_jobs
    from domainbed_ext.sweep.arguments import parse

    found = sweep_jobs.make_jobs(parse(["launch", "--sweep", name, "--data_dir", "nowhere"]))
    assert len(found) == jobs
    assert {job.train_args["steps"] for job in found} == {steps}
    assert {tuple(job.train_args["test_envs"]) for job in found} == {(0, 2, 3)}
    assert {job.train_args["algorithm"] for job in found} == set(METHODS)
