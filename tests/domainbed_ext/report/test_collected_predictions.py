"""The tables, files, plot and pictures that `collect_results` adds for runs that keep their predictions."""

import json

import pytest
import torch

from domainbed_ext.collect_results import collect, main
from domainbed_ext.datasets.digest import digest
from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.runs.predictions import Part, Predictions, save_predictions

FILES = {f"{name}.csv" for name in ("per_class", "confusion", "calibration", "agreement", "ensembles", "mistakes")}


def write_run(root, dataset, data_dir, algorithm, trial, env, keeps):
    """A finished run that gets the first image of each environment wrong; LP the second too."""
    folder = root / f"{algorithm}-{trial}-{env}"
    folder.mkdir(parents=True)
    args = {"dataset": "PACS", "algorithm": algorithm, "test_envs": [env], "trial_seed": trial, "hparams_seed": 0}
    parts = {}
    for label, environment in zip(dataset.environments, dataset.datasets, strict=True):
        labels = torch.as_tensor(environment.targets)
        predicted = labels.clone()
        wrong = 2 if algorithm == "LP" else 1
        predicted[:wrong] = 1 - predicted[:wrong]
        logits = torch.nn.functional.one_hot(predicted, 2).float() * 3
        held_out = torch.arange(len(labels)) % 5 == 0
        parts[label] = Part(tuple(environment.image_names()), logits, labels, held_out)
    predictions = Predictions(3, "best", parts, tuple(dataset.classes))
    record = {
        "args": {**args, "data_dir": str(data_dir), "protocol": "leave_one_out"},
        "environments": list(dataset.environments),
        "data_digest": digest(dataset),
        "hparams": {},
        "step": 3,
        **predictions.accuracies(),
    }
    (folder / "results.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "done").write_text("done")
    if keeps:
        save_predictions(folder, predictions)


@pytest.fixture
def sweep(pacs_like, tmp_path):
    """Makes the folder of a sweep of two methods."""

    def make(trials=1, keeps=True):
        dataset = DATASETS["PACS"](pacs_like, [0], {})
        for algorithm in ("LP", "BA"):
            for trial in range(trials):
                for env in range(4):
                    write_run(tmp_path / "runs", dataset, pacs_like, algorithm, trial, env, keeps)
        return tmp_path / "runs"

    return make


def test_tables_files_plot_and_pictures(sweep, pacs_like, capsys):
    folder = sweep(trials=2)
    names = {path.name for path in collect(folder)}
    assert names >= {*FILES, "reliability.svg"}
    tables = folder / "tables"
    printed = capsys.readouterr().out
    for title in (
        "accuracy by class",
        "most frequent confusions",
        "calibration",
        "agreement",
        "ensembles",
        "get wrong",
    ):
        assert title in printed and title in (tables / "results.md").read_text()
    assert "ECE" in (tables / "results.txt").read_text() and "ECE" not in printed  # printed is the title alone
    lines = (tables / "mistakes.csv").read_text().splitlines()
    assert lines[1] == "PACS,A,dog/pic_000.png,dog,house,2,BA; LP," and lines[2].endswith("dog,house,1,LP,BA")
    page = (tables / "index.html").read_text()
    assert "All methods get them wrong: 4<" in page and "linear probe alone gets them wrong: 4<" in page
    assert page.count('<img src="data:image/jpeg;base64,') == 8  # one of each test domain in each group
    assert 'alt="dog/pic_000.png"' in page and "dog → house, A" in page
    assert main(["--input_dir", str(folder), "--no_pictures"]) == 0
    named_alone = (tables / "index.html").read_text()
    assert "data:image" not in named_alone and named_alone.count("<code>dog/pic_000.png</code>") == 4
    pacs_like.rename(pacs_like.with_name("moved"))
    collect(folder)
    page = (tables / "index.html").read_text()
    assert "<img" not in page and page.count("<code>dog/pic_000.png</code>") == 4


def test_pictures_are_of_the_data_that_the_runs_were_of(sweep, pacs_like):
    folder = sweep()
    (pacs_like / "PACS" / "photo" / "dog" / "pic_009.png").write_bytes(b"another size")
    collect(folder)
    assert "<img" not in (folder / "tables" / "index.html").read_text()


def test_without_predictions_there_is_none_of_it(sweep):
    folder = sweep(keeps=False)
    names = {path.name for path in collect(folder)}
    assert not names & {*FILES, "reliability.svg"}
    assert "Images of test domains" not in (folder / "tables" / "index.html").read_text()


def test_a_file_that_cannot_be_read_is_left_out_with_a_warning(sweep, capsys):
    folder = sweep()
    file = folder / "LP-0-1" / "predictions_selected.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    names = {path.name for path in collect(folder)}
    printed = capsys.readouterr()
    assert f"warning: left out of what follows from predictions: {file} cannot be read" in printed.err
    assert FILES - {"ensembles.csv"} <= names
    assert (
        "Left out: 1 run(s) without predictions of the chosen step." in (folder / "tables" / "results.txt").read_text()
    )
