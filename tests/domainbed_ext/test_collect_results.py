import csv
import io
import json
import random
import subprocess
import sys

import pandas as pd
import pytest
from rich.console import Console

from domainbed_ext import register_algorithm
from domainbed_ext.collect_results import collect, main
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.model_selection import LEAVE_ONE_DOMAIN_OUT, ORACLE, TRAINING_DOMAIN
from domainbed_ext.report.leave_one_out import averages_table, domain_table, generalisation_table
from domainbed_ext.report.methods import algorithm_order, label_of, row_label_of
from domainbed_ext.report.plots.panels import make_panels
from domainbed_ext.report.results import Results
from domainbed_ext.report.tables.latex import render_document

ENVIRONMENTS = ["plain", "rotated", "sketch_ed"]


def run_records(algorithm, test_env, trial_seed, out_of_domain, in_domain=0.8, train=0.9, extra=None, **args):
    """A run on three environments: a poor step 0, then step 10 with the accuracies given."""
    args = {
        "dataset": "Toy",
        "algorithm": algorithm,
        "test_envs": [test_env],
        "trial_seed": trial_seed,
        "hparams_seed": 0,
        **args,
    }
    records = []
    for step, scale in ((0, 0.5), (10, 1)):
        record = {"args": args, "hparams": {"lr": 0.001}, "step": step}
        for env in range(3):
            record[f"env{env}_in_acc"] = scale * (out_of_domain if env == test_env else train)
            record[f"env{env}_out_acc"] = scale * (out_of_domain if env == test_env else in_domain)
        records.append({**record, "environments": ENVIRONMENTS, **(extra or {})})
    return records


def two_algorithms():
    """Runs by folder: BOnly whole, LP without its second trial's last environment."""
    runs = {}
    for trial, figures in enumerate([(0.50, 0.60, 0.70), (0.54, 0.60, 0.76)]):
        for env, figure in enumerate(figures):
            size = {"trainable_parameters": 1500, "total_parameters": 100_000}
            runs[f"b{trial}{env}"] = run_records("BOnly", env, trial, figure, extra=size)
            if (trial, env) != (1, 2):
                runs[f"l{trial}{env}"] = run_records("LP", env, trial, figure - 0.1, 0.7, 0.7)
    return runs


def named(runs):
    return [{**record, "run": run} for run, records in runs.items() for record in records]


def toy(runs, method=TRAINING_DOMAIN):
    """The algorithms on their one data set under a selection method."""
    return Results(named(runs)).leave_one_out.comparison(method, "Toy")


def write(folder, runs, done=True):
    for run, records in runs.items():
        (folder / run).mkdir(parents=True)
        lines = [json.dumps(record, sort_keys=True) + "\n" for record in records]
        (folder / run / "results.jsonl").write_text("".join(lines))
        if done:
            (folder / run / "done").write_text("done")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "sweep", two_algorithms())


def test_domain_table_by_hand():
    table = domain_table(toy(two_algorithms()))
    assert table.columns == ["Algorithm", *ENVIRONMENTS, "Avg"]
    # 50 and 54: mean 52, standard deviation 2, error 2 / sqrt(2) = 1.4. Average (52 + 60 + 73) / 3 = 61.7.
    assert table.rows[0] == ["BOnly (LoRA-FA)", "52.0 +/- 1.4", "60.0 +/- 0.0", "73.0 +/- 2.1", "61.7"]
    # 60 alone in the last column; average (42 + 50 + 60) / 3.
    assert table.rows[1] == ["LP (linear probe)", "42.0 +/- 1.4", "50.0 +/- 0.0", "60.0", "50.7"]
    assert table.best == {(0, 1), (0, 2), (0, 3), (0, 4)}
    assert "Incomplete: LP (5 of 6 results)." in table.caption


def test_averages_table_by_hand():
    table = averages_table([toy(two_algorithms())])
    # Trials: (50 + 60 + 70) / 3 = 60 and (54 + 60 + 76) / 3 = 63.33; LP: 50 and (44 + 50) / 2 = 47.
    assert table.rows == [["BOnly (LoRA-FA)", "61.7 +/- 1.2", "61.7"], ["LP (linear probe)", "48.5 +/- 1.1", "48.5"]]
    assert table.best == set()  # a mean over fewer environments is not to be compared


def test_generalisation_table_by_hand():
    table = generalisation_table(toy(two_algorithms()))
    # Gap to the target: 90 - 60 and 90 - 63.33.
    assert table.rows[0] == [
        "BOnly (LoRA-FA)",
        "1,500 (1.5%)",
        "80.0±0.0",
        "61.7±1.2",
        "90.0±0.0",
        "10.0±0.0",
        "28.3±1.2",
    ]
    assert table.rows[1][:4] == ["LP (linear probe; 5 of 6 results)", "-", "70.0±0.0", "48.5±1.1"]


