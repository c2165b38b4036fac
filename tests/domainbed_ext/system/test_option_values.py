import argparse
import importlib
import os
import subprocess
import sys

import pytest

from domainbed_ext.cache.command import make_parser as cache_parser
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.evaluate import make_parser as evaluate_parser
from domainbed_ext.runs import arguments as options
from domainbed_ext.sweep import jobs as sweep_jobs
from domainbed_ext.sweep import options as sweep_options
from domainbed_ext.sweep.arguments import parse
from domainbed_ext.system import option_values

COMMANDS = {
    "train": options.make_parser,
    "sweep": sweep_options.make_parser,
    "cache": cache_parser,
    "evaluate": evaluate_parser,
    **{
        name: lambda name=name: importlib.import_module(f"domainbed_ext.{name}").make_parser()
        for name in (
            "analyse.command",
            "collect_results",
            "frontier",
            "prepare.command",
            "bench.__main__",
            "predict",
            "soup",
            "upstream",
        )
    },
    "vitlorafa.bench": lambda: importlib.import_module("vitlorafa.bench.__main__").make_parser(),
}
# Options of text that is no path.
WORDS = {
    *("dataset", "algorithm", "task", "hparams", "source_envs", "backbone", "datasets", "algorithms", "step", "name"),
    *("command_launcher", "launcher_options", "selection", "names", "script", "arguments", "what", "command"),
    *("models", "backbones", "ways", "targets", "precision", "device", "methods", "reference", "track"),
}


def all_actions(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from all_actions(each)
        else:
            yield action


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command_says_what_its_values_may_be(command):
    for action in all_actions(COMMANDS[command]()):
        if action.nargs == 0 or action.choices or action.dest in WORDS:
            continue
        assert action.type is not None, action.dest
        if command != "vitlorafa.bench":  # which checks its numbers itself
            assert action.type not in (int, float, str), action.dest


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--save_steps -1", "--save_steps: -1 is too small, give 0 or more"),
        ("--save_minutes -0.5", "--save_minutes: -0.5 is too small, give 0 or more"),
        ("--save_minutes nan", "--save_minutes: nan is not a finite number"),
        ("--save_minutes -1e-3", "--save_minutes: -1e-3 is too small"),
        ("--time_limit -1", "--time_limit: -1 is too small, give a number above 0"),
        ("--time_limit 0", "--time_limit: 0 is too small, give a number above 0"),
        ("--time_limit -inf", "--time_limit: -inf is not a finite number"),
        ("--cache_gb nan", "--cache_gb: nan is not a finite number"),
        ("--seed -5", "--seed: -5 is too small, give 0 or more"),
        ("--seed 4294967296", "--seed: 4294967296 is too large, give 4294967295 or less"),
        ("--test_envs -1", "--test_envs: -1 is too small, give 0 or more"),
        ("--steps 0", "--steps: 0 is too small, give 1 or more"),
        ("--steps 2.5", "--steps: '2.5' is not a whole number"),
        ("--steps many", "--steps: 'many' is not a whole number"),
        ("--threads 0", "--threads: 0 is too small, give 1 or more"),
        ("--workers -1", "--workers: -1 is too small, give 0 or more"),
        ("--checkpoint_freq -1", "--checkpoint_freq: -1 is too small, give 0 or more"),
        ("--holdout_fraction 1", "--holdout_fraction: 1 is out of range, give a share above 0 and below 1"),
        ("--holdout_fraction nan", "--holdout_fraction: nan is not a finite number"),
        ("--train_eval_share 0", "--train_eval_share: 0 is out of range, give a share above 0 and up to 1"),
        ("--uda_holdout_fraction 1", "--uda_holdout_fraction: 1 is out of range, give a share from 0 and below 1"),
    ],
)
def test_an_option_that_makes_no_sense_is_named_with_where_it_starts(words, sentence):
    with pytest.raises(BenchmarkError) as error:
        options.parse(words.split())
    assert sentence in str(error.value)


