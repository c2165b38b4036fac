"""What a run feeds its algorithm: the same with and without the cache, as images or as features."""

import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from threadpoolctl import threadpool_limits

from domainbed_ext import train
from domainbed_ext.algorithms.probe import LP
from domainbed_ext.cache.entries import Entries
from domainbed_ext.data import loader as data
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs import feed as feed_module
from domainbed_ext.runs import profile
from domainbed_ext.runs import setup as run_setup
from domainbed_ext.runs.features import features
from domainbed_ext.runs.feed import Feed
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.runs.images import entries
from domainbed_ext.sweep import command as sweep
from domainbed_ext.sweep import launch
from domainbed_ext.system.interrupts import Interrupted
from tests.domainbed_ext.conftest import make_domains
from tests.domainbed_ext.opened_files import OPENED, settled  # noqa: F401  (a fixture)
from vitlorafa import tuning, use_ways

TINY = {"backbone": "vit_pico_patch8_32", "batch_size": 4}
pytestmark = [pytest.mark.usefixtures("settled"), pytest.mark.numbers]


@pytest.fixture
def made(make_args, pacs_like, tmp_path):
    """Makes a run on a small PACS; its records but for times and places, the folder and what was opened."""
    count = iter(range(99))

    def make(hparams=None, **overrides):
        folder = RunFolder(tmp_path / f"run{next(count)}")
        values = {"dataset": "PACS", "data_dir": str(pacs_like), "algorithm": "BOnly", "train_eval_share": 1.0}
        values |= {"cache_dir": str(tmp_path / "cache"), "hparams": json.dumps({**TINY, **(hparams or {})})}
        OPENED.clear()
        args = make_args(**{**values, **overrides, "output_dir": str(folder.path)})
        assert train.run(args, lambda share: None) == 0
        return [{k: v for k, v in r.items() if k not in ("args", "step_time", "run")} for r in folder.records()]

    return make


def decoded():
    return sum(name.endswith(".png") for name in OPENED)


@pytest.mark.parametrize("overrides", [{}, {"validation_images": "augmented"}, {"training_images": "resized"}])
def test_records_are_the_same_with_and_without_the_cache(made, overrides):
    first = made(**overrides)
    assert decoded() >= 2 * 60 + 20  # plain and as they are augmented, but those of the test environment, which are not
    second = made(**overrides)
    assert decoded() == 0
    third = made(**overrides, cache_dir="none")
    assert decoded() >= 80
    assert first == second == third == made(**overrides, workers=2)


def test_without_room_images_are_decoded_each_time(made, capsys):
    records = made(cache_gb=1e-6)
    assert "raise --cache_gb" in capsys.readouterr().err
    assert records == made()


def test_a_run_can_be_stopped_while_it_decodes(make_args, pacs_like, tmp_path):
    def stop():
        raise Interrupted("stopped")

    args = make_args(dataset="PACS", data_dir=str(pacs_like), hparams=json.dumps(TINY), cache_dir=str(tmp_path / "c"))
    setup = run_setup.set_up(args)
    feed = Feed(setup, setup.make_algorithm(), stop)
    with pytest.raises(Interrupted):
        feed.training(range(1))
    assert entries(setup.args).list() == []


def test_all_bad_images_are_named_before_the_first_step(make_args, pacs_like, tmp_path, capsys):
    broken = [
        pacs_like / "PACS" / domain / "dog" / f"pic_{i:03d}.png"
        for domain in ("cartoon", "photo")
        for i in (1, 2, 5, 7)
    ]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    args = make_args(dataset="PACS", data_dir=str(pacs_like), hparams=json.dumps(TINY), cache_dir=str(tmp_path / "c"))
    assert train.run(args, lambda share: None) == 2
    said = capsys.readouterr().err
    assert all(str(path) in said for path in broken) and "Traceback" not in said
    assert not (RunFolder(args.output_dir).path / "results.jsonl").exists()


def test_training_images_that_are_no_larger_than_needed_are_as_they_are(made, pacs_like):
    exact, resized = (made(training_images=how, hparams={"image_size": 40}) for how in ("exact", "resized"))
    assert exact == resized  # 40 px, and 46 would do
    exact, resized = (made(training_images=how, hparams={"image_size": 16}) for how in ("exact", "resized"))
    assert exact[-1]["loss"] != resized[-1]["loss"]