def test_a_missing_environment_is_said():
    runs = {run: records for run, records in two_algorithms().items() if run not in ("l02", "l12")}
    assert domain_table(toy(runs, ORACLE)).rows[1][3:] == ["X", "X"]
    assert generalisation_table(toy(runs, ORACLE)).rows[1][0] == "LP (linear probe; 2 of 3 environments)"


def test_one_trial_has_no_error():
    table = generalisation_table(toy({"a": run_records("BA", 0, 0, 0.5)}))
    assert table.rows == [["BA (LoRA; 1 of 3 environments)", "-", "80.0", "50.0", "90.0", "10.0", "40.0"]]
    assert "One trial only" in table.caption


def test_train_accuracy_of_a_share_is_said():
    whole, part = run_records("BA", 0, 0, 0.5), run_records("LP", 0, 0, 0.5, train_eval_share=0.1)
    caption = generalisation_table(toy({"a": whole, "b": part}, ORACLE)).caption
    assert "Train: on the images trained on (estimated from 10 or 100 % of them)." in caption
    assert "estimated" not in generalisation_table(toy({"a": whole}, ORACLE)).caption


def test_variants_are_rows_in_order():
    names = ["ZNet", "LP", "BOnly@rank=16", "ERM", "BOnly@rank=8", "FullFT", "BOnly", "AOnly", "BA"]
    assert sorted(names, key=algorithm_order) == [
        "BA",
        "BOnly",
        "BOnly@rank=8",
        "BOnly@rank=16",
        "AOnly",
        "LP",
        "FullFT",
        "ERM",
        "ZNet",
    ]
    runs = {name: run_records(name, 0, 0, 0.5) for name in names}
    rows = domain_table(toy(runs)).rows
    assert [row[0] for row in rows] == list(map(row_label_of, sorted(names, key=algorithm_order)))


def test_variants_are_in_order_of_their_numbers():
    names = [
        f"BOnly@rank={rank},lr={lr}" for rank in (8, 16) for lr in ("1e-05", "0.0003", "0.001", "0.01", "0.1", "1")
    ]
    mixed = names[::-1]
    assert sorted(mixed, key=algorithm_order) == names
    assert sorted(["LP@lr=0.01", "LP@lr=0.010"], key=algorithm_order) == ["LP@lr=0.01", "LP@lr=0.010"]  # never a tie
    assert sorted(["LP@lr=0.010", "LP@lr=0.01"], key=algorithm_order) == ["LP@lr=0.01", "LP@lr=0.010"]


def test_labels():
    assert [
        label_of(name) for name in ("BOnly", "BA@rank=16", 'AOnly@rank=4,targets="q,v"', "LP@adapter_dropout=0.1")
    ] == [
        "LoRA-FA",
        "LoRA, rank 16",
        "LoRA-FB, rank 4, q,v",
        "linear probe, adapter dropout 0.1",
    ]
    assert row_label_of("BOnly@rank=16") == "BOnly@rank=16 (LoRA-FA)"
    assert row_label_of("FullFT", "2 of 3 trials") == "FullFT (full fine-tuning; 2 of 3 trials)"
    # Upstream's other methods declare nothing here.
    assert (label_of("CORAL"), row_label_of("CORAL"), row_label_of("CORAL", "1 of 2 trials")) == (
        "CORAL",
        "CORAL",
        "CORAL (1 of 2 trials)",
    )


@pytest.mark.usefixtures("registries")
def test_a_method_of_the_users_own_is_shown_as_it_declares_itself(tmp_path):
    @register_algorithm("Mine", label="my method", order=0, colour="#123456")
    class Mine:
        """A method of a user."""

    runs = {f"{name}{env}": run_records(name, env, 0, 0.5) for name in ("BA", "LP", "Mine@rank=2") for env in range(3)}
    assert [row[0] for row in domain_table(toy(runs)).rows] == [
        "BA (LoRA)",
        "Mine@rank=2 (my method)",
        "LP (linear probe)",
    ]
    (panel,) = make_panels(Results(named(runs)))
    assert [(point.label, point.style.colour) for point in panel.points][1] == ("my method, rank 2", "#123456")
    collect(write(tmp_path, runs), console=Console(quiet=True))
    page = (tmp_path / "tables" / "index.html").read_text(encoding="utf-8")
    assert '<i style="background:#123456"></i>my method, rank 2<td>' in page


