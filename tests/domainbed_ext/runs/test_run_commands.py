"""The commands on the page do what they say."""

import shlex

import pytest

from domainbed_ext.runs import arguments, launches, provenance
from domainbed_ext.runs.run_commands import run_commands


def parsed(words):
    return arguments.parse(words).complete()


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--algorithm", "BOnly@rank=16", "--steps", "20", "--seed", "7", "--trial_seed", "2"],
        ["--protocol", "domainbed", "--dataset", "PACS", "--data_dir", "some where"],
        ["--protocol", "single_source", "--test_envs", "0", "2", "3", "--hparams", '{"lr": 0.01}'],
        ["--test_on", "all", "--skip_model_save", "--threads", "3"],
    ],
)
def test_the_command_trains_the_same_run(options):
    complete = parsed(["--output_dir", "somewhere", *options])
    record = {"run": "0a1b", "args": complete.__dict__ | {"output_dir": "somewhere"}}
    commands = run_commands("runs/my sweep", record)
    words = shlex.split(commands["Train again"])
    assert words[:3] == ["python", "-m", "domainbed_ext.train"] and "--output_dir" not in words
    again = parsed(words[3:])
    assert {**again.__dict__, "output_dir": ""} == {**complete.__dict__, "output_dir": ""}
    assert commands["Evaluate again"] == "python -m domainbed_ext.evaluate --run 'runs/my sweep/0a1b'"


def test_a_derived_run_is_not_trained():
    assert list(run_commands("runs", {"run": "a", "args": {}, "derived": {"ingredients": []}})) == ["Evaluate again"]


def test_launches_are_read_where_there_are_any(tmp_path):
    assert launches.read_launches(tmp_path) == []
    path = launches.path_of(tmp_path)
    path.parent.mkdir()
    path.write_text("[{]")
    assert launches.read_launches(tmp_path) == []
    path.write_text('[{"command": "x"}, 3]')
    assert launches.read_launches(tmp_path) == [{"command": "x"}]


def test_the_commit_is_of_this_package(monkeypatch, tmp_path):
    def run(words, **options):
        raise FileNotFoundError

    monkeypatch.setattr(provenance.subprocess, "run", run)
    assert provenance.commit() == "" and "commit" not in provenance.provenance("m", [])