@pytest.mark.parametrize("hparams", [{}, {"data_augmentation": False}])
def test_a_probe_computes_features_once_for_all_runs_and_to_the_bit(made, hparams, monkeypatch):
    embedded, forwarded = [], []
    embed, forward = LP.embed, LP.logits
    monkeypatch.setattr(LP, "embed", lambda self, x: embedded.append(len(x)) or embed(self, x))
    monkeypatch.setattr(LP, "logits", lambda self, x: forwarded.append(x.ndim) or forward(self, x))
    options = {"algorithm": "LP", "steps": 4, "checkpoint_freq": 2}
    first = made(hparams, **options)
    assert sum(embedded) == 80
    embedded.clear(), forwarded.clear()
    again = made({**hparams, "lr": 0.1}, **options, seed=1, trial_seed=1)
    assert not embedded and (2 in forwarded) and (4 in forwarded) == (not hparams)
    assert again != first
    assert first == made(hparams, **options, cache_dir="none")


@pytest.mark.parametrize("hparams", [{}, {"data_augmentation": False}])
def test_a_probe_may_have_features_of_some_environments_alone(made, hparams, monkeypatch):
    """Where others' images are augmented to be looked at, or the cache has no room for their features."""
    domainbed = made(hparams, algorithm="LP", protocol="domainbed", cache_dir="none")
    assert domainbed == made(hparams, algorithm="LP", protocol="domainbed")
    expected = made(hparams, algorithm="LP", cache_dir="none")
    make = Feed._make_features
    monkeypatch.setattr(Feed, "_make_features", lambda self, env: None if env == 2 else make(self, env))
    assert made(hparams, algorithm="LP") == expected


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])
def test_networks_with_buffers_that_are_scalars_are_probed_too(made, backbone, monkeypatch):
    """Batch norm counts its batches in a whole number without a dimension."""
    embed, embedded = LP.embed, []
    monkeypatch.setattr(LP, "embed", lambda self, x: embedded.append(len(x)) or embed(self, x))
    options = {"algorithm": "LP", "train_eval_share": 0.2, "sampling": "epochs"}
    records = made({"backbone": backbone, "weights": "none"}, **options)
    assert sum(embedded) == 80
    assert made({"backbone": backbone, "weights": "none"}, **options) == records
    assert sum(embedded) == 80


@pytest.fixture
def rounding_by_batch(monkeypatch):
    """Features that depend on the other images of their batch, as they do by a rounding on some processors."""
    embed, logits = LP.embed, LP.logits

    def with_others(self, images):
        return embed(self, images) * (1 + images.mean())

    monkeypatch.setattr(LP, "embed", with_others)
    monkeypatch.setattr(LP, "logits", lambda self, x: logits(self, x if x.ndim == 2 else x * (1 + 0.1 * x.mean())))


@pytest.mark.parametrize("hparams", [{}, {"data_augmentation": False}])
def test_what_is_cached_changes_no_bit_of_a_probe(made, hparams, monkeypatch, rounding_by_batch):
    expected = made(hparams, algorithm="LP")
    assert expected == made(hparams, algorithm="LP")  # features out of the cache
    assert expected == made(hparams, algorithm="LP", cache_dir="none")
    assert expected == made(hparams, algorithm="LP", cache_dir="none", workers=2)
    assert expected == made(hparams, algorithm="LP", cache_gb=1e-6)
    make = Feed._make_features
    monkeypatch.setattr(Feed, "_make_features", lambda self, env: None if env == 2 else make(self, env))
    assert expected == made(hparams, algorithm="LP")


def test_a_probe_without_the_cache_decodes_what_it_looks_at_once(made):
    counts = []
    for freq in (0, 1):  # evaluated twice, and five times
        made({"data_augmentation": False}, algorithm="LP", cache_dir="none", steps=5, checkpoint_freq=freq)
        counts.append(decoded())
    assert counts[0] == counts[1] >= 80


@pytest.mark.parametrize("algorithm", ["LP", "BOnly"])
def test_what_workers_make_batches_of_can_be_sent_to_them(made, monkeypatch, algorithm):
    """As where workers are spawned: on macOS, and from Python 3.14 on."""
    loader, sizes = data.DataLoader, []

    def sent(batches, **options):
        packed = pickle.dumps(batches)
        sizes.append(len(packed))
        return loader(pickle.loads(packed), **options)

    expected = made(algorithm=algorithm)
    monkeypatch.setattr(data, "DataLoader", sent)
    assert made(algorithm=algorithm) == expected
    assert made(algorithm=algorithm, cache_dir="none") == expected
    assert sizes and max(sizes) < 100_000  # places of images, not their pixels


