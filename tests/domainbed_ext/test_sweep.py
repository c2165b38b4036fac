import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from domainbed_ext import resources, sweep, train
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.records import State
from domainbed_ext.seeds import seed_hash

SMALL = shlex.split(
    "--datasets DigitsShift --n_hparams 1 --n_trials 1 --single_test_envs --steps 2 --checkpoint_freq 0 "
    "--train_eval_share 0.05 --skip_confirmation --skip_model_save"
)


def small(tmp_path, *words, algorithms=("LP",)):
    return ["launch", *SMALL, "--output_dir", str(tmp_path / "sweep"), "--algorithms", *algorithms, *words]


def test_the_job_hash_is_domainbeds(tmp_path):
    """Golden value measured from facebookresearch/DomainBed @ b93c22a."""
    train_args = {
        "algorithm": "ERM", "data_dir": "/checkpoint/dlp/datasets_new", "dataset": "VLCS", "holdout_fraction": 0.2,
        "hparams_seed": 1, "seed": 360234358, "steps": 1001, "task": "domain_generalization", "test_envs": [1, 2],
        "trial_seed": 0,
    }  # fmt: skip
    job = sweep.Job(train_args, tmp_path, {})
    assert job.folder.path == tmp_path / "0657090f9a83ff76efe083a104fde93a"


def test_jobs_come_in_domainbeds_order(tmp_path):
    args = sweep.parse(["launch", "--datasets", "PACS", "--algorithms", "ERM", "BA", "--n_hparams", "2",
                        "--n_trials", "2", "--output_dir", str(tmp_path), "--data_dir", "d"])  # fmt: skip
    jobs = [job.train_args for job in sweep.make_jobs(args)]
    assert len(jobs) == 2 * 2 * 10 * 2
    assert [(j["trial_seed"], j["algorithm"], j["test_envs"], j["hparams_seed"]) for j in jobs[:5]] == [
        (0, "ERM", [0], 0), (0, "ERM", [0], 1), (0, "ERM", [0, 1], 0), (0, "ERM", [0, 1], 1), (0, "ERM", [0, 2], 0),
    ]  # fmt: skip
    assert jobs[20]["algorithm"] == "BA" and jobs[40]["trial_seed"] == 1
    assert set(jobs[0]) == {"dataset", "algorithm", "test_envs", "holdout_fraction", "hparams_seed", "data_dir",
                            "task", "trial_seed", "seed"}  # fmt: skip


def test_pairs_can_be_asked_for_over_the_definition(tmp_path):
    definition = write(tmp_path, "{datasets: [PACS], algorithms: [BA], output_dir: o, single_test_envs: true}")
    words = ["launch", "--sweep", str(definition), "--n_hparams", "1", "--n_trials", "1"]
    assert len(sweep.make_jobs(sweep.parse(words))) == 4
    assert len(sweep.make_jobs(sweep.parse([*words, "--pairs"]))) == 10
    definition.write_text("{datasets: [PACS], algorithms: [BA], output_dir: o, pairs: true}")
    assert len(sweep.make_jobs(sweep.parse(words))) == 10
    assert len(sweep.make_jobs(sweep.parse([*words, "--single_test_envs"]))) == 4


def held_out(tmp_path, *words):
    args = sweep.parse(["launch", "--algorithms", "BA", "--n_hparams", "1", "--n_trials", "1", "--output_dir",
                        str(tmp_path), *words])  # fmt: skip
    return [(job.train_args["dataset"], job.train_args["test_envs"]) for job in sweep.make_jobs(args)]


def test_single_source_sweeps_train_on_the_papers_sources_or_those_given(tmp_path):
    single = ("--protocol", "single_source", "--datasets")
    paper = held_out(tmp_path, *single, "PACS", "TerraIncognita")
    assert paper == [("PACS", [0, 2, 3]), ("TerraIncognita", [0, 2, 3])]
    assert held_out(tmp_path, *single, "DigitsShift") == [
        ("DigitsShift", [env for env in range(4) if env != source]) for source in range(4)
    ]
    given = held_out(tmp_path, *single, "PACS", "VLCS", "--source_envs", "LabelMe", "sketch", "0")
    assert given == [("PACS", [1, 2, 3]), ("PACS", [0, 1, 2]), ("VLCS", [1, 2, 3]), ("VLCS", [0, 2, 3])]


def test_a_single_source_job_is_a_run_of_its_own(tmp_path):
    path = write(tmp_path, "{datasets: [PACS], algorithms: [BA], output_dir: o, protocol: single_source, "
                           "source_envs: [photo], evaluate: lean}")  # fmt: skip
    job = sweep.make_jobs(sweep.parse(["launch", "--sweep", str(path)]))[0]
    parsed = train.make_parser().parse_args(job.argv)
    assert (parsed.protocol, parsed.test_envs, parsed.evaluate) == ("single_source", [0, 1, 3], "lean")
    assert job.train_args["seed"] == seed_hash("PACS", "BA", [0, 1, 3], 0, 0)


