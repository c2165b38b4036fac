import csv

import pytest

from domainbed_ext.bench import __main__ as bench
from domainbed_ext.bench import sweeps
from domainbed_ext.errors import BenchmarkError


@pytest.mark.slow
def test_a_sweep_is_measured_against_its_runs_own_work(tmp_path, monkeypatch, capsys):
    words = sweeps._words
    monkeypatch.setattr(sweeps, "_words", lambda *args: [*words(*args), "--algorithms", "LP"])
    monkeypatch.setattr(sweeps, "TICK", 0.2)
    bench.main(["sweep", "--runs", "20", "--steps", "2", "--jobs", "2", "--output_dir", str(tmp_path)])
    (path,) = tmp_path.glob("sweep_local_*.csv")
    with path.open() as file:
        (row,) = csv.DictReader(file)
    assert (row["launcher"], row["runs"], row["attempts"], row["at once"]) == ("local", "4", "4", "2")
    assert float(row["work a run (s)"]) > 0 and float(row["set-up a run (s)"]) > 0
    # The launch's own import of torch alone is more than the work of these runs.
    assert float(row["over the work (%)"]) > float(row["outside the runs (%)"]) > 0
    assert "runs a minute" in capsys.readouterr().out


def test_growth_compares_the_quarters_when_all_is_warm():
    assert sweeps._growth("MiB", [1, 5, 3, 4]) == {"MiB, third quarter": 5, "MiB, last quarter": 4}


def test_an_unknown_word_gets_a_sentence():
    with pytest.raises(BenchmarkError, match="invalid choice: 'nothing'"):
        bench.main(["nothing"])