def test_features_of_other_weights_images_or_instructions_are_others(make_args, pacs_like, tmp_path, monkeypatch):
    def found(**hparams):
        setup = run_setup.set_up(
            make_args(dataset="PACS", data_dir=str(pacs_like), algorithm="LP", hparams=json.dumps({**TINY, **hparams}))
        )
        feed = Feed(setup, setup.make_algorithm())
        cache = Entries(tmp_path / "cache", 10**9)
        return features(feed.algorithm, feed.images.evaluation[0], setup.inputs, feed.evaluation_batch, cache), cache

    one, cache = found()
    assert one.shape == (20, 128)
    same, _ = found(lr=0.5)
    other, _ = found(weights="none")
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert len(cache.list()) == 2
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "ALL")
    found()
    assert len(cache.list()) == 3
    use_ways({"attention": "matmuls 1 MiB"})
    found()
    used = tuning.answers()
    tuning.pin({})
    found()
    assert len(cache.list()) == 4 and "matmuls 1 MiB" in used.values() and tuning.answers() == used
    use_ways({"evaluation_batch": "16"})
    found()
    assert len(cache.list()) == 5


def test_a_probe_on_features_is_logistic_regression(make_args, tmp_path):
    """Of noise, five images a feature, so that there is one optimum: scikit-learn's, to which training goes."""
    make_domains(tmp_path / "data", domains=("a", "b"), classes=("x", "y", "z"), images=260, side=8, tint=0)
    hparams = {
        **TINY,
        "image_size": 8,
        "batch_size": 624,
        "data_augmentation": False,
        "lr": 0.1,
        "precision": "float32",
    }
    args = make_args(dataset="ImageFolderDomains", data_dir=str(tmp_path / "data"), algorithm="LP", sampling="epochs")
    args = replace(args, hparams=json.dumps(hparams), steps=200)
    setup = run_setup.set_up(args)
    algorithm = setup.make_algorithm()
    feed = Feed(setup, algorithm)
    losses = [algorithm.update(batches)["loss"] for batches in feed.training(range(args.steps))]

    ((x, y),) = next(feed.training(range(1)))  # the whole split
    assert x.shape == (624, 128)
    with threadpool_limits(1):
        reference = LogisticRegression(C=1e9, max_iter=5000, tol=1e-9).fit(x.numpy(), y.numpy())
    optimum = log_loss(y, reference.predict_proba(x.numpy()))
    assert losses[0] > 1.1 > losses[-1] > optimum
    head = algorithm.backbone.get_classifier()
    with torch.no_grad():
        head.weight.copy_(torch.tensor(reference.coef_)), head.bias.copy_(torch.tensor(reference.intercept_))
    loss = torch.nn.functional.cross_entropy(algorithm.logits(x), y)
    loss.backward()
    assert loss.item() == pytest.approx(optimum, rel=1e-4)
    assert head.weight.grad.abs().max() < 1e-3 * x.abs().max()


def test_a_profile_counts_images_and_changes_no_number(made, make_args, pacs_like, tmp_path, capsys):
    plain = made()
    args = make_args(dataset="PACS", data_dir=str(pacs_like), algorithm="BOnly", train_eval_share=1.0, profile=True)
    args = replace(args, hparams=json.dumps(TINY), cache_dir="none", output_dir=str(tmp_path / "profiled"))
    assert train.run(args, lambda share: None) == 0
    record = RunFolder(args.output_dir).records()[-1]
    assert {k: record[k] for k in plain[-1]} == plain[-1]
    profile = record["profile"]
    count = 3 * 3 * 4
    assert profile["images"] == {
        "augmented": count, "forwarded": count, "backwarded": count, "decoded": count + 80, "evaluated": 80,
    }  # fmt: skip
    stages = profile["stages"]
    assert set(stages) == {"data wait", "augment", "forward", "backward", "optimizer", "evaluate", "write"}
    assert all(stages[name]["ratio"] > 0 and stages[name]["floor"] > 0 for name in ("forward", "backward", "evaluate"))
    each = profile["gflop_per_image"]
    assert each["backward"] == pytest.approx(each["forward"], rel=0.3)
    assert 0.95 * each["forward"] < each["evaluate"] < each["forward"]  # which forms W + s·B·A in each step
    assert "stage " in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1])
