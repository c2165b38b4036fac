"""The bridge to a checkout of upstream DomainBed."""

import importlib
import importlib.util
import json
import re
import sys

import pytest
import torch

from domainbed_ext import hparams_registry, upstream
from domainbed_ext.algorithms.registry import METHODS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models.inputs import IMAGENET_MEAN, IMAGENET_STD, Inputs
from domainbed_ext.seeds import seed_hash

OURS = ("BA", "BOnly", "AOnly", "LP", "FullFT")
RANKS = {"BOnly@rank=16": 16, "LP": None, "LP+GroupDRO": None, "FullFT": None}
HALVES = Inputs((32, 32), (0.5,) * 3, (0.5,) * 3)


def fit(x, given, wanted=HALVES, stats="backbone"):
    return upstream._Fit(given, wanted, stats)(torch.nn.Identity(), (x,))[0]


# Without a checkout


def test_photographs_get_the_backbones_size_and_statistics():
    pixels = torch.rand(3, 1, 1).expand(2, 3, 224, 224)  # of one colour, so that no resize shows
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    x = (pixels - mean) / std
    torch.testing.assert_close(fit(x, (3, 224, 224)), (2 * pixels - 1)[..., :32, :32])
    torch.testing.assert_close(fit(x, (3, 224, 224), stats="imagenet"), x[..., :32, :32])
    assert fit(x, (3, 224, 224), Inputs()) is x  # a backbone of ImageNet's statistics gets what upstream made


@pytest.mark.parametrize(("channels", "expected"), [(1, (0.0, 0.0, 0.0)), (2, (0.0, 0.0, -1.0)), (3, (0.0, 0.0, 0.0))])
def test_small_images_become_three_channels(channels, expected):
    x = torch.full((4, channels, 28, 28), 0.5)
    fitted = fit(x, (channels, 28, 28))
    assert fitted.shape == (4, 3, 32, 32)
    torch.testing.assert_close(fitted[0, :, 16, 16], torch.tensor(expected))


def test_no_checkout_is_said_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv(upstream.VARIABLE, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        BenchmarkError, match="no DomainBed checkout: `git clone .*--checkout DIR or DOMAINBED_CHECKOUT"
    ):
        upstream.main(["train"])
    (tmp_path / "domainbed").mkdir()
    with pytest.raises(BenchmarkError, match="is not a DomainBed checkout .no domainbed/algorithms.py in it.: give"):
        upstream.main(["--checkout", str(tmp_path), "train"])
    monkeypatch.setenv(upstream.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(BenchmarkError, match="nowhere is not a DomainBed checkout"):
        upstream.register()


def test_unknown_scripts_and_options_are_said_in_a_sentence(capsys):
    with pytest.raises(BenchmarkError, match="unknown script 'trian': did you mean 'train'"):
        upstream.main(["trian", "--dataset", "PACS"])
    with pytest.raises(BenchmarkError, match="required: script"):
        upstream.main([])
    with pytest.raises(SystemExit) as ended:
        upstream.main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "upstream sweep launch" in printed and "DOMAINBED_CHECKOUT" in printed


def test_a_head_does_not_start_at_the_probe():
    settings = hparams_registry.resolve("LP", "Debug28") | {"weights": "none"}
    bridged = type("LP", (upstream.Bridged, METHODS["LP"].load()), {})
    assert not any(
        p.any() for p in bridged((3, 28, 28), 2, 2, {**settings, "head_start": "zero"}).backbone.head.parameters()
    )
    with pytest.raises(BenchmarkError, match="upstream's training loop has no head_start=probe: leave that out"):
        bridged((3, 28, 28), 2, 2, {**settings, "head_start": "probe"})


def test_options_that_need_this_packages_training_loop_are_refused():
    settings = hparams_registry.resolve("LP", "Debug28") | {"weights": "none"}
    bridged = type("LP", (upstream.Bridged, METHODS["LP"].load()), {})
    bridged((3, 28, 28), 2, 2, {**settings, "clip_grad": 1.0, "label_smoothing": 0.1})
    with pytest.raises(BenchmarkError, match="upstream's training loop has no schedule and no accumulate: leave that"):
        bridged((3, 28, 28), 2, 2, {**settings, "schedule": "cosine", "accumulate": 2})
    with pytest.raises(BenchmarkError, match="upstream's training loop has no average: leave that out"):
        bridged((3, 28, 28), 2, 2, {**settings, "average": "swad"})


# With one


@pytest.fixture
def train(checkout, tmp_path, monkeypatch):
    """Runs upstream's train on Debug28; gives the run's folder."""

    def no_network(*args):
        raise AssertionError("our algorithms need none of upstream's networks, nor their weights")

    def run(algorithm, **hparams):
        folder = tmp_path / algorithm
        arguments = ["--dataset", "Debug28", "--algorithm", algorithm, "--steps", "2", "--output_dir", str(folder)]
        upstream.run("train", [*arguments, "--hparams", json.dumps({"batch_size": 4, **hparams})])
        return folder

    monkeypatch.setattr(importlib.import_module("domainbed.networks"), "Featurizer", no_network)
    return run


@pytest.mark.parametrize("algorithm", [*OURS, "BOnly@rank=16", "BOnly+CORAL@mmd_gamma=2", "LP+GroupDRO"])
def test_upstreams_train_runs_our_algorithms_and_saves_them(train, algorithm):
    folder = train(algorithm)
    assert (folder / "done").read_text() == "done"
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1]
    assert records[0]["hparams"]["input_stats"] == "backbone" and records[0]["loss"] > 0
    assert records[0]["hparams"].get("rank") == RANKS.get(algorithm, 8)
    assert records[0]["hparams"].get("mmd_gamma") == (2 if "CORAL" in algorithm else None)
    assert ("penalty" in records[0]) == ("CORAL" in algorithm)

    saved = torch.load(folder / "model.pkl", weights_only=True)
    algorithms = importlib.import_module("domainbed.algorithms")
    shape = saved["model_input_shape"], saved["model_num_classes"], saved["model_num_domains"]
    again = algorithms.get_algorithm_class(algorithm)(*shape, saved["model_hparams"])
    x = torch.randn(5, 3, 28, 28)
    before = again.eval().predict(x)
    again.load_state_dict(saved["model_dict"])
    assert again.predict(x).shape == (5, 2) and not torch.equal(again.predict(x), before)