def test_parameters_may_differ_between_trials():
    runs = {
        str(trial): run_records("BOnly", 0, trial, 0.5, extra={"trainable_parameters": size, "total_parameters": 1000})
        for trial, size in enumerate([100, 25, 50])
    }
    assert generalisation_table(toy(runs)).rows[0][1] == "25 to 100 (2.5 to 10%)"


def test_records_of_upstream_have_their_environments_named():
    runs = {"a": run_records("ERM", 0, 0, 0.5, dataset="VLCS"), "b": run_records("ERM", 0, 0, 0.5)}
    for record in (records := named(runs)):
        del record["environments"]
        if record["args"]["dataset"] == "VLCS":
            record |= {"env3_in_acc": 0.1, "env3_out_acc": 0.1}
    assert Results(records).leave_one_out.environments == {
        "VLCS": ["C", "L", "S", "V"],
        "Toy": ["env0", "env1", "env2"],
    }


def test_environments_that_disagree_are_refused():
    runs = {"a": run_records("BA", 0, 0, 0.5), "b": run_records("BA", 1, 0, 0.5, extra={"environments": ["x"]})}
    with pytest.raises(BenchmarkError, match="a and b disagree on the environments of Toy"):
        Results(named(runs))


def test_leave_one_domain_out_only_where_it_can_be():
    runs = two_algorithms()
    assert Results(named(runs)).leave_one_out.methods == [TRAINING_DOMAIN, ORACLE]
    runs["pair"] = run_records("BOnly", 0, 0, 0.5, test_envs=[0, 1])
    results = Results(named(runs))
    assert results.leave_one_out.methods == [TRAINING_DOMAIN, LEAVE_ONE_DOMAIN_OUT, ORACLE]
    assert domain_table(toy(runs, LEAVE_ONE_DOMAIN_OUT)).rows[0][1:] == ["X"] * 4
    # The report has words for it instead.
    found = [table for table in results.tables() if "leave-one-domain-out" in table.title]
    assert len(found) == 2 and not any(table.rows for table in found)
    for table in found:
        assert table.caption.startswith("No figure can be given yet.") and "missing on Toy: BOnly" in table.caption
        assert "Launch the sweep with --pairs." in table.caption


def test_runs_that_nothing_tells_apart_are_said():
    runs = {"a": run_records("BA", 0, 0, 0.5), "b": run_records("BA", 0, 0, 0.6)}
    assert "runs a, b have the same" in Results(named(runs)).duplicates()
    assert not Results(named(two_algorithms())).duplicates()


def test_the_order_of_records_changes_nothing():
    records = named(two_algorithms())
    shuffled = random.Random(0).sample(records, len(records))
    assert Results(records).tables() == Results(shuffled).tables()
    pd.testing.assert_frame_equal(Results(records).tidy(), Results(shuffled).tidy())


def test_files(folder):
    text = io.StringIO()
    paths = collect(folder, console=Console(file=text, width=500))
    assert [path.name for path in paths] == [
        "results.txt",
        "results.md",
        "results.tex",
        "results_tables.tex",
        "results.csv",
        "selected.csv",
        "index.html",
        *(f"{name}.{kind}" for name in ("plot", "gaps", "parameters", "training") for kind in ("png", "svg")),
        "differences.csv",
        "differences.md",
        "differences.tex",
        "differences_tables.tex",
        "differences.json",
    ]
    assert set(paths) == set((folder / "tables").iterdir())  # no partial file is left
    before = {path: path.read_bytes() for path in paths}
    assert text.getvalue().startswith(before[paths[0]].decode().split("\n")[0])
    assert text.getvalue().rstrip().endswith(str(paths[-1]))
    assert "| BOnly (LoRA-FA) | **52.0 +/- 1.4** |" in before[paths[1]].decode()
    # Again, with the tables' own folder among the runs: the same bytes.
    assert collect(folder, console=Console(quiet=True)) == paths
    assert {path: path.read_bytes() for path in paths} == before


def test_csv_holds_every_figure_and_where_it_is_from(folder, tmp_path):
    collect(folder, tmp_path / "out", ["oracle"], console=Console(quiet=True))
    frame = pd.read_csv(tmp_path / "out" / "results.csv").set_index(["algorithm", "metric", "environment"])
    assert set(frame["selection"]) == {"oracle"}
    assert frame.loc[("BOnly", "out_of_domain", "plain"), "mean"] == pytest.approx(52)
    assert frame.loc[("BOnly", "gap_target", "Avg"), "err"] == pytest.approx(5 / 3 / 2**0.5)
    assert not frame.loc[("LP", "in_domain", "Avg"), "complete"]
    assert frame.loc[("BOnly", "trainable_parameters", "Avg"), "mean"] == 1500
    with (tmp_path / "out" / "selected.csv").open() as file:
        first = next(csv.DictReader(file))
    assert (first["run"], first["step"], first["hparams"]) == ("b00", "10", '{"lr": 0.001}')
    names = ["label", "adaptation", "objective"]
    assert list(first)[-3:] == names == list(frame.columns[-3:])
    assert [first[name] for name in names] == ["LoRA-FA", "LoRA-FA", "ERM"]
    assert list(frame.loc[("LP", "train", "Avg"), names]) == ["linear probe", "linear probe", "ERM"]


