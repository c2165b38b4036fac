"""`sweep confirm`: what it chooses, and the trials that it runs."""

import json
import shlex
import shutil

import pytest

from domainbed_ext.algorithms.names import without_objective
from domainbed_ext.errors import BenchmarkError, warn_once
from domainbed_ext.hparams_registry import OPTIONS, default_hparams
from domainbed_ext.runs.folder import State, load_records
from domainbed_ext.sweep import command as sweep
from domainbed_ext.sweep.arguments import parse
from domainbed_ext.sweep.confirm import choose
from tests.domainbed_ext.run_states import done, make_jobs, words

# By rate: mean accuracy on the held-out images of the training environments, and accuracy on the test environment.
ACCURACIES = {0.001: (0.6, 0.9), 0.002: (0.8, 0.2), 0.01: (0.7, 0.5)}


def finish(jobs, val, test):
    """Finishes runs with these accuracies."""
    for job in jobs:
        args = job.train_args
        done(job)
        record = {
            "args": {**args, "protocol": "leave_one_out"},
            "hparams": job.computation["hparams"] | {"weights": "none"},
            "environments": ["blended", "plain", "rotated", "sketched"],
            "step": 1,
        }
        for env in range(4):
            record[f"env{env}_out_acc"] = test if [env] == args["test_envs"] else val
            record[f"env{env}_in_acc"] = test if [env] == args["test_envs"] else val
        (job.folder.path / "results.jsonl").write_text(json.dumps(record) + "\n")


def args_of(tmp_path, **options):
    return parse(words(tmp_path, command="confirm", **options))


@pytest.fixture
def searched(tmp_path):
    """A sweep of three rates whose runs are done, in two trials."""
    for lr, (val, test) in ACCURACIES.items():
        finish(make_jobs(tmp_path, "--hparams", json.dumps({"lr": lr}), "--n_trials", "2"), val, test)
    return tmp_path


def confirm(tmp_path, capsys, *more):
    """The options of each run that `confirm` would launch."""
    capsys.readouterr()
    assert sweep.main(words(tmp_path, "--dry_run", "--n_trials", "3", *more, command="confirm")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "-m domainbed_ext.train" in line]
    found = []
    for line in lines:
        given = shlex.split(line)
        found.append({name: given[given.index(f"--{name}") + 1] for name in ("hparams", "trial_seed", "test_envs")})
    return found


def test_fresh_trials_have_the_rate_with_the_best_validation_accuracy(searched, capsys):
    runs = confirm(searched, capsys)
    assert len(runs) == 4 * 3
    assert {run["hparams"] for run in runs} == {'{"lr": 0.002}'}
    assert {run["trial_seed"] for run in runs} == {"2", "3", "4"}
    assert {run["test_envs"] for run in runs} == {"0", "1", "2", "3"}


def test_the_accuracy_on_the_test_environment_has_no_part_in_it(searched):
    args = args_of(searched)
    choices = list(choose(load_records(args.output_dir), args))
    assert [choice.val_acc for choice in choices] == pytest.approx([0.8] * 4)
    assert {(choice.candidates, choice.trials) for choice in choices} == {(3, 2)}


def test_hyperparameters_that_lack_trials_are_not_compared(searched):
    finish(make_jobs(searched, "--hparams", '{"lr": 0.1}', "--n_trials", "1"), 0.99, 0.99)
    args = args_of(searched)
    choices = choose(load_records(args.output_dir), args)
    assert [choice.val_acc for choice in choices] == pytest.approx([0.8] * 4)


def test_hyperparameters_are_compared_on_the_same_trials(tmp_path):
    for lr, val, first in ((0.001, 0.6, 0), (0.002, 0.7, 0), (0.01, 0.9, 1)):  # the last one of easier splits
        jobs = make_jobs(tmp_path, "--hparams", json.dumps({"lr": lr}), "--n_trials", str(first + 2))
        finish([job for job in jobs if job.train_args["trial_seed"] >= first], val, val)
    args = args_of(tmp_path)
    choices = choose(load_records(args.output_dir), args)
    assert {(choice.hparams["lr"], choice.candidates, choice.trials) for choice in choices} == {(0.002, 2, 2)}


