"""What a run keeps of its predictions: the file, its rounding, and its errors."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from domainbed_ext import train
from domainbed_ext.algorithms.lora import BOnly
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs import feed, identity, setup, training
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.runs.predictions import (
    Part,
    Predictions,
    are_right,
    find_predictions,
    load_predictions,
    rounded,
    save_predictions,
)
from domainbed_ext.system.exit_codes import ExitCode
from domainbed_ext.system.interrupts import Interrupted


def make_part(names=("dog/a.png", "dog/ü\udcff.png", "house/b.png"), is_uda=None, seed=0):
    logits = torch.randn(len(names), 2, generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor([0, 0, 1])
    return Part(tuple(names), logits.half().float(), labels, torch.tensor([True, False, False]), is_uda)


def make_predictions(selection="best", step=7, **more):
    return Predictions(step, selection, {"A": make_part(**more), "C": make_part(seed=1)}, ("dog", "house"))


def are_same(one, other):
    assert (one.step, one.selection, one.classes, list(one.parts)) == (
        *(other.step, other.selection, other.classes),
        list(other.parts),
    )
    for label, part in one.parts.items():
        there = other.parts[label]
        assert part.names == there.names
        for name in ("logits", "labels", "is_held_out"):
            mine, theirs = getattr(part, name), getattr(there, name)
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    return True


def test_a_file_has_everything_of_the_images(tmp_path):
    written = make_predictions()
    save_predictions(tmp_path, written)
    assert are_same(load_predictions(tmp_path), written)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions_selected.safetensors"]


def test_the_last_step_has_a_file_of_its_own_only_where_another_is_selected(tmp_path):
    save_predictions(tmp_path, make_predictions())
    assert load_predictions(tmp_path, "last").step == 7
    save_predictions(tmp_path, make_predictions("last", step=9))
    assert load_predictions(tmp_path, "last").step == 9
    assert load_predictions(tmp_path).step == 7


def test_accuracies_are_those_of_each_split(tmp_path):
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [math.nan, 1.0]])
    labels, held_out = torch.tensor([0, 0, 1, 1]), torch.tensor([True, False, False, False])
    is_uda = torch.tensor([False, False, False, True])
    part = Part(("a", "b", "c", "d"), logits, labels, held_out, is_uda)
    save_predictions(tmp_path, Predictions(0, "best", {"A": part}, ("x", "y")))
    accuracies = load_predictions(tmp_path).accuracies()
    assert math.isnan(accuracies.pop("env0_uda_acc"))
    assert accuracies == {"env0_out_acc": 1.0, "env0_in_acc": 0.5}


@pytest.mark.parametrize(
    "row", [[1.0, 1.0001], [-1.0, -0.9999], [0.0, 1e-9], [-1e-9, 0.0], [7e4, 8e4], [-8e4, -7e4], [3.0, 1.0, 3.0001]]
)
def test_rounding_keeps_the_predicted_class(row):
    logits = torch.tensor([row])
    assert logits.half().argmax() != logits.argmax()  # without care it does not
    assert rounded(logits).argmax() == logits.argmax()
    assert rounded(logits).isfinite().all()
    assert logits.tolist() == torch.tensor([row]).tolist()


def test_rounding_keeps_what_is_not_finite():
    logits = torch.tensor([[math.inf, 1.0], [math.nan, 1.0], [-math.inf, 1.0]])
    torch.testing.assert_close(rounded(logits), logits.half(), rtol=0, atol=0, equal_nan=True)
    right = are_right(rounded(logits).float(), torch.tensor([0, 0, 1]))
    assert right[:2].isnan().all() and right[2] == 1


def test_a_run_without_predictions_names_the_command_that_adds_them(tmp_path):
    with pytest.raises(BenchmarkError, match=r"keeps no predictions: add them with .*evaluate --run .* --predictions"):
        load_predictions(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "predictions_selected.safetensors").write_bytes(content)
    with pytest.raises(BenchmarkError, match=r"predictions_selected.safetensors cannot be read .* --predictions"):
        load_predictions(tmp_path)


@pytest.mark.parametrize("name", ["logits", "labels", "splits", "names"])
def test_a_file_of_which_a_part_is_shorter_is_named(tmp_path, name):
    save_predictions(tmp_path, make_predictions())
    path = find_predictions(RunFolder(tmp_path))
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors[f"env0.{name}"] = tensors["env1.names" if name == "names" else f"env0.{name}"][:-1].clone()
    save_file(tensors, path, metadata)
    with pytest.raises(BenchmarkError, match=r"predictions_selected.safetensors cannot be read .* --predictions"):
        load_predictions(tmp_path)


def first_is_best(monkeypatch):
    """The first step is selected, so that the last has predictions of its own."""
    monkeypatch.setattr(training, "better", lambda val_acc, than: than is None)
    monkeypatch.setattr(training, "best_step", lambda records: records[0])


def accuracies_of(record):
    return {name: value for name, value in record.items() if name.endswith("_acc")}


@pytest.mark.parametrize(
    "options",
    [
        {"evaluate": "lean", "uda_holdout_fraction": 0.3},
        {"evaluate": "all", "algorithm": "LP", "precision": "bf16"},
        {"protocol": "single_source", "source_envs": ["plain"], "test_on": "all"},
    ],
)
def test_records_accuracies_follow_from_the_predictions_to_the_digit(make_args, monkeypatch, options):
    first_is_best(monkeypatch)
    args = make_args(checkpoint_freq=1, **options)
    assert train.run(args) == 0
    records = RunFolder(args.output_dir).records()
    for step, record in (("best", records[0]), ("last", records[-1])):
        predictions = load_predictions(args.output_dir, step)
        assert predictions.step == record["step"]
        assert predictions.accuracies() == accuracies_of(record) and len(predictions.accuracies()) >= 8
    shown = setup.set_up(args)
    assert predictions.classes == tuple("0123456789")
    assert list(predictions.parts) == records[0]["environments"]
    for env, part in enumerate(predictions.parts.values()):
        images = {name: shown.evaluated(f"env{env}_{name}").keys for name in ("in", "out")}
        for split, keys in images.items():
            assert {part.names[i] for i in part.of_split(split).nonzero()[:, 0]} == {str(key) for key in keys}
        assert list(part.names) == sorted(part.names, key=int)
        assert part.labels.tolist() == [shown.dataset[env].targets[int(name)] for name in part.names]


def test_predictions_can_be_left_out(make_args):
    args = make_args(skip_predictions=True, steps=1)
    assert train.run(args) == 0
    assert not list(Path(args.output_dir).glob("predictions*"))
    with pytest.raises(BenchmarkError, match="keeps no predictions"):
        load_predictions(args.output_dir)


def test_the_option_changes_neither_records_nor_identity(make_args, tmp_path):
    records, names = [], []
    for skip in (False, True):
        args = make_args(skip_predictions=skip, steps=2, checkpoint_freq=1, output_dir=str(tmp_path / str(skip)))
        assert train.run(args) == 0
        assert (
            train.run(make_args(skip_predictions=not skip, steps=2, checkpoint_freq=1, output_dir=args.output_dir)) == 0
        )
        records.append([accuracies_of(record) for record in RunFolder(args.output_dir).records()])
        names.append(identity.name(identity.Computations().of(args)))
    assert records[0] == records[1] and names[0] == names[1]


def test_images_have_the_names_of_their_files(make_args, pacs_like):
    args = make_args(
        dataset="PACS",
        data_dir=str(pacs_like),
        **{"backbone": "test_vit", "weights": "none", "hparams": '{"batch_size": 4, "image_size": 48}', "steps": 1},
        train_eval_share=0.5,
    )
    assert train.run(args) == 0
    predictions = load_predictions(args.output_dir)
    assert list(predictions.parts) == ["A", "C", "P", "S"] and predictions.classes == ("dog", "house")
    assert predictions.parts["A"].names == tuple(f"{c}/pic_{i:03d}.png" for c in ("dog", "house") for i in range(10))
    assert [len(part) for part in predictions.parts.values()] == [20, 12, 12, 12]
    assert predictions.accuracies() == accuracies_of(RunFolder(args.output_dir).records()[-1])


@pytest.mark.parametrize("at", [1, 3], ids=["before the best step is completed", "after"])
def test_a_run_that_was_interrupted_keeps_the_same(make_args, tmp_path, monkeypatch, at):
    """The second evaluation is of the last step's validation splits; the third completes the first step; then comes
    the rest of the last step."""
    first_is_best(monkeypatch)
    options = {"steps": 2, "checkpoint_freq": 1, "train_eval_share": 0.1}
    whole = make_args(**options, output_dir=str(tmp_path / "whole"))
    assert train.run(whole) == 0
    interrupted = make_args(**options, output_dir=str(tmp_path / "interrupted"))
    accuracies, calls = feed.Feed.accuracies, []

    def stop(self, step, names, *logits):
        calls.append(list(names))
        if len(calls) == at + 1:
            raise Interrupted
        return accuracies(self, step, names, *logits)

    monkeypatch.setattr(feed.Feed, "accuracies", stop)
    assert train.run(interrupted) == ExitCode.INTERRUPTED
    monkeypatch.setattr(feed.Feed, "accuracies", accuracies)
    assert train.run(interrupted) == 0
    for name in ("predictions_selected.safetensors", "predictions_last.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "interrupted" / name).read_bytes()


def test_a_checkpoint_without_logits_leaves_them_out_in_a_sentence(make_args, monkeypatch, capsys):
    """As of earlier versions: the records are complete, and a command adds what is missing."""
    first_is_best(monkeypatch)
    args = make_args(steps=2, checkpoint_freq=1, skip_predictions=True)
    update, stops = BOnly.update, iter([False, True, False])

    def stop(self, *words):
        if next(stops):
            raise Interrupted
        return update(self, *words)

    monkeypatch.setattr(BOnly, "update", stop)
    assert train.run(args) == ExitCode.INTERRUPTED
    assert train.run(replace(args, skip_predictions=False)) == 0
    assert "warning: no predictions of step 0" in capsys.readouterr().err
    assert find_predictions(RunFolder(args.output_dir)) is None
    assert load_predictions(args.output_dir, "last").step == 1
