import contextlib
import dataclasses
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from domainbed_ext import launchers
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.sweep import command as sweep
from domainbed_ext.sweep import jobs as sweep_jobs
from domainbed_ext.sweep.arguments import parse
from domainbed_ext.sweep.options import NAMES, PROGRAM, make_parser
from domainbed_ext.system import resources
from tests.domainbed_ext.run_states import failed, make_jobs, words

COMMANDS = ("launch", "retry", "status", "validate", "delete_incomplete", "cancel")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dry_run_leaves_no_trace(tmp_path, command, capsys):
    assert sweep.main(words(tmp_path, "--dry_run", command=command)) == 0
    assert list(tmp_path.iterdir()) == []
    job = make_jobs(tmp_path)[0]
    failed(job)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert sweep.main(words(tmp_path, "--dry_run", command=command)) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    printed = capsys.readouterr().out
    assert printed.count("-m domainbed_ext.train") == {"launch": 4, "retry": 1}.get(command, 0)


def test_the_launcher_dummy_leaves_no_trace_either(tmp_path, capsys):
    assert sweep.main(words(tmp_path, "--command_launcher", "dummy")) == 0
    assert capsys.readouterr().out.count("-m domainbed_ext.train") == 4
    assert list(tmp_path.iterdir()) == []


def test_pairs_can_be_asked_for_over_the_definition(tmp_path):
    definition = write(tmp_path, "{datasets: [PACS], algorithms: [BA], output_dir: o, single_test_envs: true}")
    words = ["launch", "--sweep", str(definition), "--n_hparams", "1", "--n_trials", "1"]
    assert len(sweep_jobs.make_jobs(parse(words))) == 4
    assert len(sweep_jobs.make_jobs(parse([*words, "--pairs"]))) == 10
    definition.write_text("{datasets: [PACS], algorithms: [BA], output_dir: o, pairs: true}")
    assert len(sweep_jobs.make_jobs(parse(words))) == 10
    assert len(sweep_jobs.make_jobs(parse([*words, "--single_test_envs"]))) == 4


def test_arguments_override_the_definition(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"datasets": "PACS", "algorithms": ["LP"], "steps": 10, "n_trials": 2,
                                    "output_dir": "o", "hparams": {"lr": 0.1}}))  # fmt: skip
    args = parse(["launch", "--sweep", str(path), "--steps", "20"])
    assert (args.datasets, args.steps, args.n_trials, json.loads(args.hparams)) == (("PACS",), 20, 2, {"lr": 0.1})


def test_a_definition_may_hold_a_launchers_options(tmp_path):
    path = write(
        tmp_path,
        "{datasets: [PACS], algorithms: [BA], output_dir: launch, command_launcher: slurm, jobs_per_gpu: 2, "
        "launcher_options: {partition: gpu, time: '4:00:00'}, save_minutes: 2}",
    )
    args = parse(["launch", "--sweep", str(path)])
    assert args.launcher_options == {"partition": "gpu", "time": "4:00:00", "jobs_per_gpu": 2}
    assert (args.command, str(args.output_dir), args.save_minutes) == ("launch", "launch", 2.0)
    args = parse(["--output_dir", "status", "--launcher_options", "{}", "status", "--sweep", str(path)])
    assert (args.command, str(args.output_dir), args.launcher_options) == ("status", "status", {"jobs_per_gpu": 2})


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--launcher_options", "{partition: gpu}"], "--launcher_options is not JSON"),
        (["--launcher_options", "3"], "--launcher_options is not a JSON object but 3"),
        (["--jobs_per_gpu", "0"], "--jobs_per_gpu: 0 is too small, give 1 or more"),
        (["--jobs", "-1"], "--jobs: -1 is too small, give 0 or more"),
    ],
)
def test_malformed_launching_gets_a_sentence(tmp_path, more, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        parse(words(tmp_path, *more))


def help_of(*words):
    with contextlib.redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit) as ended:
        parse([*words, "--help"])
    assert ended.value.code == 0
    return text.getvalue()