def test_numbers_are_read_as_people_write_them():
    words = "--steps 1e3 --save_minutes 5e-1 --seed 4294967295 --uda_holdout_fraction 0 --train_eval_share 1"
    args = options.parse(words.split())
    assert (args.steps, args.save_minutes, args.seed) == (1000, 0.5, 2**32 - 1)
    assert type(args.steps) is int


@pytest.mark.parametrize(("name", "value"), [("jobs", "-1"), ("jobs_per_gpu", "0"), ("n_trials", "0"), ("steps", "0")])
def test_a_sweeps_options_are_checked_alike(name, value):
    with pytest.raises(BenchmarkError, match=f"--{name}: {value} is too small, give [01] or more"):
        parse(["launch", f"--{name}", value])


def test_paths_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("WHERE", "/data")
    args = options.parse(["--output_dir", "~/runs", "--data_dir", "$WHERE/mine", "--weights", "${WHERE}/w.safetensors"])
    assert (args.output_dir, args.data_dir, args.weights) == (
        "/home/someone/runs",
        "/data/mine",
        "/data/w.safetensors",
    )
    args = options.parse(["--cache_dir", "none", "--weights", "pretrained"])
    assert (args.cache_dir, args.weights) == ("none", "pretrained")


def test_a_path_that_cannot_be_expanded_gets_a_sentence(monkeypatch, tmp_path):
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.chdir(tmp_path)
    for text, sentence in (
        ("$NOT_SET/x", "the variable .NOT_SET is not set"),
        ("~nobody_of_that_name/x", "no home folder of ~nobody_of_that_name is known"),
        ("", "is empty"),
    ):
        with pytest.raises(BenchmarkError, match=f"argument --data_dir: .*{sentence}"):
            options.parse(["--data_dir", text])
    (tmp_path / "$NOT_SET").mkdir()
    assert options.parse(["--data_dir", "$NOT_SET"]).data_dir == "$NOT_SET"


def test_a_path_among_hyperparameters_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--datasets", "DigitsShift", "--algorithms", "LP", "--n_hparams", "1", "--output_dir", str(tmp_path / "o")]
    with pytest.raises(BenchmarkError, match=f"no weights file {tmp_path}/w.safetensors"):
        sweep_jobs.make_jobs(parse(["launch", *words, "--hparams", '{"weights": "~/w.safetensors"}']))


def test_a_value_that_begins_with_a_dash_reaches_the_run():
    words = ["--datasets", "ColoredMNIST", "--algorithms", "LP", "--n_hparams", "1", "--n_trials", "1"]
    words += ["--protocol", "single_source", "--source_envs", "-90%", "--output_dir=-runs", "--data_dir=-data"]
    (job,) = sweep_jobs.make_jobs(parse(["launch", *words]))
    assert job.train_args["test_envs"] == [0, 1]
    assert (job.args.data_dir, job.args.output_dir) == ("-data", os.path.join("-runs", job.name))


def test_without_a_home_folder_a_sentence_names_cache_dir():
    code = (
        "import os, pwd\n"
        "def no_entry(*_): raise KeyError('no such user')\n"
        "pwd.getpwuid = no_entry\n"
        "from domainbed_ext.cache.command import main\n"
        "from domainbed_ext.system.command_line import exit_cleanly\n"
        "exit_cleanly(lambda: main(['list']))\n"
    )
    gone = {"HOME", "XDG_CACHE_HOME", "DOMAINBED_EXT_CACHE"}
    environment = {name: value for name, value in os.environ.items() if name not in gone}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.startswith("error: the user has no home folder") and "--cache_dir" in process.stderr
    assert "Traceback" not in process.stderr


def test_seeds_of_options_fit_numpys():
    import numpy as np

    np.random.RandomState(option_values.LARGEST_SEED)
    with pytest.raises(ValueError):
        np.random.RandomState(option_values.LARGEST_SEED + 1)