def test_latex_is_escaped():
    runs = {"a": run_records("BOnly@drop_path=0.1", 0, 0, 0.5), "b": run_records("LP", 0, 0, 0.4)}
    text = render_document(Results(named(runs)).tables())
    assert r"\method{LoRA-FA}{drop path 0.1} & \textbf{50.0} & X & X & X \\" in text
    assert r"sketch\_ed" in text and r"\%" in text
    assert text.count(r"\begin{table}") == text.count(r"\end{tabular}}") == 5


def test_unfinished_runs_count_only_when_asked(tmp_path):
    write(tmp_path, {"a": run_records("BA", 0, 0, 0.5)}, done=False)
    with pytest.raises(BenchmarkError):
        collect(tmp_path, console=Console(quiet=True))
    assert collect(tmp_path, unfinished=True, console=Console(quiet=True))


@pytest.mark.parametrize("protocol", ["leave_one_out", "single_source"])
def test_an_unfinished_lean_run_has_no_test_accuracy_yet(tmp_path, protocol):
    under_way = run_records("BA", 0, 0, 0.5, evaluate="lean", protocol=protocol)
    if protocol == "single_source":
        under_way = [record | {"args": {**record["args"], "test_envs": [0, 2]}} for record in under_way]
    for record in under_way:
        record["split_sizes"] = {f"env{env}_{split}": 5 for env in range(3) for split in ("in", "out")}
        validation = {f"env{env}_out_acc" for env in range(3) if env not in record["args"]["test_envs"]}
        for name in [name for name in record if name.endswith("_acc") and name not in validation]:
            del record[name]
    write(tmp_path, {"a": under_way}, done=False)
    text = io.StringIO()
    assert collect(tmp_path, unfinished=True, console=Console(file=text, width=500))
    assert "1 runs, 2 records" in text.getvalue() and "50.0" not in text.getvalue()


def test_nothing_but_pair_runs(tmp_path):
    write(tmp_path, {"a": run_records("BA", 0, 0, 0.5, test_envs=[0, 1])})
    text = io.StringIO()
    assert collect(tmp_path, console=Console(file=text, width=500))
    assert "No figure can be given yet." in text.getvalue()


def test_bad_input(folder, tmp_path):
    with pytest.raises(BenchmarkError, match="did you mean 'oracle'"):
        collect(folder, selections=["oracel"])
    with pytest.raises(BenchmarkError):
        collect(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchmarkError, match="cannot write"):
        collect(folder, tmp_path / "file", console=Console(quiet=True))


def test_latex_to_standard_output(folder, capsys):
    main(["--input_dir", str(folder), "--latex"])
    out, err = capsys.readouterr()
    assert out == (folder / "tables" / "results.tex").read_text()
    assert "results.tex" in err


def test_piped_output_is_neither_wrapped_nor_cut(folder, tmp_path):
    long = "BOnly@" + "very_long_hyperparameter=1," * 6
    write(folder, {"long": run_records(long, 0, 0, 0.5)})
    command = [sys.executable, "-m", "domainbed_ext.collect_results", "--input_dir", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert any(row_label_of(long) in line and "50.0" in line for line in done.stdout.splitlines())
    assert "\x1b" not in done.stdout and "…" not in done.stdout
    failed = subprocess.run([*command[:-1], tmp_path / "nowhere"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1


def test_two_environments_have_no_pairs_to_miss():
    runs = {f"r{env}": run_records("LP", env, 0, 0.5) for env in range(2)}
    for record in (record for records in runs.values() for record in records):
        record["environments"] = ENVIRONMENTS[:2]
        del record["env2_in_acc"], record["env2_out_acc"]
    pairs = Results(named(runs), [LEAVE_ONE_DOMAIN_OUT]).leave_one_out.pairs
    assert pairs.missing("Toy", "LP") == []
    assert "takes at least three environments, and Toy has 2" in pairs.sentence("Toy")


def test_a_variable_that_asks_for_colour_leaves_files_and_pipes_plain_and_whole(folder, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    collect(folder)
    printed = capsys.readouterr().out
    text = (folder / "tables" / "results.txt").read_text(encoding="utf-8")
    assert "\x1b" not in printed and "\x1b" not in text
    assert "…" not in printed and text.strip() in printed
