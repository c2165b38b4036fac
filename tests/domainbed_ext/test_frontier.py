"""Selected runs are evaluated along the strength of their update; none is selected by the test domain."""

import json
import shutil

import pandas as pd
import pytest

from domainbed_ext import collect_results, frontier, train
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.model_selection import along_strength, select_strength, validation_accuracy
from domainbed_ext.runs import strengths
from domainbed_ext.runs.arguments import RunArguments
from domainbed_ext.runs.feed import Feed
from domainbed_ext.runs.folder import RunFolder, load_records
from domainbed_ext.runs.saved import find_saved
from tests.domainbed_ext.fabricated_records import left_out_run, single_source_run, write_runs

FIVE = (0.0, 0.25, 0.5, 0.75, 1.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A sweep of four short runs, which tests copy."""
    root = tmp_path_factory.mktemp("sweep") / "runs"
    runs = ("a", "BOnly", 0), ("b", "BOnly", 1), ("c", "LP@head_start=random", 0), ("d", "LP", 0)
    for name, algorithm, trial in runs:
        hparams = '{"lr": 0.02}' if "@" in algorithm else '{"lr": 0.02, "head_start": "probe"}'
        settings = {"steps": 3, "checkpoint_freq": 0, "train_eval_share": 0.02, "hparams": hparams}
        args = RunArguments(
            algorithm=algorithm, trial_seed=trial, seed=trial, test_envs=[3], output_dir=str(root / name), **settings
        )
        assert train.run(args, lambda share: None) == 0
    return root


@pytest.fixture
def sweep(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "runs")


@pytest.fixture
def evaluated(monkeypatch):
    """The names of the splits of each evaluation, as they are evaluated."""
    calls = []
    whole = Feed.accuracies

    def accuracies(feed, step, names, *logits):
        calls.append(list(names))
        return whole(feed, step, calls[-1], *logits)

    monkeypatch.setattr(Feed, "accuracies", accuracies)
    return calls


def run(folder, *words):
    return frontier.main(["--input_dir", str(folder), *words])


def fabricated(folder, curves, algorithm="BOnly", protocol="leave_one_out", trials=1):
    """A sweep of runs with evaluations of given accuracies (in-domain, out-of-domain) by strength, and some weights."""
    records = []
    inside, outside = curves.get(1.0, (0.8, 0.5))
    for trial in range(trials):
        if protocol == "single_source":
            accuracies = [inside if env == 1 else outside for env in range(4)]
            records += single_source_run(algorithm, trial, accuracies=accuracies, steps=(10,))
        else:
            for env in range(4):
                records += left_out_run(algorithm, trial, env, outside, inside, steps=(0, 10))
    write_runs(folder, records)
    for path in folder.iterdir():
        (path / "selected").mkdir(exist_ok=True)
        (path / "selected" / "trained.safetensors").write_text(path.name)
        record, _ = find_saved(RunFolder(path))
        tested = record["args"]["test_envs"]
        for strength, (inside, outside) in curves.items():
            accuracies = {
                f"env{env}_{split}_acc": outside if env in tested else inside if split == "out" else 0.9
                for env in range(4)
                for split in ("in", "out")
            }
            facts = {"strength": strength, "step": record["step"], "weights": find_saved(RunFolder(path)).digest}
            strengths.add(path, facts | accuracies)
    return folder


def test_each_strength_is_a_line_in_the_folder_of_the_run(sweep, evaluated, capsys):
    assert run(sweep, "--algorithms", "LoRA-FA", "--strengths", "1", "0", "0.5") == 0
    for name in ("a", "b"):
        lines = (sweep / name / strengths.FILE).read_text().splitlines()
        there = [json.loads(line) for line in lines]
        assert [each["strength"] for each in there] == [0.0, 0.5, 1.0]
        record, _ = find_saved(RunFolder(sweep / name))
        for each in there:
            assert {f"env{env}_out_acc" for env in range(4)} | {"env3_in_acc"} <= set(each)
            assert {"step", "weights", "precision", "versions", "machine"} <= set(each)
        assert strengths.accuracies(there[2]) == strengths.accuracies(record)
        assert strengths.accuracies(there[0]) != strengths.accuracies(there[2])
        assert [each["strength"] for each in record["strengths"]] == [0.0, 0.5, 1.0]
    assert not (sweep / "c" / strengths.FILE).exists()
    assert "2 of 2: DigitsShift BOnly, tested on sketched, trial 1: strength" in capsys.readouterr().out


def test_what_is_there_is_not_evaluated_again(sweep, evaluated, capsys):
    assert run(sweep, "--strengths", "0.5", "1", "--algorithms", "BOnly") == 0
    evaluated.clear()
    assert run(sweep, "--strengths", "0.5", "1", "--algorithms", "BOnly") == 0
    assert evaluated == []
    before = (sweep / "b" / strengths.FILE).read_text()
    lines = (sweep / "a" / strengths.FILE).read_text().splitlines(keepends=True)
    (sweep / "a" / strengths.FILE).write_text(lines[-1])  # as after an interruption
    assert run(sweep, "--strengths", "0.5", "1", "--algorithms", "BOnly") == 0
    assert evaluated and not any(name.endswith("_in") for name in evaluated[0])
    assert (sweep / "b" / strengths.FILE).read_text() == before
    assert (sweep / "a" / strengths.FILE).read_text().splitlines(keepends=True)[-1] == lines[-1]
    evaluated.clear()
    run(sweep, "--strengths", "0.5", "1", "--train_splits", "--algorithms", "BOnly")
    assert all(name in ("env0_in", "env1_in", "env2_in") for names in evaluated for name in names)


def test_other_weights_are_evaluated_anew(sweep, evaluated):
    assert run(sweep, "--strengths", "1", "--algorithms", "LP@head_start=random") == 0
    shutil.copy(sweep / "c" / "selected" / "trained.safetensors", sweep / "c" / "selected" / "copy.safetensors")
    evaluated.clear()
    assert run(sweep, "--strengths", "0", "1", "--algorithms", "LP@head_start=random") == 0
    assert len(evaluated) >= 4
    (entries,) = strengths.read(sweep / "c").values()
    assert len({each["weights"] for each in entries}) == 1 and len(entries) == 2


def test_a_probe_without_a_start_of_its_own_is_the_same_at_every_strength(sweep):
    """And is evaluated on features, once."""
    assert run(sweep, "--strengths", "0", "0.5", "1", "--algorithms", "LP@head_start=random") == 0
    (entries,) = strengths.read(sweep / "c").values()
    tested = [{name: each[name] for name in each if name.endswith("_out_acc")} for each in entries]
    assert tested[0] == tested[1] == tested[2]


def test_at_strength_0_all_that_start_at_the_probe_are_the_probe(sweep):
    assert run(sweep, "--strengths", "0", "1", "--algorithms", "LP", "BOnly") == 0
    of_probe, of_adapter = (strengths.read(sweep / name)[2] for name in ("d", "a"))
    for name, value in strengths.accuracies(of_probe[0]).items():
        assert of_adapter[0][name] == pytest.approx(value, abs=0.02)  # features and images are in other batches
    assert strengths.accuracies(of_adapter[1]) != strengths.accuracies(of_probe[1])


def test_a_strength_is_selected_by_validation_alone(tmp_path):
    curves = {0.0: (0.6, 0.9), 0.5: (0.8, 0.1), 1.0: (0.7, 0.8)}
    folder = fabricated(tmp_path / "runs", curves)
    assert run(folder, "--strengths", "0", "0.5", "1") == 0
    (derived,) = {
        (record["derived"]["strength"], record[f"env{record['args']['test_envs'][0]}_in_acc"])
        for record in load_records(folder)
        if "derived" in record
    }
    assert derived == (0.5, 0.1)


def test_of_equals_the_largest_strength_is_selected(tmp_path):
    record = left_out_run("BOnly", 0, 1, 0.5)[-1]
    each = {f"env{env}_out_acc": 0.5 for env in range(4)}
    record["strengths"] = [each | {"strength": strength} for strength in (1.0, 0.25, 0.5)]
    along = along_strength(record)
    assert list(along) == [0.25, 0.5, 1.0] and select_strength(along) == 1.0
    along[0.5]["env0_out_acc"], along[1.0]["env0_out_acc"] = 0.6, None  # diverged
    assert select_strength(along) == 0.5
    assert "env0_in_acc" not in along[0.5] and validation_accuracy(along[0.25]) == 0.5


def test_strength_1_has_to_be_as_recorded(sweep, capsys, monkeypatch):
    path = sweep / "a" / "results.jsonl"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"env1_out_acc": record["env1_out_acc"] - 0.001}) + "\n")
    assert run(sweep, "--algorithms", "BOnly", "--strengths", "0", "1") == 1
    said = capsys.readouterr()
    assert "accuracies at strength 1 are not as recorded (e.g. env1_out_acc" in said.err and said.err.startswith(
        "error:"
    )
    assert not (sweep / "a" / strengths.FILE).exists() and (sweep / "b" / strengths.FILE).exists()
    assert "1 of 2" in said.out and "failed" in said.out
    path.write_text(
        json.dumps(record | {"env1_out_acc": record["env1_out_acc"] - 0.001, "machine": {"cpu": "X"}}) + "\n"
    )
    assert run(sweep, "--algorithms", "BOnly", "--strengths", "0", "1") == 0
    assert "which is rounding: it ran elsewhere (cpu X then, " in capsys.readouterr().err
    (sweep / "a" / strengths.FILE).unlink()
    path.write_text(json.dumps(record | {"env1_out_acc": record["env1_out_acc"] - 0.1, "machine": {"cpu": "X"}}) + "\n")
    assert run(sweep, "--algorithms", "BOnly", "--strengths", "0", "1") == 1
    assert "the images or the weights are not the run's" in capsys.readouterr().err


def test_a_dry_run_changes_nothing(sweep, evaluated, capsys):
    before = sorted(sweep.rglob("*"))
    assert run(sweep, "--dry_run") == 0
    assert sorted(sweep.rglob("*")) == before and evaluated == []
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:4] for row in rows if row and row[0].startswith(("BOnly", "LP", "all"))] == [
        ["BOnly", "2", "0", "10"],
        ["LP", "1", "0", "5"],
        ["LP@head_start=random", "1", "0", "5"],
        ["all", "4", "0", "20"],
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--strengths 0.5 1.5", "--strengths: 1.5 is out of range, give a share from 0 to 1"),
        ("--strengths -0.1", "--strengths: -0.1 is out of range"),
        ("--strengths half", "--strengths: 'half' is not a number"),
        ("--strengths nan", "--strengths: nan is not a finite number"),
        ("--strengths 0.5 0 0.50", "--strengths has 0.5 twice: give each strength once"),
        ("--algorithms BA", "unknown algorithm of --algorithms 'BA'"),
        ("--algorithms Nothing", "unknown algorithm 'Nothing'"),
        ("--jobs 0", "--jobs: 0 is too small"),
    ],
)
def test_bad_input_gets_a_sentence(words, sentence, tmp_path):
    folder = fabricated(tmp_path / "runs", {})
    with pytest.raises(BenchmarkError, match=sentence.replace("(", r"\(")):
        run(folder, *words.split())


def test_runs_without_weights_and_unfinished_ones_are_refused(tmp_path):
    folder = fabricated(tmp_path / "runs", {})
    shutil.rmtree(next(iter(sorted(folder.iterdir()))) / "selected")
    with pytest.raises(
        BenchmarkError, match="1 of 4 selected runs cannot be evaluated, e.g. .* saved no model: run it"
    ):
        run(folder)
    for done in folder.glob("*/done"):
        done.unlink()
    with pytest.raises(BenchmarkError, match="none of the 4 runs in .* is finished"):
        run(folder)
    with pytest.raises(BenchmarkError, match="no folder"):
        run(tmp_path / "nowhere")


def test_a_broken_file_is_named_and_its_run_left_out(tmp_path, capsys):
    folder = fabricated(tmp_path / "runs", {0.5: (0.5, 0.5)})
    path = min(folder.iterdir()) / strengths.FILE
    path.write_text("{}\n")
    assert run(folder, "--strengths", "0.5") == 0
    said = capsys.readouterr()
    assert "strengths.jsonl line 1 is not an evaluation at a strength: delete the file and run" in said.err
    assert "3 of 3" in said.out


def test_a_run_that_starts_again_has_no_strengths(tmp_path):
    strengths.add(tmp_path, {"strength": 0.5, "step": 3, "weights": "x"})
    RunFolder(tmp_path).start()
    assert strengths.read(tmp_path) == {}


CURVE = {0.0: (0.6, 0.5), 0.5: (0.8, 0.7), 1.0: (0.75, 0.6)}


@pytest.mark.parametrize("protocol", ["leave_one_out", "single_source"])
def test_tables_plots_and_page_show_the_curve(tmp_path, protocol):
    folder = fabricated(tmp_path / "runs", CURVE, protocol=protocol, trials=3)
    assert run(folder, "--strengths", "0", "0.5", "1") == 0
    paths = {path.name: path for path in collect_results.collect(folder)}
    frame = pd.read_csv(paths["frontier.csv"])
    outside = frame[frame["metric"] == "out_of_domain"].set_index("strength")
    assert outside["mean"].to_dict() == pytest.approx({0.0: 50.0, 0.5: 70.0, 1.0: 60.0})
    assert outside["difference"].to_dict() == pytest.approx({0.0: -10.0, 0.5: 10.0, 1.0: 0.0})
    assert set(outside["trials"]) == {3} and outside["low"].notna().all()
    assert "frontier.svg" in paths
    page = paths["index.html"].read_text(encoding="utf-8")
    assert "Accuracy along the strength of the update" in page and "BOnly strength(selected) (LoRA-FA" in page
    text = paths["results.txt"].read_text(encoding="utf-8")
    rows = [line.split() for line in text.split("selected strength of the update")[1].splitlines()]
    row = next(row for row in rows if row and row[0] == "BOnly")
    assert row[3] == "0.50" and "+5.0" in row and "+10.0" in row and row[-1] == "3"


def test_without_strengths_nothing_is_added(tmp_path):
    folder = write_runs(tmp_path / "runs", left_out_run("BOnly", 0, 1, 0.5))
    paths = {path.name: path for path in collect_results.collect(folder)}
    assert not any("frontier" in name for name in paths)
    page = paths["index.html"].read_text(encoding="utf-8").partition("<main>")[2]
    assert "strength" not in page.replace(str(folder), "")  # whose name has the word


def test_runs_that_are_no_longer_selected_leave_no_row(tmp_path):
    folder = fabricated(tmp_path / "runs", CURVE, trials=2)
    run(folder, "--strengths", "0", "0.5", "1")
    for path in [path for path in folder.iterdir() if path.name.endswith("-1")]:
        shutil.rmtree(path)
    run(folder, "--strengths", "0", "0.5", "1")
    derived = [record for record in load_records(folder) if "derived" in record]
    assert {record["args"]["trial_seed"] for record in derived} == {0} and len(derived) == 4


@pytest.mark.slow
def test_several_processes_write_the_same(tmp_path, warm_workers):
    folder = fabricated(tmp_path / "runs", CURVE)
    plans = frontier.make_plans(folder, [0.0, 0.5, 1.0])
    assert frontier.evaluate_all(plans, jobs=2) == {} and all(plan.is_done for plan in plans)


def test_a_method_whose_strength_cannot_be_set_is_an_error_in_a_sentence(sweep, capsys, monkeypatch):
    from domainbed_ext.algorithms.base import Algorithm

    def refuse(algorithm, strength):
        raise BenchmarkError("its strength cannot be set")

    monkeypatch.setattr(Algorithm, "set_strength", refuse)
    assert run(sweep, "--algorithms", "LP") == 1
    assert capsys.readouterr().err == "error: its strength cannot be set\n"
