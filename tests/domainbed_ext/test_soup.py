"""`python -m domainbed_ext.soup`: means of the weights of finished runs, as rows of their own."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from domainbed_ext import collect_results, evaluate, soup, train
from domainbed_ext.datasets.debug import DebugEnvironment
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs.arguments import RunArguments
from domainbed_ext.runs.folder import RunFolder, load_records
from domainbed_ext.runs.saved import load_run
from domainbed_ext.soups import images as soup_images
from domainbed_ext.soups import make

USUAL = RunArguments(
    dataset="Debug28", steps=3, checkpoint_freq=0, precision="float32", test_envs=[0], cache_dir="none"
)
SHARED = {"lr": 0.01, "adapter_seed": 0}


def train_run(folder, **changes):
    """A run in a folder of its own, named by what tells it from the others."""
    args = replace(USUAL, **changes)
    path = folder / "-".join(map(str, [args.algorithm, args.trial_seed + args.hparams_seed, *(args.source_envs or [])]))
    assert train.run(replace(args, output_dir=str(path)), lambda share: None) == 0
    return RunFolder(path)


def of_trials(folder, algorithm, trials=(0, 1), hparams=SHARED, **changes):
    """Runs that start at different random weights, as those of a sweep."""
    changes = {"algorithm": algorithm, "hparams": json.dumps(hparams), **changes}
    return [train_run(folder, trial_seed=trial, seed=trial, **changes) for trial in trials]


def soups(folder):
    return {record["args"]["algorithm"]: record for record in load_records(folder) if "derived" in record}


def count_makes(monkeypatch):
    made = []
    whole = make.make
    monkeypatch.setattr(make, "make", lambda plan: made.append(str(plan)) or whole(plan))
    return made


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two trials of LoRA-FA that share A."""
    folder = tmp_path_factory.mktemp("adapters")
    of_trials(folder, "BOnly")
    return folder


@pytest.fixture
def sweep(adapters, tmp_path):
    return shutil.copytree(adapters, tmp_path / "sweep")


def test_a_soup_of_adapters_is_an_adapter_and_a_row(sweep, capsys, monkeypatch):
    made = count_makes(monkeypatch)
    assert soup.main(["--input_dir", str(sweep)]) == 0
    printed = capsys.readouterr().out
    assert "1 soups: 0 are there, 1 to make" in printed
    assert "left out: BOnly soup(trials, greedy): greedy selection needs 50 images" in printed
    record = soups(sweep)["BOnly soup(trials)"]
    assert record["derived"]["ingredients"] == ["BOnly-0", "BOnly-1"] and record["derived"]["weights"] == [0.5, 0.5]
    assert record["derived"]["trials"] == [0, 1] and record["args"]["trial_seed"] == 0
    assert not any(name.endswith("_out_acc") for name in record if name.startswith(("env1", "env2")))
    assert "are held out by all ingredients, and at least 50 are needed" in record["derived"]["unmeasured"]
    parts = [load_file(sweep / f"BOnly-{trial}" / "selected" / "adapter.safetensors") for trial in (0, 1)]
    mean = load_file(sweep / record["run"] / "selected" / "adapter.safetensors")
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (parts[0][name] + parts[1][name]) / 2)
    assert not torch.equal(mean["head.weight"], parts[0]["head.weight"])

    assert soup.main(["--input_dir", str(sweep)]) == 0 and len(made) == 1
    assert "1 soups: 1 are there, 0 to make" in capsys.readouterr().out
    shutil.rmtree(sweep / "BOnly-1")
    of_trials(sweep, "BOnly", [1], {**SHARED, "lr": 0.02})
    assert soup.main(["--input_dir", str(sweep)]) == 0 and len(made) == 2


def test_the_page_and_the_tables_have_a_dash_and_say_why(sweep):
    assert soup.main(["--input_dir", str(sweep)]) == 0
    collect_results.collect(sweep)
    text = (sweep / "tables" / "results.md").read_text()
    *_, table = text.partition("Debug28, generalisation")
    row = next(line for line in table.splitlines() if "BOnly soup(trials) (LoRA-FA" in line)
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3] == "-" and cells[4] not in ("-", "X") and cells[6] == "-", row
    (count,) = re.findall(r"BOnly soup\(trials\) has no in-domain accuracy: (no|\d+) images of \w+ are held out", table)
    assert count == "no" or 0 < int(count) < 50
    assert "diverged" not in text
    page = (sweep / "tables" / "index.html").read_text()
    (made_of,) = re.findall(r'"made_of": (\[\[[^]]*\], \[[^]]*\]\])', page)
    assert sorted(name for _, name, _ in json.loads(made_of)) == ["BOnly-0", "BOnly-1"]
    assert "2 runs, 1 derived from them, 3 records" in page
    collect_results.collect(sweep, reference="LoRA-FA soup(trials)")
    evaluated = load_records(sweep)
    with pytest.raises(BenchmarkError, match="was not trained but derived"):
        evaluate.evaluate(RunFolder(sweep / soups(sweep)["BOnly soup(trials)"]["run"]))
    assert len(evaluated) == 3


