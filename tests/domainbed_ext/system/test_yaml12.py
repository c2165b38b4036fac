import json
import math

import pytest
import yaml

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.sweep import command as sweep
from domainbed_ext.sweep.arguments import parse
from domainbed_ext.system import yaml12


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-3", 0.001), ("1e3", 1000.0), (".5", 0.5), ("-1.5E+2", -150.0), ("010", 10), ("0o10", 8), ("0x10", 16)),
        *(("NO", "NO"), ("yes", "yes"), ("on", "on"), ("Off", "Off"), ("y", "y"), ("true", True), ("FALSE", False)),
        *(("2024-01-01", "2024-01-01"), ("1:30", "1:30"), ("1_000", "1_000"), ("~", None), ("null", None), ("", None)),
        *(("-.inf", -math.inf), ("1.", 1.0), ("+12", 12), ("'1'", "1"), ("e3", "e3"), (".", ".")),
    ],
)
def test_scalars_are_of_yaml_1_2(text, value):
    ((key, found, line),) = yaml12.read_mapping(f"# a comment\nkey: {text}")
    assert (key, found, type(found), line) == ("key", value, type(value), 2)


def test_not_a_number_is_read():
    assert math.isnan(yaml12.read_mapping("key: .nan")[0].value)


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", "outer:\n  a: 1\n  a: 3"])
def test_a_key_given_twice_is_an_error_with_its_line(text):
    with pytest.raises(yaml.YAMLError) as error:
        yaml12.read_mapping(text)
    assert error.value.problem == "'a' is given twice" and error.value.problem_mark.line == text.count("\n")


def test_merge_keys_may_be_overridden():
    one, two = yaml12.read_mapping("one: &one {a: 1, b: 2}\ntwo: {<<: *one, a: 3}")
    assert (one.value, two.value) == ({"a": 1, "b": 2}, {"a": 3, "b": 2})


def define(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return ["launch", "--sweep", str(path)]


BASE = "datasets: [DigitsShift]\nalgorithms: [LP]\n"


def test_a_definition_is_read_as_it_was_meant(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = BASE + "hparams: {lr: 1e-3}\noutput_dir: ~/runs/x\nsteps: 1e2\nsave_minutes: 5e-1\nsource_envs: [NO, -90%]\n"
    args = parse(define(tmp_path, text))
    assert json.loads(args.hparams) == {"lr": 0.001}
    assert args.output_dir == tmp_path / "runs" / "x"
    assert (args.steps, args.save_minutes, args.source_envs) == (100, 0.5, ["NO", "-90%"])


def test_a_definition_of_windows_is_read(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbfdatasets: PACS\r\nalgorithms: LP\r\noutput_dir: o\r\n")
    assert parse(["launch", "--sweep", str(tmp_path / "mine.yaml")]).datasets == ("PACS",)


def test_pairs_may_be_turned_off(tmp_path):
    assert parse(define(tmp_path, BASE + "output_dir: o\npairs: false")).single_test_envs
    assert not parse(define(tmp_path, BASE + "output_dir: o\npairs: true")).single_test_envs


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("steps: 1\nsteps: 2", "mine.yaml line 4 is not YAML .'steps' is given twice."),
        ("single_test_envs: NO", "line 3: single_test_envs is true or false, not NO"),
        ("steps: [1, 2]", "line 3: steps takes one value, not a list of 2"),
        ("source_envs: [{a: 1}]", 'line 3: source_envs takes text or a number, not {"a": 1}'),
        ("backbone: false", "line 3: backbone takes text or a number, not false"),
        ("steps: {a: 1}", "line 3: steps takes text or a number"),
        ("source_envs: []", "line 3: source_envs is an empty list"),
        ("source_envs: ['--dry_run']", "line 3: source_envs takes values, not an option such as --dry_run"),
        ("backbone: --dry_run", "unknown backbone '--dry_run'"),
        ("steps: -5", "argument --steps: -5 is too small, give 1 or more"),
        ("hparams: {lr: .nan}", "hyperparameter lr in --hparams is nan: give a finite number"),
        ("hparams: {lr: .inf}", "hyperparameter lr in --hparams is inf: give a finite number"),
        ("1: 2", "unknown option in .*mine.yaml line 3: '1'"),
        ("? [a]\n: 1", r"unknown option in .*line 3|is not YAML"),
    ],
)
def test_what_a_definition_cannot_say_gets_a_sentence_with_its_line(tmp_path, line, sentence):
    words = define(tmp_path, f"{BASE}{line}")
    with pytest.raises(BenchmarkError, match=sentence):
        sweep.main([*words, "--output_dir", str(tmp_path / "o"), "--n_hparams", "1", "--dry_run", "--n_trials", "1"])


def test_hyperparameters_that_are_not_finite_are_refused_in_names_too(tmp_path):
    words = ["launch", "--datasets", "DigitsShift", "--n_hparams", "1", "--output_dir", str(tmp_path / "o")]
    for name in ("LP@lr=NaN", "LP@lr=1e999", "ERM@vit_dropout=1.5", "LP@lr=-1"):
        with pytest.raises(BenchmarkError, match=r"give a finite number|should be 0 or more, and below 1|above 0"):
            sweep.main([*words, "--algorithms", name, "--dry_run"])
