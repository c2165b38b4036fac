import pytest

from domainbed_ext.report.results import Results
from domainbed_ext.report.single_source import accuracy_table, gap_table
from tests.domainbed_ext.fabricated_records import paper_like, single_source_run


def pacs(records):
    return Results(records).single_source.comparison("PACS", 1)


def two_trials():
    return [
        *single_source_run("BA", 0, accuracies=(0.6, 0.8, 0.7, 0.5), train=0.9, parameters=2000),
        *single_source_run("BA", 1, accuracies=(0.62, 0.84, 0.7, 0.54), train=0.9, parameters=2000),
        *single_source_run("LP", 0, accuracies=(0.7, 0.6, 0.6, 0.5), train=0.7),
    ]


def test_accuracy_by_hand():
    table = accuracy_table(pacs(two_trials()))
    assert table.columns == ["Algorithm", "Trainable", "A (OOD)", "C (ID)", "P (OOD)", "S (OOD)", "OOD mean"]
    # 60 and 62: mean 61, sample standard deviation 1.4. Means out of domain: 60 and 62.
    assert table.rows[0] == [
        "BA (LoRA)",
        "2,000 (0.00233%)",
        "61.0±1.4",
        "82.0±2.8",
        "70.0±0.0",
        "52.0±2.8",
        "61.0±1.4",
    ]
    assert table.rows[1] == [
        "LP (linear probe; 1 of 2 trials)",
        "1,000 (0.00116%)",
        "70.0",
        "60.0",
        "60.0",
        "50.0",
        "60.0",
    ]
    assert table.best == set()  # the mean of fewer trials is not to be compared
    assert "Trained on C alone." in table.caption and "held-out 20 %" in table.caption
    assert table.caption.endswith("Incomplete: LP (1 of 2 trials).")
    assert table.origins[0, 3] == [("PACS-BA-1-0", 299), ("PACS-BA-1-1", 299)]


def test_a_caption_says_what_was_held_out():
    records = two_trials()
    for record in records[:1]:
        record["args"]["split_by"] = "images"
    assert "held-out 20 %;" in accuracy_table(pacs(records)).caption
    records[-1]["args"]["split_by"] = "concepts"
    assert "held-out 20 % (of some runs split by concepts);" in accuracy_table(pacs(records)).caption
    for record in records:
        record["args"]["split_by"] = "concepts"
    assert "held-out 20 % (split by concepts);" in accuracy_table(pacs(records)).caption


def test_gap_by_hand():
    table = gap_table(pacs(two_trials()))
    assert table.columns[:7] == ["Algorithm", "Train", "A (OOD)", "C (ID)", "P (OOD)", "S (OOD)", "OOD mean"]
    # 90 - 60 and 90 - 62.
    assert table.rows[0][:7] == ["BA (LoRA)", "90.0±0.0", "29.0±1.4", "8.0±2.8", "20.0±0.0", "38.0±2.8", "29.0±1.4"]
    assert table.best == set()


def test_best_and_one_trial():
    table = accuracy_table(pacs(paper_like(1)))
    assert [row[0] for row in table.rows] == [
        "BA@rank=8 (LoRA)",
        "BOnly@rank=8 (LoRA-FA)",
        "BOnly@rank=16 (LoRA-FA)",
        "AOnly@rank=8 (LoRA-FB)",
        "AOnly@rank=16 (LoRA-FB)",
        "LP (linear probe)",
        "FullFT (full fine-tuning)",
    ]
    assert (6, 3) in table.best and all(column > 1 for _, column in table.best | table.second)
    assert "±" not in table.rows[0][2] and "One trial only" in table.caption


def test_single_source_alone_and_beside_leave_one_out():
    records = paper_like(1)
    assert [table.title for table in Results(records).tables()] == [
        "PACS, single source C: accuracy",
        "PACS, single source C: generalisation gap",
        "PACS, single source C, bounds on the gap",
    ]
    left_out = single_source_run("LP", dataset="VLCS")
    for record in left_out:
        record["args"] = {**record["args"], "protocol": "leave_one_out", "test_envs": [0]}
        record["run"] = "left-out"
    titles = [table.title for table in Results(records + left_out).tables()]
    assert titles[0] == "VLCS, model selection: training-domain validation set"
    assert "VLCS, bounds on the gap" in titles and titles[-2:] == [
        "PACS, single source C: generalisation gap",
        "PACS, single source C, bounds on the gap",
    ]


def test_without_split_sizes_there_are_no_bounds():
    records = paper_like(1)
    for record in records:
        del record["split_sizes"]
    assert [table.columns[-1] for table in Results(records).tables()] == ["OOD mean"] * 2


@pytest.mark.parametrize("sources", [(0,), (1, 2)])
def test_a_table_for_each_source(sources):
    records = [record for source in sources for record in single_source_run("LP", source=source)]
    assert len(Results(records).tables()) == 3 * len(sources)