def test_a_dry_run_changes_nothing(sweep, capsys):
    assert soup.main(["--input_dir", str(sweep), "--dry_run"]) == 0
    assert "would make BOnly soup(trials) on Debug28, tested on 0, trials 0, 1: of BOnly-0, BOnly-1" in (
        capsys.readouterr().out
    )
    assert not (sweep / "derived").exists()


def test_adapters_with_different_frozen_factors_have_no_mean_but_merged_weights_do(tmp_path, capsys):
    runs = of_trials(tmp_path, "BOnly", hparams={"lr": 0.01})
    assert soup.main(["--input_dir", str(tmp_path)]) == 2
    assert "error: the runs of BOnly were each trained with another frozen A" in (error := capsys.readouterr().err)
    assert "adapter_seed" in error and "or add --merged" in error and not soups(tmp_path)
    assert soup.main(["--input_dir", str(tmp_path), "--merged"]) == 0
    _check_merged(tmp_path, runs, "BOnly soup(trials)")


@pytest.mark.parametrize("algorithm", ["BA", "BA@init_A=pissa", "Peft@method=dora"])
def test_the_soup_of_methods_that_train_both_factors_is_a_whole_model(tmp_path, algorithm):
    if algorithm.startswith("Peft"):
        pytest.importorskip("peft")
    runs = of_trials(tmp_path, algorithm, hparams={"lr": 0.01})
    assert soup.main(["--input_dir", str(tmp_path), "--kind", "uniform"]) == 0
    _check_merged(tmp_path, runs, f"{algorithm} soup(trials)")


def _check_merged(folder, runs, name):
    """The saved model has, in a layer, the mean of the weights that the runs' adapted layers compute with."""
    record = soups(folder)[name]
    assert record["derived"]["saved_as"] == "FullFT"
    model = load_file(folder / record["run"] / "selected" / "trained.safetensors")
    loaded = [load_run(run).algorithm for run in runs]
    layer = "blocks.0.attn.qkv"
    probe = torch.randn(5, loaded[0].backbone.num_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [algorithm.eval().backbone.get_submodule(layer)(probe) for algorithm in loaded]
    expected = sum(outputs) / len(outputs)
    merged = torch.nn.functional.linear(probe, model[f"{layer}.weight"], model[f"{layer}.bias"])
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    heads = [algorithm.backbone.get_classifier() for algorithm in loaded]
    weights = [getattr(head, "modules_to_save", {"default": head})["default"].weight for head in heads]
    torch.testing.assert_close(model["head.weight"], sum(weights) / len(weights))


def test_over_hyperparameters_a_greedy_soup_is_not_below_its_best_run(tmp_path, capsys):
    for number, lr in enumerate((1e-4, 3e-3, 1e-2)):
        train_run(tmp_path, algorithm="FullFT", hparams=json.dumps({"lr": lr}), hparams_seed=number)
    assert soup.main(["--input_dir", str(tmp_path), "--over", "hparams"]) == 0
    made = soups(tmp_path)
    uniform, greedy = made["FullFT soup(hparams)"], made["FullFT soup(hparams, greedy)"]
    runs = {record["run"]: record for record in load_records(tmp_path) if "derived" not in record}
    assert uniform["derived"]["ingredients"] == sorted(runs) and "unmeasured" not in uniform["derived"]
    trained = [load_file(tmp_path / run / "selected" / "trained.safetensors") for run in sorted(runs)]
    mean = load_file(tmp_path / uniform["run"] / "selected" / "trained.safetensors")
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, sum(each[name].double() for each in trained).float() / 3)

    def validation(record):
        return (record["env1_out_acc"] + record["env2_out_acc"]) / 2

    assert validation(greedy) >= max(map(validation, runs.values()))
    chosen = greedy["derived"]["ingredients"]
    assert chosen[0] == max(runs, key=lambda run: (validation(runs[run]), -sorted(runs).index(run)))
    if len(chosen) == 1:
        assert all(greedy[name] == runs[chosen[0]][name] for name in greedy if name.endswith("_acc"))
    assert "minus its best run" in capsys.readouterr().out