@pytest.mark.parametrize("diverged", [0.0001, 0.1])
def test_a_diverged_run_is_never_the_best(searched, diverged):
    finish(make_jobs(searched, "--hparams", json.dumps({"lr": diverged}), "--n_trials", "2"), None, None)
    args = args_of(searched)
    choices = choose(load_records(args.output_dir), args)
    assert {choice.hparams["lr"] for choice in choices} == {0.002}


def test_a_run_that_diverged_after_its_best_step_is_never_the_best(searched):
    jobs = make_jobs(searched, "--hparams", '{"lr": 0.1}', "--n_trials", "2")
    finish(jobs, 0.99, 0.99)
    for job in jobs[:2]:
        path = job.folder.path / "results.jsonl"
        lost = json.loads(path.read_text()) | {"step": 2, "diverged": True, "first_nonfinite_step": 2}
        path.write_text(path.read_text() + json.dumps(lost | {f"env{env}_out_acc": None for env in range(4)}) + "\n")
    args = args_of(searched)
    choices = list(choose(load_records(args.output_dir), args))
    diverged = {tuple(job.train_args["test_envs"]) for job in jobs[:2]}
    assert {choice.test_envs for choice in choices if choice.hparams["lr"] == 0.002} == diverged
    assert {choice.test_envs for choice in choices if choice.hparams["lr"] == 0.1} == {
        (env,) for env in range(4)
    } - diverged


def test_several_runs_with_the_same_hyperparameters_count_by_their_mean(tmp_path):
    fixed = {name: value for name, value in default_hparams("LP", "DigitsShift").items() if name not in OPTIONS}
    same = make_jobs(tmp_path, "--hparams", json.dumps(fixed | {"lr": 0.001}), "--n_trials", "1", "--n_hparams", "3")
    for seed, val in enumerate((0.6, 0.7, 0.9)):
        finish([job for job in same if job.train_args["hparams_seed"] == seed], val, val)
    finish(make_jobs(tmp_path, "--hparams", json.dumps(fixed | {"lr": 0.002}), "--n_trials", "1"), 0.8, 0.8)
    args = args_of(tmp_path)
    choices = list(choose(load_records(args.output_dir), args))
    assert {(choice.hparams["lr"], choice.candidates, round(choice.val_acc, 9)) for choice in choices} == {
        (0.002, 2, 0.8)
    }


def test_runs_of_other_lengths_compete_with_a_warning(searched, capsys):
    finish(make_jobs(searched, "--hparams", '{"lr": 0.1}', "--n_trials", "2", "--steps", "7"), 0.1, 0.1)
    args = args_of(searched)
    warn_once.cache_clear()
    list(choose(load_records(args.output_dir), args))
    assert "finished runs of LP on DigitsShift differ in steps, but compete" in capsys.readouterr().err


def test_test_environments_without_runs_are_named_and_taken_from_the_method_alone(searched, capsys):
    for folder in [run.parent for run in args_of(searched).output_dir.glob("*/results.jsonl")]:
        if json.loads((folder / "results.jsonl").read_text())["args"]["test_envs"] == [3]:
            shutil.rmtree(folder)
    jobs = make_jobs(searched, "--hparams", '{"lr": 0.01}', "--n_trials", "2", algorithms=["LP+IRM"])
    finish([job for job in jobs if job.train_args["test_envs"] == [0]], 0.7, 0.7)
    args = args_of(searched, algorithms=["LP+IRM"])
    choices = list(choose(load_records(args.output_dir), args))
    assert [(choice.test_envs, choice.chosen_with) for choice in choices] == [
        ((0,), "LP+IRM"),
        ((1,), "LP"),
        ((2,), "LP"),
    ]
    assert (
        "no finished runs of LP on DigitsShift with --test_envs 3: there it is not confirmed" in capsys.readouterr().err
    )


