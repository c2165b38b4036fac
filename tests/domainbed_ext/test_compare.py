"""The command that compares methods pair by pair."""

import json

import pandas as pd
import pytest
import torch

from domainbed_ext import collect_results, compare
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.report.tables.differences import HEADS
from domainbed_ext.runs.folder import PREDICTIONS_SELECTED, RunFolder
from domainbed_ext.runs.predictions import Part, Predictions, save_predictions
from tests.domainbed_ext.fabricated_records import left_out, left_out_run, paper_like, write_runs
from tests.domainbed_ext.images_of_runs import ENVIRONMENTS, IMAGES, runs_with_images

FILES = {f"differences{end}" for end in (".csv", ".md", ".tex", "_tables.tex", ".json")}


def write_predictions(folder, images, selection="best"):
    """Writes predictions of two classes: of an image that is classified correctly the logit of its label is higher."""
    for (run, step), of_run in images.items():
        parts = {}
        for env in range(ENVIRONMENTS):
            known = {}
            for split in ("in", "out"):
                names, is_right = of_run[f"env{env}_{split}_acc"]
                known |= {name: (right, split) for name, right in zip(names, is_right, strict=True)}
            names = [f"{number}.png" for number in range(IMAGES)]
            right = torch.tensor([bool(known[name][0]) for name in names])
            labels = torch.arange(IMAGES) % 2
            logits = torch.nn.functional.one_hot(torch.where(right, labels, 1 - labels), 2).float()
            parts[str(env)] = Part(
                tuple(names), logits, labels, torch.tensor([known[name][1] == "out" for name in names])
            )
        save_predictions(RunFolder(folder / run), Predictions(step, selection, parts, ("a", "b")))


def run(folder, *words):
    return compare.main(["--input_dir", str(folder), *words])


def rows_of(folder, name="differences", **chosen):
    frame = pd.read_csv(folder / "tables" / f"{name}.csv")
    frame = frame.astype(object).where(frame.notna(), "")
    for column, value in chosen.items():
        frame = frame[frame[column] == value]
    return frame.to_dict("records")


def test_all_are_compared_with_the_best(tmp_path, capsys):
    write_runs(tmp_path, left_out(["BA", "BOnly", "LP"], trials=3))
    assert run(tmp_path) == 0
    text = capsys.readouterr().out
    assert "PACS, difference to " in text and all(head in text for head in HEADS)
    assert {path.name for path in (tmp_path / "tables").iterdir()} == FILES
    (row, *others) = rows_of(tmp_path, metric="out_of_domain")
    (best,) = {row["reference"], *(other["reference"] for other in others)}
    assert {row["algorithm"], *(other["algorithm"] for other in others), best} == {"BA", "BOnly", "LP"}
    assert not row["over_images"] and row["trials"] == 3 and row["low"] < row["mean"] < row["high"]
    assert r"\begin{table}" in (tmp_path / "tables" / "differences.tex").read_text(encoding="utf-8")
    markdown = (tmp_path / "tables" / "differences.md").read_text(encoding="utf-8")
    assert markdown.startswith("# Paired differences\n") and "| Out-of-domain |" in markdown


def test_pairs_of_single_source_runs(tmp_path, capsys):
    write_runs(tmp_path / "runs", paper_like(3))
    out = tmp_path / "out"
    assert run(tmp_path / "runs", "--pairs", "LP:FullFT", "lora@r=8:LP", "--output_dir", str(out)) == 0
    assert "PACS, from C alone, paired differences" in capsys.readouterr().out
    document = json.loads((out / "pairs.json").read_text(encoding="utf-8"))
    of_json = document["differences"]
    assert document["seed"] == 0 and len(of_json) == 8
    assert [(row["algorithm"], row["reference"]) for row in of_json[:2]] == [("LP", "FullFT"), ("BA@rank=8", "LP")]
    assert [cell["environment"] for cell in of_json[0]["by_trial_and_environment"]] == ["A", "P", "S"] * 3
    assert {row["source"] for row in of_json} == {"C"}


@pytest.fixture
def sweep(tmp_path):
    """A sweep whose runs keep predictions."""
    records, images = runs_with_images({"BA": 0.6, "BOnly": 0.7}, 3)
    write_runs(tmp_path, records)
    write_predictions(tmp_path, images)
    return tmp_path


