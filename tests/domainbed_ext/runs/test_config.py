"""A run from a YAML file, and the options of a run as one."""

from dataclasses import asdict

import pytest
import yaml

from domainbed_ext import train
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs.arguments import RunArguments, parse
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.runs.identity import Computations, name

FILE = """\
dataset: PACS
algorithm: BOnly@rank=4
test_envs: [sketch, 1]
hparams: {lr: 1e-3, targets: all}
skip_model_save: true
import: a.py
steps: 30
"""


@pytest.fixture
def write(tmp_path):
    def to(text):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return to


def test_a_file_has_the_options_of_the_command_line_which_overrides_it(write):
    path = write(FILE)
    words = [
        "--dataset",
        "PACS",
        "--algorithm",
        "BOnly@rank=4",
        "--test_envs",
        "sketch",
        "1",
        "--hparams",
        "lr=1e-3",
        "targets=all",
    ]
    words += ["--skip_model_save", "--import", "a.py", "--steps", "30"]
    assert parse(["--config", path]) == parse(words)
    assert parse(["--config", path]) == parse(["--steps", "30", "--config", path])
    over = parse(["--steps", "9", "--config", path, "--test_envs", "photo", "--hparams", "lr=2"])
    assert (over.steps, over.test_envs, over.hparams, over.dataset) == (9, ["photo"], '{"lr": 2}', "PACS")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stps: 3", r"unknown option in .*run.yaml line 1: 'stps': did you mean 'steps'\?"),
        ("datasets: [PACS]", r"line 1: 'datasets': did you mean 'dataset'"),
        ("config: other.yaml", r"unknown option in .* line 1: 'config'"),
        ("dataset: PACS\nsteps: [1, 2]", r"run.yaml line 2: steps takes one value, not a list of 2"),
        ("- 3", r"is not a list of `option: value` lines: see .*domainbed_ext.train --print_config"),
        ("steps: 0", r"argument --steps: 0 is too small"),
        ("{", r"run.yaml line \d is not YAML"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_a_sentence(write, text, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        parse(["--config", write(text)])
    with pytest.raises(BenchmarkError, match="no file nothing.yaml: give --config a YAML file of options"):
        parse(["--config", "nothing.yaml"])


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--protocol domainbed --steps 7",
        "--algorithm LoRA@r=4 --hparams lr=1e-3 --hparams_seed 3 --trial_seed 1 --test_envs sketched 1",
        "--protocol single_source --source_envs plain --track csv --workers 0 --time_limit 0.5",
    ],
)
def test_the_printed_options_are_the_same_run(write, capsys, words):
    args = parse(words.split())
    assert train.main([*words.split(), "--print_config"]) == 0
    printed = capsys.readouterr().out
    again = parse(["--config", write(printed)])
    computations = Computations()
    assert name(computations.of(again)) == name(computations.of(args))
    given = {field: value for field, value in asdict(args).items() if value is not None}
    assert {field: asdict(again)[field] for field in given} == given
    assert train.main(["--config", write(printed), "--print_config"]) == 0
    assert capsys.readouterr().out == printed
    assert "#   rank: " in printed and "evaluate: " in printed


def test_text_that_looks_like_a_number_stays_text(write, capsys):
    words = ["--output_dir", "1e-3", "--data_dir", "0o7", "--algorithm", "BOnly"]
    assert train.main([*words, "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["output_dir"] == "1e-3"
    again = parse(["--config", write(printed)])
    assert (again.output_dir, again.data_dir) == ("1e-3", "0o7")


def test_printing_checks_the_options_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BenchmarkError, match="unknown algorithm 'BOnl'"):
        train.main(["--algorithm", "BOnl", "--print_config"])
    assert train.main(["--print_config"]) == 0 and not list(tmp_path.iterdir())


def test_a_run_from_a_file_is_the_run(write, tmp_path, few_evaluated):
    path = write(f"steps: 1\ntrain_eval_share: 0.05\noutput_dir: {tmp_path / 'run'}\n")
    assert train.main(["--config", path, "--algorithm", "LP"]) == 0
    (record,) = RunFolder(tmp_path / "run").records()
    assert record["args"]["algorithm"] == "LP" and "config" not in record["args"]
    assert RunArguments.from_mapping(record["args"]).steps == 1
