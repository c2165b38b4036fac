"""A run's trained model on image files that are given by their paths."""

import csv
import io
import json
import shutil

import pytest
import timm
from safetensors.torch import save_file

from domainbed_ext import predict, soup, train
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.runs.predictions import load_predictions

BACKBONE = {"backbone": "test_vit", "weights": "none", "hparams": '{"batch_size": 4, "image_size": 48}', "steps": 1}


@pytest.fixture
def run(make_args, pacs_like, tmp_path):
    """Makes a run on the small PACS in a folder of a sweep."""

    def make(**overrides):
        options = {**BACKBONE, "dataset": "PACS", "data_dir": str(pacs_like), "train_eval_share": 1.0, **overrides}
        args = make_args(**{"output_dir": str(tmp_path / "runs" / "one"), **options})
        assert train.run(args) == 0
        return RunFolder(args.output_dir)

    return make


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("options", [{"algorithm": "LP"}, {"algorithm": "BOnly", "input_stats": "imagenet"}])
def test_the_runs_own_images_get_the_predictions_that_it_keeps(run, pacs_like, tmp_path, capsys, options):
    folder = run(**options)
    kept = load_predictions(folder).parts["A"]
    pacs_like.rename(tmp_path / "moved")  # the data set is not needed
    art = tmp_path / "moved" / "PACS" / "art_painting"
    capsys.readouterr()
    assert predict.main(["--run", str(folder.path), str(art), "--batch_size", "7"]) == 0
    found = rows(capsys.readouterr().out)
    assert [row["file"] for row in found] == [str(art / name) for name in kept.names]
    assert list(found[0]) == ["file", "label", "probability", "p(dog)", "p(house)"]
    for row, logits in zip(found, kept.logits.softmax(1).tolist(), strict=True):
        probabilities = [float(row["p(dog)"]), float(row["p(house)"])]
        assert probabilities == pytest.approx(logits, abs=2e-3)  # batches of other sizes round otherwise
        assert row["probability"] == max(row["p(dog)"], row["p(house)"], key=float)
        assert row["label"] == ("dog", "house")[probabilities.index(max(probabilities))]


def test_json_in_a_file_and_files_that_cannot_be_read(run, pacs_like, tmp_path, capsys):
    folder = run(algorithm="LP")
    photos = pacs_like / "PACS" / "photo" / "dog"
    (photos / "pic_000.png").write_bytes(b"no image")
    out = tmp_path / "photos.json"
    one = str(photos / "pic_003.png")
    words = ["--run", str(folder.path), one, str(photos), str(tmp_path / "nowhere.png"), "--out", str(out)]
    capsys.readouterr()
    assert predict.main([*words, "--workers", "1", "--batch_size", "4"]) == 1
    printed = capsys.readouterr()
    assert f"error: 2 of 11 images cannot be read and are left out: {tmp_path / 'nowhere.png'} (no such" in printed.err
    assert f"; {photos / 'pic_000.png'} (" in printed.err and printed.err.count("error") == 1
    assert printed.out == f"9 predictions: see {out}\n"
    found = json.loads(out.read_text())
    assert [row["file"] for row in found] == [one, *(str(photos / f"pic_{i:03d}.png") for i in range(1, 10) if i != 3)]
    assert all(row["probabilities"][row["label"]] == row["probability"] for row in found)
    assert all(sum(row["probabilities"].values()) == pytest.approx(1) for row in found)


def test_a_soup_can_be_asked_too(run, pacs_like, tmp_path, capsys):
    for trial in (0, 1):
        run(algorithm="LP", trial_seed=trial, output_dir=str(tmp_path / "runs" / str(trial)))
    assert soup.main(["--input_dir", str(tmp_path / "runs"), "--kind", "uniform"]) == 0
    (folder,) = (tmp_path / "runs" / "derived").iterdir()
    capsys.readouterr()
    image = str(pacs_like / "PACS" / "photo" / "dog" / "pic_003.png")
    assert predict.main(["--run", str(folder), image]) == 0
    mine = rows(capsys.readouterr().out)
    shutil.rmtree(folder / "selected")
    with pytest.raises(BenchmarkError, match="was not trained but derived from other runs"):
        predict.main(["--run", str(folder), image])
    assert predict.main(["--run", str(tmp_path / "runs" / "0"), image]) == 0
    assert mine != rows(capsys.readouterr().out) and mine[0]["label"] in ("dog", "house")


def test_other_pretrained_weights_are_refused(run, pacs_like, tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), weights)
    folder = run(algorithm="LP", weights=str(weights))
    save_file(timm.create_model("test_vit").state_dict(), weights)
    with pytest.raises(BenchmarkError, match="is of other weights than those here .* give --weights those of"):
        predict.main(["--run", str(folder.path), str(pacs_like)])


def test_a_damaged_run_is_an_error_that_names_the_file(run, pacs_like):
    folder = run(algorithm="BOnly").path
    records = (folder / "results.jsonl").read_text()
    without = json.dumps({name: value for name, value in json.loads(records).items() if name != "environments"})
    for name, content, sentence in (
        ("selected/adapter.json", "{", "adapter.json cannot be read .*: run it again"),
        ("selected/adapter.json", "3", "adapter.json cannot be read .*: run it again"),
        ("results.jsonl", "", "has no records: run it again"),
        ("results.jsonl", without, "was not written by this version of domainbed_ext.train: run it again"),
    ):
        before = (folder / name).read_text()
        (folder / name).write_text(content)
        with pytest.raises(BenchmarkError, match=sentence):
            predict.main(["--run", str(folder), str(pacs_like)])
        (folder / name).write_text(before)
    (folder / "results.jsonl").unlink()
    with pytest.raises(BenchmarkError, match=r"the records of .* cannot be read \(No such file or directory\)"):
        predict.main(["--run", str(folder), str(pacs_like)])


def test_a_damaged_probe_is_an_error_that_names_the_file(run, pacs_like):
    folder = run(algorithm="LP").path
    path = folder / "selected" / "trained.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BenchmarkError, match="trained.safetensors cannot be read .*: run it again"):
        predict.main(["--run", str(folder), str(pacs_like)])


def test_what_cannot_be_done_gets_a_sentence_before_torch_is_loaded(tmp_path):
    for words, sentence in (
        (["x.png"], "no image in x.png .x.png: no such file or folder.: give image files or folders"),
        ([str(tmp_path)], f"no image in {tmp_path}: give image files or folders"),
        ([str(tmp_path), "--out", "x.txt"], "--out x.txt does not end in .csv or .json: give it such a name, or add"),
    ):
        with pytest.raises(BenchmarkError, match=sentence):
            predict.main(["--run", str(tmp_path), *words])


def test_outputs_that_are_not_finite_have_no_label():
    nan = float("nan")
    texts = {}
    for name, write in predict.FORMATS.items():
        write([predict.Prediction("a,b", None, (nan, nan))], ("x", "y"), file := io.StringIO())
        texts[name] = file.getvalue()
    assert texts["csv"] == 'file,label,probability,p(x),p(y)\n"a,b",,,,\n'
    nothing = {"label": None, "probability": None, "probabilities": {"x": None, "y": None}}
    assert json.loads(texts["json"]) == [{"file": "a,b", **nothing}]