def test_a_jobs_command_is_a_run_with_its_arguments(tmp_path):
    args = sweep.parse(small(tmp_path, "--workers", "1", algorithms=["BOnly@rank=16"]))
    job = sweep.make_jobs(args)[2]
    parsed = train.make_parser().parse_args(job.argv)
    assert (parsed.algorithm, parsed.test_envs, parsed.steps, parsed.workers) == ("BOnly@rank=16", [2], 2, 1)
    assert parsed.train_eval_share == 0.05 and parsed.skip_model_save
    assert parsed.output_dir == str(job.folder.path)


def test_what_changes_no_number_changes_no_identity(tmp_path):
    plain = sweep.make_jobs(sweep.parse(small(tmp_path)))
    other = sweep.make_jobs(sweep.parse(small(tmp_path, "--workers", "3", "--verify_images", "--jobs", "7")))
    assert [job.folder.path for job in plain] == [job.folder.path for job in other]
    numbers = sweep.make_jobs(sweep.parse(small(tmp_path, "--precision", "float32")))
    assert not {job.folder.path for job in plain} & {job.folder.path for job in numbers}


@pytest.mark.slow
def test_a_sweep_runs_ends_in_tables_and_goes_on_with_what_is_missing(tmp_path, capsys):
    argv = small(tmp_path, algorithms=["LP", "BOnly"])
    assert sweep.main(argv) == 0
    out = capsys.readouterr().out
    jobs = sweep.make_jobs(sweep.parse(argv))
    assert all(job.folder.state is State.DONE for job in jobs)
    assert "training-domain validation set" in out and "plot.png" in out
    assert (tmp_path / "sweep" / "tables" / "results.tex").exists()

    times = {job.folder.path: (job.folder.path / "done").stat().st_mtime_ns for job in jobs}
    (jobs[3].folder.path / "done").unlink()
    assert sweep.main(argv) == 0
    again = {job.folder.path: (job.folder.path / "done").stat().st_mtime_ns for job in jobs}
    assert [path for path in times if times[path] != again[path]] == [jobs[3].folder.path]
    assert "7 done" in capsys.readouterr().out


@pytest.mark.slow
def test_a_failed_run_is_named_and_the_rest_goes_on(tmp_path, capsys, monkeypatch):
    argv = small(tmp_path, "--jobs", "1")
    jobs = sweep.make_jobs(sweep.parse(argv))
    jobs[1].folder.path.parent.mkdir()
    jobs[1].folder.path.write_text("a file where the run's folder should be")
    monkeypatch.setattr(sweep, "check", lambda jobs: None)
    assert sweep.main(argv) == 1
    states = [job.folder.state for job in jobs]
    assert [states[i] for i in (0, 2, 3)] == [State.DONE] * 3
    assert "1 of 4 runs failed" in capsys.readouterr().err


def test_a_dry_run_prints_commands_and_leaves_no_trace(tmp_path, capsys):
    assert sweep.main(small(tmp_path, "--dry_run")) == 0
    printed = capsys.readouterr().out
    assert printed.count("-m domainbed_ext.train") == 4
    assert list(tmp_path.iterdir()) == []


def test_delete_incomplete_deletes_just_that(tmp_path):
    argv = small(tmp_path)
    jobs = sweep.make_jobs(sweep.parse(argv))
    for job, state in zip(jobs, ("done", "incomplete", "failed"), strict=False):
        job.folder.start()
        job.folder.finish() if state == "done" else job.folder.fail("why") if state == "failed" else None
    assert sweep.main(["delete_incomplete", *argv[1:]]) == 0
    kept = [job.folder.state for job in jobs]
    assert kept == [State.DONE, State.NOT_LAUNCHED, State.FAILED, State.NOT_LAUNCHED]


def test_arguments_override_the_definition(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"datasets": "PACS", "algorithms": ["LP"], "steps": 10, "n_trials": 2,
                                    "output_dir": "o", "hparams": {"lr": 0.1}}))  # fmt: skip
    args = sweep.parse(["launch", "--sweep", str(path), "--steps", "20"])
    assert (args.datasets, args.steps, args.n_trials, json.loads(args.hparams)) == (["PACS"], 20, 2, {"lr": 0.1})


def test_a_name_given_twice_is_run_once(tmp_path):
    args = sweep.parse(small(tmp_path, algorithms=["LP", "BA", "LP"]))
    assert args.algorithms == ["LP", "BA"]