def test_intervals_are_over_images_where_runs_keep_predictions(sweep, capsys):
    intervals = {}
    for words in ("--images required", "", "--seed 1", "--images none", "--resamples 100"):
        assert run(sweep, "--pairs", "BOnly:BA", *words.split()) == 0
        (row,) = rows_of(sweep, "pairs", metric="out_of_domain")
        assert row["over_images"] == ("none" not in words)
        intervals[words] = (row["low"], row["high"])
    assert intervals[""] == intervals["--images required"]
    assert len(set(intervals.values())) == 4
    low, high = intervals["--images none"]
    assert intervals[""][0] < low < high < intervals[""][1]
    shown = capsys.readouterr().out
    assert "hierarchical bootstrap over trials and images (2,000 draws of images, seed 0)" in shown
    assert "(100 draws of images, seed 0)" in shown


def test_tables_and_page_have_the_same_intervals(sweep):
    run(sweep, "--pairs", "BA:BOnly")
    alone = rows_of(sweep, "pairs")
    collect_results.main(["--input_dir", str(sweep), "--reference", "LoRA-FA"])
    assert rows_of(sweep) == rows_of(sweep, "pairs") == alone  # collecting leaves the table of pairs alone
    low, high = (f"{alone[0][end]:+.1f}".replace("-", "−") for end in ("low", "high"))
    page = (sweep / "tables" / "index.html").read_text(encoding="utf-8")
    assert page.count(f"({low} to {high})") == 2  # in the table to the reference, and in that of all pairs
    collect_results.main(["--input_dir", str(sweep), "--images", "none"])
    assert rows_of(sweep) != alone


def test_predictions_of_another_step_are_not_used(sweep, capsys):
    for path in sweep.glob("BA-*"):
        lines = (path / "results.jsonl").read_text()
        (path / "results.jsonl").write_text(lines.replace('"step": 5', '"step": 4'))
    assert run(sweep) == 0 and not rows_of(sweep)[0]["over_images"]
    with pytest.raises(BenchmarkError, match="selected and its last step, but the tables select step 4"):
        run(sweep, "--images", "required")


def test_runs_without_predictions(sweep, capsys):
    (sweep / "BA-1-2" / PREDICTIONS_SELECTED).unlink()
    assert run(sweep) == 0
    text = capsys.readouterr().out
    assert "Intervals: over trials alone (Student's t), without predictions of the images, which " in text
    assert "domainbed_ext.evaluate --input_dir DIR --predictions adds." in text
    with pytest.raises(BenchmarkError, match=r"BA-1-2 keeps no predictions: add them with .*evaluate --run .*BA-1-2"):
        run(sweep, "--images", "required")


def test_predictions_that_cannot_be_read_are_a_warning(sweep, capsys):
    (sweep / "BA-1-2" / PREDICTIONS_SELECTED).write_bytes(b"nothing")
    assert run(sweep) == 0
    assert "cannot be read" in (error := capsys.readouterr().err) and "over trials alone" in error
    with pytest.raises(BenchmarkError, match="cannot be read"):
        run(sweep, "--images", "required")


def test_what_cannot_be_compared(tmp_path, capsys):
    write_runs(tmp_path / "one", left_out(["BA"]))
    with pytest.raises(BenchmarkError, match="there is nothing to compare BA with: two rows are needed"):
        run(tmp_path / "one")
    write_runs(tmp_path / "two", [*left_out_run("BA", 0, 0, 0.5), *left_out_run("LP", 1, 0, 0.5)])
    with pytest.raises(BenchmarkError) as error:
        run(tmp_path / "two", "--pairs", "BA:LP")
    assert str(error.value) == (
        "--pairs BA:LP: the rows have no trial on the same test domains in common (BA: trial 0 on PACS A; LP: trial 1 "
        "on PACS A)"
    )
    with pytest.raises(BenchmarkError, match="no two rows have a trial on the same test domains in common"):
        run(tmp_path / "two")
    write_runs(tmp_path / "three", [*left_out_run("BA", 0, 0, 0.5), *left_out_run("LP", 0, 0, 0.6)])
    assert run(tmp_path / "three") == 0
    assert "One trial, so no interval." in capsys.readouterr().out
    assert rows_of(tmp_path / "three")[0]["low"] == ""
    with pytest.raises(BenchmarkError, match="unknown selection method"):
        run(tmp_path / "three", "--selection", "oracel")


def test_a_run_that_cannot_be_read_is_left_out(tmp_path, capsys):
    write_runs(tmp_path, left_out(["BA", "LP"], trials=3))
    (tmp_path / "LP-0-0" / "results.jsonl").write_text("{")
    assert run(tmp_path) == 1
    assert "warning: left out: " in capsys.readouterr().err
    assert rows_of(tmp_path)[0]["trials"] == 3 and len(rows_of(tmp_path)) == 4
