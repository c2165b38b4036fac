"""The tables in results/ follow from the packed runs that are published beside them."""

import csv
import io
from pathlib import Path

import pytest

from domainbed_ext import compare, pack
from domainbed_ext.report.results import Results
from domainbed_ext.runs.folder import load_records

PACKED = sorted((Path(__file__).parents[1] / "results").glob("*/packed"))


@pytest.fixture(scope="module", params=PACKED, ids=lambda path: path.parent.name)
def published(request, tmp_path_factory):
    """A folder in results/, and one of its unpacked runs."""
    runs = tmp_path_factory.mktemp("published") / "runs"
    assert pack.unpack(request.param, runs).n_new > 0
    return request.param.parent, runs


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def numbers_are_close(row, other):
    """Whether two rows have the same text, and numbers that differ in their last digits alone."""
    assert row.keys() == other.keys()
    for name, value in row.items():
        try:
            assert float(value) == pytest.approx(float(other[name]), rel=1e-6, abs=1e-9, nan_ok=True), name
        except ValueError:
            assert value == other[name], name
    return True


def test_accuracies_are_those_of_the_runs(published):
    folder, runs = published
    written = read(folder / "results.csv")
    again = list(csv.DictReader(io.StringIO(Results(load_records(runs)).tidy().to_csv(index=False))))
    assert len(again) == len(written) and all(map(numbers_are_close, again, written))


@pytest.mark.slow
def test_differences_are_those_of_the_runs(published):
    folder, runs = published
    rows = read(folder / "pairs.csv")
    pairs = dict.fromkeys(f"{row['algorithm']}:{row['reference']}" for row in rows)
    assert compare.main(["--input_dir", str(runs), "--pairs", *pairs, "--images", "required"]) == 0
    again = read(runs / "tables" / "pairs.csv")
    assert len(again) == len(rows) and all(map(numbers_are_close, again, rows))
