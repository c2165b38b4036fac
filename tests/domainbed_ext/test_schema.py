"""The schemas of YAML files: current, right of what is valid, and wrong of what is not."""

import json

import pytest

from domainbed_ext import schema
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs import arguments
from domainbed_ext.sweep.arguments import parse as parse_sweep
from domainbed_ext.system import resources, yaml12
from domainbed_ext.system.option_file import file_options

HINT = "# yaml-language-server: $schema=sweep.schema.json"


def validator(name):
    jsonschema = pytest.importorskip("jsonschema")
    kept = json.loads((resources.sweeps() / f"{name}.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft7Validator.check_schema(kept)
    return jsonschema.Draft7Validator(kept)


def read(text):
    return {entry.key: entry.value for entry in yaml12.read_mapping(text)}


@pytest.mark.parametrize("name", schema.SCHEMAS)
def test_the_schemas_are_current(name):
    kept = (resources.sweeps() / f"{name}.schema.json").read_text(encoding="utf-8")
    assert kept == schema.format_schema(name), "run `make format`"
    options = file_options(schema.SCHEMAS[name][1]())
    properties = json.loads(kept)["properties"]
    assert properties.keys() == options.keys() and all(each["description"] for each in properties.values())


@pytest.mark.parametrize("path", sorted(resources.sweeps().glob("*.yaml")), ids=lambda path: path.name)
def test_the_packaged_sweeps_are_valid_and_name_their_schema(path):
    text = path.read_text(encoding="utf-8")
    assert HINT in text.splitlines()
    assert not list(validator("sweep").iter_errors(read(text)))


VALID = {
    "run": [
        "{dataset: PACS, test_envs: [sketch, 1], steps: 3e2, hparams: {lr: 1e-3}, track: csv, device: cuda:1}",
        "{hparams: rank=16, algorithm: 'Mine@lr=1', precision: fp16, train_eval_share: 1, import: [a.py, b.py]}",
        "{test_envs: 3, cache_gb: 0, time_limit: 0.5, skip_model_save: true, output_dir: 7, hparams: [rank=4, lr=1]}",
        "{}",
    ],
    "sweep": [
        "{datasets: PACS, algorithms: [BA, Mine], output_dir: o, launcher_options: {partition: gpu}, pairs: true}",
        "{datasets: [PACS], algorithms: BA, output_dir: o, launcher_options: '{}', evaluations: 5, jobs_per_gpu: 2}",
    ],
}
WRONG = {
    "run": [
        "{stps: 3}",
        "{steps: 0}",
        "{steps: many}",
        "{steps: [1, 2]}",
        "{skip_model_save: 1}",
        "{train_eval_share: 0}",
        "{precision: half}",
        "{test_envs: []}",
        "{test_envs: [true]}",
        "{time_limit: 0}",
        "{device: gpu}",
        "{config: other.yaml}",
        "{datasets: [PACS]}",
    ],
    "sweep": [
        "{sweep: other}",
        "{n_trials: 0}",
        "{seed: 4294967296}",
        "{algorithms: {BA: 1}}",
        "{launcher_options: [1]}",
    ],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in VALID.items() for text in texts])
def test_what_commands_accept_is_valid(tmp_path, name, text):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    _ = arguments.parse(["--config", str(path)]) if name == "run" else parse_sweep(["cancel", "--sweep", str(path)])
    assert not list(validator(name).iter_errors(read(text)))


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in WRONG.items() for text in texts])
def test_what_commands_refuse_is_not(tmp_path, name, text):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(BenchmarkError):
        _ = arguments.parse(["--config", str(path)]) if name == "run" else parse_sweep(["cancel", "--sweep", str(path)])
    assert list(validator(name).iter_errors(read(text)))


@pytest.mark.parametrize("name", schema.SCHEMAS)
def test_printed_options_are_valid(name, capsys):
    from domainbed_ext import train
    from domainbed_ext.sweep import command

    assert (train.main(["--print_config"]) if name == "run" else command.main(["launch", "--print_config"])) == 0
    assert not list(validator(name).iter_errors(read(capsys.readouterr().out)))


def test_the_command_prints_a_schema(capsys):
    assert schema.main(["sweep"]) == 0
    assert json.loads(capsys.readouterr().out)["title"].startswith("domainbed_ext: the definition of a sweep")
    with pytest.raises(BenchmarkError, match="unknown schema 'swep': did you mean 'sweep'"):
        schema.main(["swep"])
