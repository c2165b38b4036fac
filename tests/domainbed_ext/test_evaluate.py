"""What a run saved gives its recorded accuracies again."""

import json
import pickle
import shutil
import warnings

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from domainbed_ext import evaluate, frontier, soup, train
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs import predictions, saved, training
from domainbed_ext.runs import setup as run_setup
from domainbed_ext.runs.folder import RunFolder
from vitlorafa import AdapterWarning


@pytest.fixture
def run(make_args):
    """Makes a run of three steps, evaluated at each."""

    def make(**overrides):
        args = make_args(**{"checkpoint_freq": 1, "algorithm": "LP", **overrides})
        assert train.run(args, lambda share: None) == 0
        return RunFolder(args.output_dir)

    return make


def change(folder, **changes):
    lines = (folder.path / "results.jsonl").read_text().splitlines()
    records = [{**json.loads(line), **changes} for line in lines]
    (folder.path / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_best_step_of_an_adapter_is_reproduced(run, capsys, monkeypatch):
    folder = run(algorithm="BOnly", train_eval_share=0.5)

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    assert evaluate.main(["--run", str(folder.path)]) == 0
    assert "All 8 accuracies are as recorded." in capsys.readouterr().out


def test_best_last_and_every_saved_step_are_reproduced(run, monkeypatch):
    folder = run(
        hparams='{"lr": 0.01}',
        protocol="domainbed",  # evaluates on augmented images, of this step's draw
        save_model_every_checkpoint=True,
    )
    for step in ("best", "last", "0", "1", "2"):
        record, reproduced = evaluate.evaluate(folder, step)
        assert len(reproduced) == 8 and evaluate.describe_difference(record, reproduced) == ""
    assert len({tuple(r[f"env{i}_out_acc"] for i in range(4)) for r in folder.records()}) == 3


def test_the_last_step_is_saved_where_it_is_not_the_best(run, monkeypatch):
    monkeypatch.setattr(training, "better", lambda val_acc, than: than is None)
    folder = run(evaluate="lean", protocol="single_source", source_envs=["plain"])
    assert {path.name for path in folder.path.iterdir() if path.is_dir()} == {"selected", "last"}
    monkeypatch.setattr(saved, "best_step", lambda records: records[0])
    for step, size in (("best", 8), ("last", 8)):
        record, reproduced = evaluate.evaluate(folder, step)
        assert len(reproduced) == size and evaluate.describe_difference(record, reproduced) == ""
    with pytest.raises(
        BenchmarkError, match="--step 1: .* saved best, last, 0, 2: give .* with --save_model_every_checkpoint"
    ):
        evaluate.evaluate(folder, "1")
    with pytest.raises(BenchmarkError, match="--step 7: .* saved best, last, 0, 2: give one of these$"):
        evaluate.evaluate(folder, "7")


def test_a_difference_is_exit_code_1_and_one_sentence(run, capsys):
    folder = run(checkpoint_freq=0)
    change(folder, env1_out_acc=0.9875)
    assert evaluate.main(["--run", str(folder.path)]) == 1
    printed = capsys.readouterr()
    assert printed.err == "1 of 8 accuracies are not as recorded (the images or the weights are not the run's)\n"
    assert "0.987500" in printed.out and printed.out.count("differs") == 1
    change(folder, versions={"torch": "1.0"})
    evaluate.main(["--run", str(folder.path)])
    assert "it ran elsewhere: " in (sentence := capsys.readouterr().err) and "torch 1.0 then" in sentence


def test_data_that_has_moved(run, pacs_like, tmp_path):
    folder = run(
        dataset="PACS",
        data_dir=str(pacs_like),
        backbone="test_vit",
        weights="none",
        hparams='{"batch_size": 4, "image_size": 48}',
    )
    moved = tmp_path / "moved"
    pacs_like.rename(moved)
    with pytest.raises(BenchmarkError, match="no folder .*data/PACS"):
        evaluate.evaluate(folder)
    record, reproduced = evaluate.evaluate(folder, moved=saved.Moved(data_dir=str(moved)))
    assert evaluate.describe_difference(record, reproduced) == ""
    (moved / "PACS" / "photo" / "dog" / "pic_003.png").unlink()
    with pytest.raises(
        BenchmarkError, match=r"is of other data than those here \(environment P: names.*give --data_dir"
    ):
        evaluate.evaluate(folder, moved=saved.Moved(data_dir=str(moved)))
    change(folder, data_digest=None)  # as records were before they had one
    with pytest.raises(BenchmarkError, match=r"\(env2_out 4 then, 3 now\)"):
        evaluate.evaluate(folder, moved=saved.Moved(data_dir=str(moved)))


def test_a_source_file_that_has_changed_is_told(run, capsys, monkeypatch):
    monkeypatch.setattr(run_setup, "own_sources", lambda *_: {"Mine": "now"})
    folder = run(checkpoint_freq=0)
    evaluate.evaluate(folder)
    assert "source file" not in capsys.readouterr().err
    change(folder, sources={"Mine": "then"})
    evaluate.evaluate(folder)
    assert "warning: the source file of Mine has changed since the run\n" in capsys.readouterr().err


def test_weights_that_are_not_the_runs_are_refused(run, tmp_path):
    model = timm.create_model("test_vit")
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    folder = run(backbone="test_vit", weights=str(tmp_path / "weights.safetensors"), hparams='{"image_size": 48}')
    evaluate.evaluate(folder)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(BenchmarkError, match="is of other weights than those here .* give --weights those of"):
        evaluate.evaluate(folder)


def test_what_cannot_be_evaluated_gets_a_sentence(run, tmp_path):
    with pytest.raises(BenchmarkError, match=r"nowhere holds no finished run \(not launched\)"):
        evaluate.evaluate(RunFolder(tmp_path / "nowhere"))
    folder = run(checkpoint_freq=0, skip_model_save=True)
    with pytest.raises(BenchmarkError, match="saved no model: run it again without --skip_model_save"):
        evaluate.evaluate(folder)
    (folder.path / "selected").mkdir()
    (folder.path / "selected" / "trained.safetensors").write_text("hello")
    with pytest.raises(BenchmarkError, match="cannot load what the run saved"):
        evaluate.evaluate(folder)
    change(folder, split_sizes=None)
    record = folder.records()[0]
    del record["split_sizes"]
    (folder.path / "results.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(BenchmarkError, match="was not written by this version"):
        evaluate.evaluate(folder)


@pytest.mark.parametrize("algorithm", ["FullFT", "LP"])
def test_a_network_with_batch_norm_is_reproduced(run, algorithm):
    folder = run(algorithm=algorithm, backbone="test_resnet", weights="none", hparams='{"image_size": 32, "lr": 0.01}')
    record, reproduced = evaluate.evaluate(folder)
    assert len(reproduced) == 8 and evaluate.describe_difference(record, reproduced) == ""


@pytest.mark.parametrize("algorithm", ["BOnly", "LP"])
def test_what_is_saved_says_what_it_was_trained_on(run, algorithm, pacs_like):
    """And does not warn where it is evaluated, whatever statistics it was fed."""
    settings = {"dataset": "PACS", "data_dir": str(pacs_like), "backbone": "test_vit", "weights": "none"}
    hparams = '{"batch_size": 4, "image_size": 48}'
    folder = run(**settings, algorithm=algorithm, input_stats="imagenet", hparams=hparams)
    saved = folder.path / "selected"
    if algorithm == "LP":
        with safe_open(saved / "trained.safetensors", framework="pt") as file:
            said = json.loads(file.metadata()["model"])
    else:
        said = json.loads((saved / "adapter.json").read_text())
    assert said["class_names"] == ["dog", "house"]
    assert said["input"]["mean"] == [0.485, 0.456, 0.406] and said["input"]["input_size"] == [3, 48, 48]
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdapterWarning)
        record, reproduced = evaluate.evaluate(folder)
    assert evaluate.describe_difference(record, reproduced) == ""


@pytest.mark.parametrize("command", [evaluate, frontier, soup])
def test_commands_share_the_options_of_where_things_are_now(command):
    where = ["--run" if command is evaluate else "--input_dir", "runs"]
    args = command.make_parser().parse_args([*where, "--data_dir", "images", "--cache_dir", "cache"])
    assert saved.Moved.of(args) == saved.Moved(data_dir="images", cache_dir="cache")


def first_is_selected(monkeypatch):
    """Of a run's steps, which are then evaluated without being trained again."""
    monkeypatch.setattr(training, "better", lambda val_acc, than: than is None)
    for module in (training, saved, predictions):
        monkeypatch.setattr(module, "best_step", lambda records: records[0])


def test_predictions_are_added_to_a_run_that_has_none(run, monkeypatch, capsys):
    first_is_selected(monkeypatch)
    folder = run(evaluate="lean")
    files = sorted(folder.path.glob("predictions_*"))
    kept = [file.read_bytes() for file in files]
    assert len(kept) == 2
    for file in files:
        file.unlink()
    assert evaluate.main(["--run", str(folder.path), "--predictions"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("All 8 accuracies are as recorded.") == 2
    assert f"The predictions are kept in {folder.path}." in printed
    assert [file.read_bytes() for file in files] == kept


def test_predictions_are_added_to_the_runs_of_a_folder_that_have_none(run, tmp_path, capsys):
    folders = [
        run(trial_seed=seed, checkpoint_freq=0, output_dir=str(tmp_path / "runs" / str(seed))) for seed in (0, 1)
    ]
    file = folders[1].path / "predictions_selected.safetensors"
    kept = file.read_bytes()
    file.unlink()
    words = ["--input_dir", str(tmp_path / "runs"), "--predictions"]
    capsys.readouterr()
    assert evaluate.main([*words, "--dry_run"]) == 0
    expected = f"would evaluate {folders[1].path}: DigitsShift LP, tested on blended, trial 1\n"
    assert capsys.readouterr().out == f"2 runs: 1 keep their predictions, 1 to evaluate\n{expected}"
    assert not file.exists()
    assert evaluate.main(words) == 0
    printed = capsys.readouterr().out
    assert "1 of 1: DigitsShift LP, tested on blended, trial 1: all 8 accuracies are as recorded\n" in printed
    assert file.read_bytes() == kept
    file.write_bytes(kept[:-1])
    change(folders[1], env1_out_acc=0.9875)
    assert evaluate.main(words) == 1
    printed = capsys.readouterr()
    assert "1 of 8 accuracies are not as recorded" in printed.out and "1 of 1 runs have other acc" in printed.err
    assert file.read_bytes() == kept
    file.unlink()
    shutil.rmtree(folders[1].path / "selected")
    assert evaluate.main(words) == 1
    assert f"error: {folders[1].path} saved no model: run it again" in capsys.readouterr().err


def test_options_that_do_not_go_together(capsys):
    for words, sentence in (
        (["--input_dir", "runs"], "--input_dir needs --predictions: add it"),
        (["--run", "runs", "--predictions", "--step", "last"], "leave --step out"),
    ):
        with pytest.raises(BenchmarkError, match=sentence):
            evaluate.main(words)


def test_a_derived_run_keeps_no_predictions(tmp_path):
    with pytest.raises(BenchmarkError, match="was derived from other runs, of which alone predictions are kept"):
        predictions.load_predictions(tmp_path / "derived" / "0")
