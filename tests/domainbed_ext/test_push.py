"""The trained adapter of a run, on its way to the hub; the upload itself is tested in tests/vitlorafa/test_hub.py."""

import re

import pytest

import vitlorafa
from domainbed_ext import push, train
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.runs.predictions import load_predictions


@pytest.fixture
def run(make_args, pacs_like, tmp_path):
    def make(algorithm):
        args = make_args(
            algorithm=algorithm,
            output_dir=str(tmp_path / "one"),
            dataset="PACS",
            data_dir=str(pacs_like),
            backbone="test_vit",
            weights="none",
            hparams='{"batch_size": 4, "image_size": 48}',
            steps=1,
        )
        assert train.run(args) == 0
        return RunFolder(args.output_dir)

    return make


def test_a_dry_run_prints_the_card_and_sends_nothing(run, capsys, monkeypatch):
    folder = run("BOnly")
    monkeypatch.setattr(vitlorafa, "push_to_hub", lambda *args, **kwargs: pytest.fail("something was sent"))
    capsys.readouterr()
    words = ["--run", str(folder.path), "--repo", "you/sketches", "--licence", "mit", "--dry_run"]
    assert push.main(words) == 0
    card = capsys.readouterr().out
    predictions = load_predictions(folder)
    test_env = folder.records()[-1]["args"]["test_envs"][0]
    for env, name in enumerate(predictions.parts):
        split, what = ("in", "held-out domain") if env == test_env else ("out", "training domain, held-out images")
        accuracy = 100 * predictions.accuracies()[f"env{env}_{split}_acc"]
        (row,) = re.findall(rf"\| accuracy on {name} \({what}\), % \| (\S+) \| (\S+) to (\S+) \|", card)
        value, low, high = map(float, row)
        assert value == pytest.approx(accuracy, abs=0.051)
        assert 0 <= low <= value <= high <= 100 and high - low > 10  # a few images say little
    assert "license: mit" in card and "| classes | dog, house |" in card and "| algorithm | BOnly |" in card


def test_the_adapter_its_head_and_the_card_are_uploaded(run, capsys, monkeypatch):
    folder, sent = run("BOnly"), {}

    def upload(model, repo, **options):
        sent.update(options, layers=len(list(vitlorafa.adapter_layers(model))), repo=repo)
        return "https://hub.example/you/sketches"

    monkeypatch.setattr(vitlorafa, "push_to_hub", upload)
    capsys.readouterr()
    assert push.main(["--run", str(folder.path), "--repo", "you/sketches", "--private"]) == 0
    assert capsys.readouterr().out == "https://hub.example/you/sketches\n"
    assert sent["repo"] == "you/sketches" and sent["layers"] and sent["head"] and sent["private"]
    assert sent["card"].dataset == "PACS" and sent["card"].held_out == "A"
    assert tuple(sent["class_names"]) == ("dog", "house")


def test_a_method_without_an_adapter_is_refused(run):
    folder = run("LP")
    with pytest.raises(BenchmarkError, match="LP trains no adapter: choose a run of BA, BOnly or AOnly"):
        push.main(["--run", str(folder.path), "--repo", "you/sketches"])
