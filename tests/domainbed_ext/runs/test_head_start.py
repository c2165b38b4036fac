"""Runs whose head starts at the linear probe."""

import json

import pytest
import torch
from safetensors.torch import load_file

from domainbed_ext import evaluate, train
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs import features as run_features
from domainbed_ext.runs import feed as run_feed
from domainbed_ext.runs.feed import Feed
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.runs.head_start import restore_start
from domainbed_ext.runs.setup import set_up

HPARAMS = json.dumps({"head_start": "probe", "batch_size": 4, "lr": 1e-3})


class Killed(BaseException):
    """What a kill is to a run: nothing handles it."""


def reloaded(args):
    """The feed of a finished run's algorithm, with what it trained."""
    setup = set_up(args)
    feed = Feed(setup, setup.make_algorithm())
    restore_start(feed.algorithm, RunFolder(args.output_dir))
    feed.algorithm.load(RunFolder(args.output_dir).path / "selected")
    return feed


@pytest.mark.usefixtures("few_evaluated")
@pytest.mark.parametrize("name", ["BA", "BOnly", "AOnly", "FullFT", "LP", "FullFT+CORAL"])
def test_strength_0_of_a_finished_run_is_the_probe(name, make_args, tmp_path):
    args = make_args(algorithm=name, hparams=HPARAMS, steps=2)
    assert train.run(args) == 0
    feed, folder = reloaded(args), RunFolder(args.output_dir)
    trained = feed.sample_outputs()
    lp = reloaded_probe(make_args, load_file(folder.path / "start.safetensors"))
    feed.algorithm.set_strength(0)
    torch.testing.assert_close(feed.sample_outputs(), lp.sample_outputs())  # matmuls may round by memory alignment
    feed.algorithm.set_strength(1)
    assert torch.equal(feed.sample_outputs(), trained) and not torch.equal(trained, lp.sample_outputs())
    record, reproduced = evaluate.evaluate(folder)
    assert evaluate.describe_difference(record, reproduced) == ""
    assert 0.2 < record["probe_accuracy"] < 1


@pytest.mark.usefixtures("few_evaluated")
def test_a_conversion_of_weights_is_reported_once(make_args, capfd):
    hparams = json.dumps({**json.loads(HPARAMS), "image_size": 24})
    args = make_args(algorithm="BOnly", hparams=hparams, steps=1)
    assert train.run(args) == 0
    assert capfd.readouterr().err.count("resampled by timm: pos_embed") == 1
    evaluate.evaluate(RunFolder(args.output_dir))  # nor by what reloads the run
    assert "resampled" not in capfd.readouterr().err


def reloaded_probe(make_args, head):
    """The feed of a linear probe on the images, so that it computes as methods do that have no features."""
    setup = set_up(make_args(algorithm="LP", hparams='{"batch_size": 4}'))
    algorithm = setup.make_algorithm()
    algorithm.backbone.head.load_state_dict(head)
    feed = Feed(setup, algorithm)
    feed._plain = feed._pixels
    return feed


def test_the_first_record_and_the_log_have_the_probes_validation_accuracy(make_args, capsys):
    args = make_args(algorithm="BOnly", hparams=HPARAMS, checkpoint_freq=1, steps=2, train_eval_share=0.1)
    train.run(args)
    first, last = RunFolder(args.output_dir).records()
    assert "probe_accuracy" not in last
    assert (
        f"starts at the linear probe: validation accuracy {first['probe_accuracy']:.3f}, L2" in capsys.readouterr().out
    )
    feed = reloaded(args)
    feed.algorithm.set_strength(0)
    accuracies = feed.accuracies(0, feed.setup.validation_splits)
    assert sum(accuracies.values()) / len(accuracies) == pytest.approx(first["probe_accuracy"], abs=2e-3)


@pytest.mark.usefixtures("few_evaluated")
def test_a_killed_run_resumes_to_the_same(make_args, tmp_path):
    def run(folder, progress=lambda share: None):
        args = make_args(algorithm="BA", hparams=HPARAMS, steps=6, save_steps=2, output_dir=str(tmp_path / folder))
        train.run(args, progress)
        path = RunFolder(args.output_dir).path
        return [load_file(path / name) for name in ("start.safetensors", "selected/adapter.safetensors")]

    def kill(share):
        if share >= 0.5:
            raise Killed

    expected = run("whole")
    with pytest.raises(Killed):
        run("killed", kill)
    resumed = run("killed")
    assert "resumes after 2 of 6 steps" in (tmp_path / "killed" / "out.txt").read_text()
    for one, other in zip(expected, resumed, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.usefixtures("few_evaluated")
def test_a_run_without_its_start_is_refused(make_args):
    args = make_args(algorithm="BOnly", hparams=HPARAMS, steps=1)
    train.run(args)
    (RunFolder(args.output_dir).path / "start.safetensors").unlink()
    with pytest.raises(
        BenchmarkError, match=r"cannot read .* started at from .*start.safetensors \(.*\): run it again"
    ):
        reloaded(args)


@pytest.mark.usefixtures("few_evaluated")
def test_other_starts_leave_no_file_and_an_earlier_one_is_deleted(make_args):
    args = make_args(algorithm="BOnly", hparams='{"batch_size": 4}', steps=1)
    folder = RunFolder(args.output_dir)
    folder.path.mkdir()
    (folder.path / "start.safetensors").touch()
    train.run(args)
    assert not (folder.path / "start.safetensors").exists()
    assert "probe_accuracy" not in folder.records()[0]


def test_runs_share_cached_features(make_args, pacs_like, tmp_path, monkeypatch):
    computed = []

    def compute(*args, **kwargs):
        computed.append(args[1])
        return whole(*args, **kwargs)

    whole = run_features.compute
    monkeypatch.setattr(run_features, "compute", compute)
    monkeypatch.setattr(run_feed, "compute", compute)
    for number, (name, cache) in enumerate(
        [("BOnly", "cache"), ("FullFT+CORAL", "cache"), ("LP", "cache"), ("BOnly", "none")]
    ):
        args = make_args(
            algorithm=name,
            dataset="PACS",
            data_dir=str(pacs_like),
            backbone="test_vit",
            weights="none",
            hparams=json.dumps({"head_start": "probe", "batch_size": 4, "image_size": 48}),
            cache_dir=str(tmp_path / cache) if cache != "none" else "none",
            output_dir=str(tmp_path / str(number)),
            trial_seed=number if number < 3 else 0,
            seed=0,
            steps=1,
            evaluate="lean",
        )
        assert train.run(args) == 0
        if number < 2:
            assert len(computed) == 3  # the training environments, once for all runs and trials
    assert len(computed) == 3 + 1 + 3  # the probe's test environment, and the training ones of the run without a cache
    starts = [load_file(tmp_path / number / "start.safetensors")["weight"] for number in "03"]
    torch.testing.assert_close(*starts, rtol=1e-3, atol=1e-5)
