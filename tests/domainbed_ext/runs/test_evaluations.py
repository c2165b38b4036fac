"""When a run is evaluated, when it ends early, and what its records say of its training environments."""

import numpy as np
import pytest
import torch.nn.functional as F

from domainbed_ext import train
from domainbed_ext.algorithms.base import Algorithm
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs import setup as run_setup
from domainbed_ext.runs.arguments import RunArguments, parse
from domainbed_ext.runs.feed import Feed
from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.runs.identity import Computations, name
from domainbed_ext.sweep.arguments import parse as parse_sweep
from domainbed_ext.system import interrupts
from domainbed_ext.system.exit_codes import ExitCode

IN, OUT = "env{}_in_acc", "env{}_out_acc"


@pytest.mark.parametrize(
    ("given", "evaluated"),
    [
        ({"evaluations": 1}, [9]),
        ({"evaluations": 2}, [4, 9]),
        ({"evaluations": 4}, [1, 4, 7, 9]),
        ({"evaluations": 10}, list(range(10))),
        ({"checkpoint_freq": 0}, [9]),
        ({"checkpoint_freq": 4}, [0, 4, 8, 9]),
        ({"checkpoint_freq": 3}, [0, 3, 6, 9]),
    ],
)
def test_evaluations_are_evenly_spaced_and_end_with_the_last_step(make_args, given, evaluated):
    setup = run_setup.set_up(make_args(**{"steps": 10, "checkpoint_freq": None, **given}))
    assert setup.evaluated_steps == evaluated == [step for step in range(10) if setup.is_evaluated(step)]
    assert [setup.count_evaluations(step) for step in (0, 9, 10)] == [len(evaluated), 1, 0]