def test_no_argument_is_the_quickstart():
    args = sweep.parse(["launch"])
    assert args.datasets == ["DigitsShift"] and set(args.algorithms) == {"BA", "BOnly", "AOnly", "LP", "FullFT"}
    assert sweep.parse(["launch", "--steps", "7"]).steps == 7


@pytest.mark.parametrize("path", sorted(resources.sweeps().glob("*.yaml")), ids=lambda path: path.name)
def test_every_packaged_sweep_is_whole_and_opens_with_its_command(path):
    args = sweep.parse(["launch", "--sweep", path.name, "--data_dir", "d"])
    assert sweep.make_jobs(args)
    head = path.read_text().split("\ndatasets")[0]
    assert "python -m domainbed_ext.sweep launch" in head and "Cost" in head


def write(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("datasets: [PACS\nsteps: 3", "bad.yaml line 2 is not YAML"),
        ("- PACS", "is not a list of `argument: value` lines"),
        ("dataset: PACS", "unknown argument in .*'dataset': did you mean 'datasets'"),
        ("datasets: [PACS]", "--algorithms is missing"),
        ("{datasets: [PACS], algorithms: [BA]}", "--output_dir is missing"),
        ("{datasets: [PACS], algorithms: [BA], output_dir: o, n_hparams: 0}", "this sweep has no run"),
        ("steps: many", "argument --steps: invalid int value: 'many'; see python -m domainbed_ext.sweep --help"),
        ("n_trials: 2.5", "argument --n_trials: invalid int value: '2.5'"),
        ("steps: [1, 2]", "unrecognized arguments: 2"),
    ],
)
def test_a_malformed_definition_gets_a_sentence(tmp_path, text, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        sweep.parse(["launch", "--sweep", str(write(tmp_path, text))])


def test_an_unknown_definition_lists_the_packaged_ones():
    with pytest.raises(BenchmarkError, match=r"no sweep definition nothing: .*quickstart.yaml"):
        sweep.parse(["launch", "--sweep", "nothing"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--algorithms", "BOnyl"], "unknown algorithm 'BOnyl': did you mean 'BOnly'?"),
        (["--datasets", "PCAS"], "unknown data set 'PCAS': did you mean 'PACS'?"),
        (["--datasets", "PACS"], "PACS needs its images: add --data_dir"),
        (["--datasets", "PACS", "--data_dir", "nowhere"], "PACS: no folder nowhere/PACS"),
        (["--backbone", "vit_tinny_patch16_224"], "did you mean 'vit_tiny_patch16_224'?"),
        (["--weights", "none.safetensors"], "no weights file none.safetensors"),
        (["--hparams", "{rank: 8}"], "--hparams is not JSON"),
        (["--hparams", '{"batch_size": 4000}'], "batch_size 4000 is larger than the"),
        (["--algorithms", "BOnly@rank=0"], "rank must be a whole number of at least 1"),
        (["--algorithms", "BOnly@rank=999"], "rank 999 is over"),
        (["--protocol", "single_sauce"], "argument --protocol: invalid choice: 'single_sauce'"),
        (["--source_envs", "plain"], "--source_envs is of --protocol single_source: add that, or leave it out"),
        (["--protocol", "single_source", "--source_envs", "plian"], "did you mean 'plain'?"),
        (["--pairs", "--evaluate", "lean"], "--evaluate lean leaves out what leave-one-domain-out"),
        (["--command_launcher", "locale"], "unknown launcher 'locale': did you mean 'local'?"),
    ],
)
def test_bad_input_is_told_before_anything_runs(tmp_path, words, sentence):
    with pytest.raises(BenchmarkError) as error:
        sweep.main(small(tmp_path, *words))
    assert sentence in str(error.value)
    assert not (tmp_path / "sweep").exists()


def test_an_unwritable_output_dir_gets_a_sentence(tmp_path):
    (tmp_path / "sweep").write_text("a file")
    with pytest.raises(BenchmarkError, match="cannot write to .* give another --output_dir"):
        sweep.main(small(tmp_path))


def test_the_command_line_prints_one_line_and_exits_with_2(tmp_path):
    argv = [sys.executable, "-m", "domainbed_ext.sweep", *small(tmp_path, algorithms=["BOnyl"])]
    process = subprocess.run(argv, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert process.returncode == 2
    assert process.stderr == "error: unknown algorithm 'BOnyl': did you mean 'BOnly'?\n"


def test_a_run_killed_without_a_word_is_marked_failed(tmp_path, monkeypatch):
    job = sweep.make_jobs(sweep.parse(small(tmp_path)))[0]
    job.folder.start()
    monkeypatch.setattr(sweep, "get_launcher", lambda name: lambda commands, jobs, progress: [-9])
    failed = sweep.launch([job], "local", 1, Console(stderr=True))
    assert failed == [(job, "the run was killed by signal 9")]
    assert job.folder.state is State.FAILED
