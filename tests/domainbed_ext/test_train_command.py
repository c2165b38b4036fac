"""What `python -m domainbed_ext.train` does before a run starts: it checks its arguments, and leaves out what costs."""

import subprocess
import sys

import pytest

from domainbed_ext import train
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs.arguments import RunArguments, parse
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.sweep.arguments import parse as parse_sweep
from domainbed_ext.sweep.jobs import make_jobs

MISTAKES = [
    ("--stepps 3", "--stepps"),
    ("--steps many", "--steps: 'many' is not a whole number"),
    ("--steps 0", "--steps: 0 is too small"),
    ("--precision fp8", "--precision"),
    ("--algorithm Nothing", "unknown algorithm 'Nothing'"),
    ("--algorithm BOnly@rnk=2", "did you mean 'rank'?"),
    ("--algorithm LP@lr=-1", "lr -1 should be above 0"),
    ("--dataset Nothing", "unknown data set 'Nothing'"),
    ("--dataset PACS --data_dir gone", "PACS: no folder gone/PACS; --data_dir should hold PACS/<domain>/<class>"),
    ("--dataset PACS", "PACS needs its images: add --data_dir"),
    ("--dataset PACS --test_envs sketsch --data_dir gone", "--test_envs sketsch: PACS has no such environment"),
    ("--hparams {lr:1}", "--hparams"),
    ('--hparams {"lrr":1}', "'lrr'"),
    ('--hparams {"lr":"high"}', "hyperparameter lr in --hparams should be of type float"),
]


@pytest.mark.parametrize(("words", "sentence"), MISTAKES)
def test_mistakes_are_named_before_there_is_a_folder(words, sentence, tmp_path):
    with pytest.raises(BenchmarkError) as error:
        train.main([*words.split(), "--output_dir", str(tmp_path / "run")])
    assert sentence in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_mistakes_are_named_without_torch(tmp_path):
    check = (
        "import sys\n"
        "from domainbed_ext import train\n"
        "from domainbed_ext.errors import BenchmarkError\n"
        "for words in sys.argv[1:]:\n"
        "    try:\n"
        "        train.main(words.split())\n"
        "    except BenchmarkError:\n"
        "        if 'torch' in sys.modules:\n"
        "            sys.exit(f'torch for {words}')\n"
        "    else:\n"
        "        sys.exit(f'no error for {words}')\n"
    )
    words = [words for words, _ in MISTAKES]
    done = subprocess.run([sys.executable, "-c", check, *words], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_the_help_names_the_default_backbones(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    assert "vit_pico_patch8_32" in help_text and "vit_base_patch16_224.augreg_in21k" in help_text


@pytest.mark.parametrize(
    ("words", "freq"),
    [
        ("--steps 20", 0),  # DigitsShift evaluates every 100 steps
        ("--steps 100", 0),
        ("--steps 101", None),  # at steps 0 and 100, which is the last
        ("", None),
        ("--steps 1", None),
        ("--steps 20 --checkpoint_freq 10", 10),
        ("--steps 20 --evaluate_first_step", None),
        ("--steps 20 --protocol domainbed", None),
        ("--dataset PACS --steps 300", 0),
    ],
)
def test_a_short_run_is_evaluated_at_its_last_step_alone(words, freq, capsys):
    args = parse(words.split())
    skipped = train.skip_first_evaluation(args)
    assert skipped.checkpoint_freq == freq
    assert ("evaluated at its last step alone" in capsys.readouterr().out) == (skipped != args)


def test_a_smoke_test_has_one_record_that_says_so(tmp_path, capsys):
    words = ["--algorithm", "LP", "--steps", "2", "--skip_model_save", "--train_eval_share", "0.1", "--output_dir"]
    assert train.main([*words, str(tmp_path / "run")]) == 0
    records = RunFolder(tmp_path / "run").records()
    assert [(record["step"], record["args"]["checkpoint_freq"]) for record in records] == [(1, 0)]
    out = capsys.readouterr().out
    assert "--steps 2 is at most the 100 of --checkpoint_freq" in out
    assert "evaluates at the last step, 825 images in all" in out


def test_a_run_of_a_sweep_keeps_the_evaluation_of_its_first_step(tmp_path, capsys):
    words = "--datasets DigitsShift --algorithms LP --n_hparams 1 --n_trials 1 --single_test_envs --skip_model_save"
    words += " --train_eval_share 0.05 --output_dir"

    def first(*more):
        return make_jobs(parse_sweep(["launch", *words.split(), str(tmp_path), *more]))[0]

    job = first("--steps", "2")
    assert parse(job.argv).evaluate_first_step and "evaluate_first_step" not in job.computation["args"]
    assert train.main(job.argv) == 0
    assert [record["step"] for record in job.folder.records()] == [0, 1]
    # What says how often to evaluate needs no word for it, and leaves commands as they were.
    assert "--evaluate_first_step" not in first("--steps", "2", "--checkpoint_freq", "0").argv
    assert "--evaluate_first_step" not in first().argv


def test_a_launcher_changes_no_argument(tmp_path):
    """What it runs is `train.run`, which takes the arguments as they are."""
    args = RunArguments(algorithm="LP", steps=2, skip_model_save=True, train_eval_share=0.1, output_dir=str(tmp_path))
    assert train.run(args) == 0
    assert [record["step"] for record in RunFolder(tmp_path).records()] == [0, 1]