def test_diverged_runs_alone_are_refused(tmp_path):
    finish(make_jobs(tmp_path, "--hparams", '{"lr": 0.1}', "--n_trials", "2"), None, None)
    with pytest.raises(
        BenchmarkError, match="of LP on DigitsShift, all hyperparameters have a run that diverged: launch"
    ):
        sweep.main(words(tmp_path, "--dry_run", command="confirm"))


def test_a_sweep_without_runs_of_the_method_is_refused(searched):
    with pytest.raises(BenchmarkError, match="no finished runs of BA on DigitsShift: launch the sweep first"):
        sweep.main(words(searched, "--dry_run", command="confirm", algorithms=["LP", "BA"]))


def test_an_objective_without_runs_takes_what_the_method_alone_chose(searched):
    names = ["LP", "LP+IRM", "LP+SAM@sam_rho=0.1"]
    args = parse(words(searched, command="confirm", algorithms=names))
    choices = choose(load_records(args.output_dir), args)
    assert [choice.algorithm for choice in choices[::4]] == names
    assert {choice.chosen_with for choice in choices} == {"LP"}
    assert {choice.hparams["lr"] for choice in choices} == {0.002}


def test_an_objective_with_runs_of_its_own_chooses_itself(searched):
    finish(make_jobs(searched, "--hparams", '{"lr": 0.1}', algorithms=["LP+IRM"]), 0.5, 0.5)
    args = parse(words(searched, command="confirm", algorithms=["LP+IRM"]))
    choices = choose(load_records(args.output_dir), args)
    assert {(choice.chosen_with, choice.hparams["lr"]) for choice in choices} == {("LP+IRM", 0.1)}


def test_trials_of_the_sweep_are_copied_and_not_run_again(searched, monkeypatch):
    launched = []
    monkeypatch.setattr("domainbed_ext.sweep.confirm.launch_runs", lambda _, jobs, *__: launched.extend(jobs) or 0)
    given = words(searched, "--skip_confirmation", "--first_trial", "1", "--n_trials", "2", command="confirm")
    assert sweep.main(given) == sweep.main(given) == 0
    assert {job.train_args["trial_seed"] for job in launched} == {1, 2}
    for job in launched:
        assert (job.folder.state is State.DONE) == (job.train_args["trial_seed"] == 1)
    copied = load_records(searched / "sweep" / "confirmed")
    assert {record["hparams"]["lr"] for record in copied} == {0.002} and len(copied) == 4


def test_the_first_trial_is_an_option_of_confirm_alone(searched):
    with pytest.raises(BenchmarkError, match="--first_trial is an option of `confirm`, not of `launch`"):
        parse(words(searched, "--first_trial", "1"))


def test_what_all_choices_share_is_said_once(searched, capsys, monkeypatch):
    monkeypatch.setattr("domainbed_ext.sweep.confirm.launch_runs", lambda *_: 0)
    assert sweep.main(words(searched, "--skip_confirmation", command="confirm", algorithms=["LP", "LP+IRM"])) == 0
    printed = capsys.readouterr().out
    assert printed.count("lr=0.002") == 1 and "All with lr=0.002." in printed
    assert printed.count("defaults, with LP") == 4
    choices = json.loads((searched / "sweep" / "confirmed" / "choices.json").read_text())
    assert [choice["chosen_with"] for choice in choices] == ["LP"] * 8


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("BA", "BA"),
        ("BA@rank=4", "BA@rank=4"),
        ("BA+SAM", "BA"),
        ("BA+SAM@rank=4,sam_rho=0.1", "BA@rank=4"),
        ("Peft+IRM@method=dora", "Peft@method=dora"),
    ],
)
def test_a_name_without_its_objective(name, alone):
    assert without_objective(name) == alone