def test_over_domains_experts_are_tested_on_the_domain_that_none_saw(tmp_path):
    for source in range(3):
        changes = {"protocol": "single_source", "source_envs": [str(source)], "test_envs": None}
        train_run(tmp_path, algorithm="LP", **changes)
    assert soup.main(["--input_dir", str(tmp_path), "--kind", "uniform"]) == 0
    records = [record for record in load_records(tmp_path) if "derived" in record]
    assert sorted(record["args"]["test_envs"] for record in records) == [[0], [1], [2]]
    for record in records:
        assert {name for name in record if name.endswith("_acc")} == {
            f"env{env}_{split}_acc" for env in range(3) for split in ("in", "out")
        }
        assert len(record["derived"]["ingredients"]) == 2
    collect_results.collect(tmp_path)
    assert "LP soup(domains) (linear probe)" in (tmp_path / "tables" / "results.md").read_text()


def test_a_greedy_soup_over_trials_takes_images_that_none_was_trained_on(tmp_path, monkeypatch):
    of_trials(tmp_path, "LP", hparams={}, holdout_fraction=0.5)
    monkeypatch.setattr(soup_images, "HELD_OUT_LEAST", 1)
    assert soup.main(["--input_dir", str(tmp_path), "--kind", "greedy"]) == 0
    (record,) = soups(tmp_path).values()
    assert record["args"]["algorithm"] == "LP soup(trials, greedy)" and "unmeasured" not in record["derived"]
    assert 0 < record["split_sizes"]["env1_out"] < 8 and 0 <= record["env1_out_acc"] <= 1


def test_a_soup_of_runs_split_by_concepts_takes_images_of_concepts_that_none_was_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(DebugEnvironment, "concepts", [str(i % 8) for i in range(16)], raising=False)
    runs = of_trials(tmp_path, "LP", hparams={}, holdout_fraction=0.5, split_by="concepts")
    splits = [load_run(run).setup.splits["env1_out"].keys for run in runs]
    assert all(set(keys) == {(key + 8) % 16 for key in keys} and len(keys) == 8 for keys in splits)
    monkeypatch.setattr(soup_images, "HELD_OUT_LEAST", 1)
    assert soup.main(["--input_dir", str(tmp_path), "--kind", "greedy"]) == 0
    (record,) = soups(tmp_path).values()
    assert record["args"]["split_by"] == "concepts"
    assert record["split_sizes"]["env1_out"] == len(set(splits[0]) & set(splits[1])) > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--over", "hparams"], "the finished runs have one run per trial and test domain .*at least two runs"),
        (["--over", "domains"], "no single-source runs from all training domains"),
        (["--trials_per_soup", "3", "--over", "trials"], "fewer than 3 trials"),
        (["--kind", "greedy"], "greedy selection needs 50 images .* use --kind uniform"),
        (["--algorithms", "FullFT"], "unknown method of these runs in --algorithms: 'FullFT'"),
        (["--trials_per_soup", "1"], "1 is too small, give 2 or more"),
    ],
)
def test_nothing_to_do_is_one_sentence(sweep, options, words):
    with pytest.raises(BenchmarkError, match=words):
        soup.main(["--input_dir", str(sweep), *options])


def test_runs_without_weights_and_unfinished_runs(sweep, capsys):
    (sweep / "BOnly-0" / "done").unlink()
    with pytest.raises(BenchmarkError, match="there is no soup to make: the finished runs have one trial"):
        soup.main(["--input_dir", str(sweep)])
    assert "warning: left out: 1 of 2 runs are not finished" in capsys.readouterr().err
    (sweep / "BOnly-0" / "done").write_text("done")
    assert soup.main(["--input_dir", str(sweep), "--kind", "uniform"]) == 0
    shutil.rmtree(sweep / "BOnly-1" / "selected")
    assert soup.main(["--input_dir", str(sweep)]) == 2
    assert "BOnly-1 saved no model: run it again" in capsys.readouterr().err
    assert list(soups(sweep)) == ["BOnly soup(trials)"]  # what was made stays
    (sweep / "BOnly-1" / "selected").mkdir()
    save_file({}, sweep / "BOnly-1" / "selected" / "adapter.safetensors")
    assert soup.main(["--input_dir", str(sweep), "--kind", "uniform"]) == 2
    assert "another frozen A" in capsys.readouterr().err


def test_soups_of_runs_that_are_gone_are_removed(sweep, capsys):
    of_trials(sweep, "BOnly", [2, 3])
    options = ["--input_dir", str(sweep), "--trials_per_soup", "2", "--kind", "uniform"]
    assert soup.main(options) == 0
    assert sorted(record["derived"]["trials"] for record in load_records(sweep) if "derived" in record) == [
        [0, 1],
        [2, 3],
    ]
    shutil.rmtree(sweep / "BOnly-3")
    assert soup.main(options) == 0
    assert "its runs are in other soups now" in capsys.readouterr().out
    assert [record["derived"]["trials"] for record in load_records(sweep) if "derived" in record] == [[0, 1]]