def examples(text):
    """The commands in a help text, as words."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[3:] for line in lines if line.startswith(f"  {PROGRAM} ")]


def options_in(text):
    return set(re.findall(r"^  (--\w+)", text, flags=re.MULTILINE))


def test_help_lists_the_commands_with_an_example_each():
    text = help_of()
    assert not options_in(text)
    for command in COMMANDS:
        assert re.search(rf"^  {command} +[a-z]", text, flags=re.MULTILINE)
    assert [words[0] for words in examples(text)] == list(NAMES)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_lists_what_it_uses_and_its_examples_are_understood(command):
    text = help_of(command)
    shown = options_in(text)
    assert {"--sweep", "--datasets", "--output_dir", "--protocol", "--backbone"} <= shown
    assert ("--watch" in shown) == (command == "status")
    assert ("--dry_run" in shown) == (command != "status")
    assert ("--jobs" in shown) == ("--save_minutes" in shown) == (command in ("launch", "retry", "validate"))
    assert ("runs_per_worker" in text) == (command in ("launch", "validate"))
    assert examples(text)
    for example in examples(text):
        assert make_parser().parse_args(example).command == command == example[0]


def test_help_of_launch_names_the_launchers():
    text = help_of("launch")
    assert all(name in text for name in launchers.LAUNCHERS) and launchers.GROUP in text


@pytest.mark.parametrize(("word", "command"), [("lunch", "launch"), ("stop", "cancel"), ("resume", "launch")])
def test_a_command_of_another_name_is_suggested(word, command):
    with pytest.raises(BenchmarkError, match=f"'{word}': did you mean '{command}'"):
        parse([word])


@pytest.mark.parametrize("option", ["--watch", "--json"])
def test_what_only_status_does_is_refused_elsewhere(tmp_path, option):
    assert parse(words(tmp_path, option, command="status"))
    with pytest.raises(BenchmarkError, match=f"{option} is an option of `status`, not of `launch`"):
        parse(words(tmp_path, option))


def test_no_argument_is_the_quickstart():
    args = parse(["launch"])
    assert args.datasets == ("DigitsShift",) and set(args.algorithms) == {"BA", "BOnly", "AOnly", "LP", "FullFT"}
    assert parse(["launch", "--steps", "7"]).steps == 7


@pytest.mark.parametrize("path", sorted(resources.sweeps().glob("*.yaml")), ids=lambda path: path.name)
def test_every_packaged_sweep_is_whole_and_opens_with_its_command(path):
    args = parse(["launch", "--sweep", path.name, "--data_dir", "d"])
    assert sweep_jobs.make_jobs(args)
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
        ("- PACS", "is not a list of `option: value` lines"),
        ("dataset: PACS", "unknown option in .*'dataset': did you mean 'datasets'"),
        ("datasets: [PACS]", "--algorithms is missing"),
        ("{datasets: [PACS], algorithms: [BA]}", "--output_dir is missing"),
        (
            "{datasets: [PACS], algorithms: [BA], output_dir: o, n_hparams: 0}",
            "--n_hparams: 0 is too small, give 1 or more",
        ),
        ("{datasets: [PACS], algorithms: [BA], output_dir: o, n_hparams_from: 20}", "this sweep has no run"),
        (
            "steps: many",
            "argument --steps: 'many' is not a whole number; see python -m domainbed_ext.sweep launch --help",
        ),
        ("n_trials: 2.5", "argument --n_trials: '2.5' is not a whole number"),
    ],
)
def test_a_malformed_definition_gets_a_sentence(tmp_path, text, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        parse(["launch", "--sweep", str(write(tmp_path, text))])


def test_an_unknown_definition_lists_the_packaged_ones():
    with pytest.raises(BenchmarkError, match=r"no sweep definition nothing: .*quickstart.yaml"):
        parse(["launch", "--sweep", "nothing"])


@pytest.mark.parametrize(
    ("more", "sentence"),
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
        (["--algorithms", "BOnly@rank=999"], "rank 999 is larger than the layer's width"),
        (["--protocol", "single_sauce"], "argument --protocol: invalid choice: 'single_sauce'"),
        (["--source_envs", "plain"], "--source_envs is an option of --protocol single_source: add that"),
        (["--protocol", "single_source", "--source_envs", "plian"], "did you mean 'plain'?"),
        (["--pairs", "--evaluate", "lean"], "--evaluate lean leaves out what leave-one-domain-out"),
        (["--command_launcher", "locale"], "unknown launcher 'locale': did you mean 'local'?"),
    ],
)
def test_bad_input_is_told_before_anything_runs(tmp_path, more, sentence):
    with pytest.raises(BenchmarkError) as error:
        sweep.main(words(tmp_path, *more))
    assert sentence in str(error.value)
    assert not (tmp_path / "sweep").exists()


def test_mistakes_in_the_arguments_are_found_without_loading_torch(tmp_path):
    definition = write(tmp_path, "steps: many")
    lines = [
        *("launch --n_trials x", "launch --stepz 3", "lunch", "launch --algorithms LoRB", "status --datasets PCAS"),
        *(f"validate --sweep {definition}", "launch --sweep nothing", "launch --launcher_options 3", "retry --watch"),
    ]
    code = (
        "import shlex, sys\n"
        "from domainbed_ext.errors import BenchmarkError\n"
        "from domainbed_ext.sweep.command import main\n"
        "for line in sys.argv[1:]:\n"
        "    try:\n"
        "        main(shlex.split(line))\n"
        "    except BenchmarkError:\n"
        "        if 'torch' in sys.modules:\n"
        "            sys.exit(f'{line} loads torch')\n"
        "    else:\n"
        "        sys.exit(f'{line} is no mistake')\n"
    )
    process = subprocess.run([sys.executable, "-c", code, *lines], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")


def test_an_unwritable_output_dir_gets_a_sentence(tmp_path):
    (tmp_path / "sweep").write_text("a file")
    with pytest.raises(BenchmarkError, match="cannot write to .* give another --output_dir"):
        sweep.main(words(tmp_path))


def test_the_command_line_prints_one_line_and_exits_with_2(tmp_path):
    argv = [sys.executable, "-m", "domainbed_ext.sweep", *words(tmp_path, algorithms=["BOnyl"])]
    process = subprocess.run(argv, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert process.returncode == 2
    assert process.stderr == "error: unknown algorithm 'BOnyl': did you mean 'BOnly'?\n"


def test_the_reference_is_one_of_the_methods():
    words = ["launch", "--datasets", "DigitsShift", "--algorithms", "BOnly", "LP", "--output_dir", "o", "--reference"]
    assert parse([*words, "lora-fa"]).reference == "BOnly"
    assert parse(words[:-1]).reference is None
    # Tables are made when all runs are done, which is late for an error.
    with pytest.raises(BenchmarkError, match="--reference BA is not among the methods: choose one of BOnly, LP"):
        parse([*words, "BA"])


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--sweep pacs_vit_tiny --data_dir D --n_trials 2",
        "--datasets PACS --algorithms BA LoRA-FA@r=4 --output_dir NO --hparams lr=1e-3 --data_dir D --pairs",
        "--protocol single_source --datasets PACS --source_envs 30 --algorithms LP --output_dir o --data_dir D",
    ],
)
def test_the_printed_options_are_the_same_sweep(tmp_path, capsys, words):
    args = parse(["launch", *words.split()])
    assert sweep.main(["launch", *words.split(), "--print_config"]) == 0
    path = write(tmp_path, printed := capsys.readouterr().out)
    again = parse(["launch", "--sweep", str(path)])
    assert dataclasses.replace(again, words=args.words) == args
    assert sweep.main(["launch", "--sweep", str(path), "--print_config"]) == 0
    assert capsys.readouterr().out == printed
    assert list(tmp_path.iterdir()) == [path]


def test_printing_checks_the_options(capsys):
    with pytest.raises(BenchmarkError, match="--output_dir is missing"):
        sweep.main(["launch", "--datasets", "PACS", "--algorithms", "BA", "--print_config"])