def test_a_run_with_a_budget_has_that_many_records(make_args, few_evaluated):
    args = make_args(steps=7, checkpoint_freq=None, evaluations=3)
    assert train.run(train.skip_first_evaluation(args)) == 0
    records = RunFolder(args.output_dir).records()
    assert [record["step"] for record in records] == [1, 4, 6]
    assert records[0]["args"]["evaluations"] == 3 and records[0]["args"]["early_stopping"] is None


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"evaluations": 4}, "--evaluations 4 is more than the run's 3 steps"),
        (
            {"early_stopping": 2, "algorithm": "BOnly@average=swad", "steps": 9, "checkpoint_freq": 1},
            "--early_stopping follows the validation accuracy, which average=swad measures at the last step alone",
        ),
    ],
)
def test_what_cannot_be_is_refused(make_args, overrides, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        run_setup.set_up(make_args(**overrides))


def test_the_command_line_replaces_the_frequency_of_a_file(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text("checkpoint_freq: 5\n")
    args = parse(["--config", str(path), "--evaluations", "3"])
    assert (args.checkpoint_freq, args.evaluations) == (None, 3)
    sweep = parse_sweep(["launch", "--sweep", "pacs_vit_tiny", "--evaluations", "3"])  # its file has a frequency
    assert (sweep.checkpoint_freq, sweep.evaluations) == (None, 3)
    path.write_text("checkpoint_freq: 5\nevaluations: 3\n")
    for words in (["--config", str(path)], ["--checkpoint_freq", "5", "--evaluations", "3"]):
        with pytest.raises(BenchmarkError, match="--checkpoint_freq 5 and --evaluations 3 both say when to evaluate"):
            parse(words)


def test_they_are_part_of_a_runs_identity_only_if_given():
    computations = Computations()
    default = computations.of(RunArguments())
    names = [name(computations.of(RunArguments(**{each: 3}))) for each in ("evaluations", "early_stopping")]
    assert len({*names, name(default)}) == 3
    without = {key: value for key, value in default["args"].items() if key not in ("evaluations", "early_stopping")}
    assert name({**default, "args": without}) == name(default)


@pytest.fixture
def validation(monkeypatch):
    """Replaces the validation accuracies of a run, one after another."""

    def to(*values):
        queue, measure = list(values), Feed.accuracies

        def accuracies(feed, step, names, logits=None):
            measured = measure(feed, step, names, logits)
            if set(names) == set(feed.setup.validation_splits):
                value = queue[feed.setup.evaluated_steps.index(step)]
                measured = dict.fromkeys(measured, value)
            return measured

        monkeypatch.setattr(Feed, "accuracies", accuracies)

    return to


SHORT = {"steps": 8, "checkpoint_freq": 1}


def test_a_run_stops_after_evaluations_without_improvement(make_args, few_evaluated, validation, capsys):
    validation(0.1, 0.3, 0.2, 0.3, 0.9, 0.9, 0.9, 0.9)
    assert train.run(make_args(**SHORT, early_stopping=2)) == 0
    folder = RunFolder(make_args().output_dir)
    records = folder.records()
    assert [record["step"] for record in records] == [0, 1, 2, 3] and folder.state is State.DONE
    assert [record.get("stopped_early") for record in records] == [None, None, None, True]
    for record in (records[1], records[3]):  # the selected step and the last one are evaluated on all splits
        assert {IN.format(0), OUT.format(0), IN.format(3)} <= record.keys()
    assert IN.format(0) not in records[2]
    assert (folder.path / "selected").is_dir() and (folder.path / "last").is_dir()
    said = capsys.readouterr().out
    assert "no better validation accuracy in 2 evaluations: the remaining 4 steps are left out" in said


def test_a_run_that_improves_does_not_stop(make_args, few_evaluated, validation):
    validation(0.1, 0.1, 0.3, 0.2, 0.4, 0.4, 0.5, 0.5)
    assert train.run(make_args(**SHORT, early_stopping=2)) == 0
    records = RunFolder(make_args().output_dir).records()
    assert [record["step"] for record in records] == list(range(8)) and "stopped_early" not in records[-1]


@pytest.mark.parametrize("stopped_at", [0, 2, 3])
def test_a_resumed_run_stops_at_the_same_step(make_args, few_evaluated, validation, monkeypatch, tmp_path, stopped_at):
    validation(0.1, 0.3, 0.2, 0.3, 0.9, 0.9, 0.9, 0.9)
    args = {**SHORT, "early_stopping": 2}
    assert train.run(make_args(**args, output_dir=str(tmp_path / "whole"))) == 0
    measure = Feed.accuracies

    def interrupt(feed, step, names, logits=None):
        if step == stopped_at:
            raise interrupts.Interrupted("by the test")
        return measure(feed, step, names, logits)

    with monkeypatch.context() as patch:
        patch.setattr(Feed, "accuracies", interrupt)
        assert train.run(make_args(**args)) == ExitCode.INTERRUPTED
    assert train.run(make_args(**args)) == 0
    records = [RunFolder(folder).records() for folder in (tmp_path / "whole", make_args().output_dir)]
    differing = ("args", "step_time", "run")
    whole, resumed = ([{k: v for k, v in r.items() if k not in differing} for r in each] for each in records)
    assert whole == resumed and len(whole) == 4


@pytest.mark.parametrize("algorithm", ["BOnly", "BOnly+SAM", "LP", "FullFT+CORAL@label_smoothing=0.1", "BOnly+RSC"])
def test_records_have_the_loss_of_each_training_environment(make_args, few_evaluated, algorithm):
    hparams = '{"batch_size": 4, "accumulate": 2}'
    assert train.run(make_args(steps=2, algorithm=algorithm, test_envs=[1], hparams=hparams)) == 0
    (record,) = RunFolder(make_args().output_dir).records()
    losses = [record[f"env{i}_loss"] for i in (0, 2, 3)]
    assert "env1_loss" not in record and all(loss > 0 for loss in losses) and len(set(losses)) == 3
    if algorithm != "BOnly+RSC":  # whose loss is of the challenged features
        assert np.mean(losses) == pytest.approx(record.get("nll", record["loss"]), rel=1e-5)


def test_the_loss_of_an_environment_is_that_of_its_images(make_args):
    setup = run_setup.set_up(make_args(hparams='{"batch_size": 4}', algorithm="LP"))
    algorithm = setup.make_algorithm()
    batches = next(Feed(setup, algorithm).training(range(1)))
    expected = [F.cross_entropy(algorithm.predict(x), y).item() for x, y in batches]
    algorithm.update(batches)
    assert algorithm.domain_losses == pytest.approx(expected, rel=0.02)  # batches of other sizes round otherwise


def test_without_logits_of_the_images_there_is_no_loss_of_an_environment(make_args, few_evaluated, registries):
    assert train.run(make_args(steps=1, algorithm="BOnly+Mixup", output_dir=make_args().output_dir + "_mixup")) == 0
    (record,) = RunFolder(make_args().output_dir + "_mixup").records()
    assert "loss" in record and not [key for key in record if key.endswith("_loss")]

    from domainbed_ext.algorithms.lora import BOnly
    from domainbed_ext.algorithms.registry import register_algorithm

    @register_algorithm("Still")
    class Still(BOnly):
        def update(self, minibatches, unlabeled=None):
            return {"loss": 1.0}

    assert issubclass(Still, Algorithm)
    assert train.run(make_args(steps=1, algorithm="Still")) == 0
    (record,) = RunFolder(make_args().output_dir).records()
    assert record["loss"] == 1.0 and not [key for key in record if key.endswith("_loss")]