def test_our_names_and_hyperparameters_are_in_upstreams_registries(checkout):
    assert upstream.register(checkout) == checkout.resolve()  # twice is once
    algorithms, registry = (importlib.import_module(f"domainbed.{name}") for name in ("algorithms", "hparams_registry"))
    assert set(METHODS) <= set(algorithms.ALGORITHMS) and len(set(algorithms.ALGORITHMS)) == len(algorithms.ALGORITHMS)
    for name in (*OURS, "BOnly+IRM"):
        seed = seed_hash(3, 1)
        for dataset in ("PACS", "DomainNet", "RotatedMNIST"):
            drawn = registry.random_hparams(name, dataset, seed)
            assert drawn == {**hparams_registry.random_hparams(name, dataset, seed), "input_stats": "backbone"}
            defaults = registry.default_hparams(name, dataset)
            assert defaults == {**hparams_registry.default_hparams(name, dataset), "input_stats": "backbone"}
    assert registry.random_hparams("BA@rank=3,lr=0.5", "PACS", 1)["rank"] == 3
    assert algorithms.get_algorithm_class("BA@rank=3") is algorithms.BA
    assert algorithms.get_algorithm_class("BA+IRM@rank=3") is algorithms.BA
    with pytest.raises(BenchmarkError, match="unknown objective 'IMR': did you mean 'IRM'"):
        algorithms.get_algorithm_class("BA+IMR")
    with pytest.raises(BenchmarkError, match=r"'ERM\+IRM': ERM is upstream's own here, which takes no objective: give"):
        algorithms.get_algorithm_class("ERM+IRM")
    with pytest.raises(BenchmarkError, match="unknown hyperparameter.*'rnk': did you mean 'rank'"):
        registry.default_hparams("BA@rnk=3", "PACS")


def test_upstreams_own_stay_its_own_in_plain_numbers(checkout):
    algorithms, registry = (importlib.import_module(f"domainbed.{name}") for name in ("algorithms", "hparams_registry"))
    assert algorithms.get_algorithm_class("ERM").__module__ == "domainbed.algorithms"
    plain = registry.random_hparams("MLDG", "PACS", seed_hash(1, 0))
    assert json.loads(json.dumps(plain)) == plain and type(plain["n_meta_test"]) is int
    with pytest.raises(BenchmarkError, match="unknown algorithm 'BOnyl': did you mean 'BOnly'"):
        algorithms.get_algorithm_class("BOnyl")


@pytest.mark.parametrize(
    ("hparams", "sentence"),
    [
        ({"batch_size": 14}, "batch_size 14 is larger than the 13 images of a split"),
        ({"precision": "fp32"}, "unknown precision 'fp32': did you mean 'float32'"),
        ({"input_stats": "inet"}, "unknown input_stats 'inet'"),
    ],
)
def test_what_upstream_would_wait_for_or_take_silently_is_said(train, tmp_path, hparams, sentence):
    streams = sys.stdout, sys.stderr
    with pytest.raises(BenchmarkError, match=sentence):
        train("LP", **hparams)
    assert re.match(f"error: {sentence}", (tmp_path / "LP" / "err.txt").read_text())
    assert (sys.stdout, sys.stderr) == streams


def test_wilds_is_needed_for_its_own_data_sets_alone(checkout):
    if hasattr(sys.modules["wilds"], "__file__"):
        pytest.skip("wilds is installed")
    with pytest.raises(BenchmarkError, match="needs the package wilds"):
        importlib.import_module("domainbed.datasets").WILDSCamelyon(".", [0], {"data_augmentation": False})