def test_only_the_process_of_a_run_waits_for_its_gpu(make_args, pacs_like, monkeypatch, workers):
    waits, here = [], os.getpid()

    def wait(device):
        if os.getpid() != here:
            raise BenchmarkError("Cannot re-initialize CUDA in forked subprocess")
        waits.append(device)

    monkeypatch.setattr(profile, "wait", wait)
    args = make_args(dataset="PACS", data_dir=str(pacs_like), algorithm="BOnly", workers=workers)
    setup = run_setup.set_up(replace(args, hparams=json.dumps(TINY), cache_dir="none"))
    feed = Feed(setup, setup.make_algorithm())
    feed.measure()
    assert len(list(feed.training(range(2)))) == 2 and len(waits) > 0


@pytest.mark.parametrize(("algorithm", "expected"), [("LP", 0), ("BOnly", 2)])
def test_features_are_looked_up_without_workers(make_args, pacs_like, monkeypatch, algorithm, expected):
    workers, read = [], feed_module.stream
    monkeypatch.setattr(feed_module, "stream", lambda *args: workers.append(args[2]) or read(*args))
    args = make_args(dataset="PACS", data_dir=str(pacs_like), algorithm=algorithm, workers=2)
    setup = run_setup.set_up(replace(args, hparams=json.dumps({**TINY, "data_augmentation": False}), cache_dir="none"))
    feed = Feed(setup, setup.make_algorithm())
    next(feed.training(range(1)))
    feed.accuracies(0, ["env1_out"])
    assert workers == [expected] * 2


def test_a_profile_counts_no_decoding_of_features(make_args, pacs_like):
    args = make_args(dataset="PACS", data_dir=str(pacs_like), algorithm="LP", train_eval_share=1.0, profile=True)
    args = replace(args, hparams=json.dumps({**TINY, "data_augmentation": False}), cache_dir="none")
    assert train.run(args, lambda share: None) == 0
    count = 3 * 3 * 4
    counted = RunFolder(args.output_dir).records()[-1]["profile"]["images"]
    assert counted == {"forwarded": count, "backwarded": count, "evaluated": 80}


def test_a_sweep_decodes_before_its_runs_start(pacs_like, tmp_path, monkeypatch):
    words = ["launch", "--datasets", "PACS", "--data_dir", str(pacs_like), "--algorithms", "BOnly", "LP"]
    words += [
        "--single_test_envs",
        "--n_hparams",
        "1",
        "--n_trials",
        "1",
        "--steps",
        "1",
        "--hparams",
        json.dumps(TINY),
    ]
    words += ["--output_dir", str(tmp_path / "sweep"), "--cache_dir", str(tmp_path / "cache"), "--skip_confirmation"]
    seen = {}

    def look(jobs, *rest):
        cache = entries(jobs[0].args)
        seen.update({entry.what: entry.bytes for entry in cache.list()})
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "launch_jobs", look)
    with pytest.raises(KeyboardInterrupt):
        sweep.main(words)
    assert len(seen) == 8 and {what.split(", ")[1] for what in seen} == {"decoded", "32x32"}


@pytest.mark.usefixtures("few_evaluated")
def test_losses_are_mean_cross_entropies_of_plain_logits(make_args, monkeypatch):
    setup = run_setup.set_up(make_args(algorithm="BOnly@label_smoothing=0.5"))
    algorithm = setup.make_algorithm()
    feed, names, classes = Feed(setup, algorithm), ["env1_out", "env2_in"], setup.dataset.num_classes
    measured = feed.losses(0, names), feed.accuracies(0, names)
    for env, name in enumerate(names, 1):
        split = setup.evaluated(name)
        images, labels = feed._plain(env).batch(split.keys, None), split.labels(split.keys)
        with torch.no_grad():
            logits = algorithm.eval().predict(setup.inputs.ready(images))
        assert measured[0][f"{name}_loss"] == pytest.approx(
            log_loss(labels.numpy(), logits.double().softmax(1), labels=range(classes)), rel=1e-6
        )
        assert measured[1][f"{name}_acc"] == (logits.argmax(1) == labels).double().mean().item()
    monkeypatch.setattr(algorithm, "predict", lambda images: torch.full((len(images), classes), float("nan")))
    assert all(np.isnan(value) for value in [*feed.losses(0, names).values(), *feed.accuracies(0, names).values()])
