import json

import pytest

from domainbed_ext import hparams_registry
from domainbed_ext.algorithms.registry import ALGORITHMS
from domainbed_ext.datasets import DATASETS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.hparams_registry import resolve
from domainbed_ext.report.methods import label_of
from domainbed_ext.seeds import seed_hash

# What ERM has in facebookresearch/DomainBed @ b93c22a, measured: lr, weight_decay, batch_size, resnet_dropout,
# vit_dropout; the rest is fixed. Random values by (hparams_seed, trial_seed).
PHOTOGRAPHS = {
    None: (5e-5, 0.0, 32, 0.0, 0.0),
    (1, 0): (2.7028930742148706e-05, 0.00044832883881609976, 39, 0.5, 0.1),
    (2, 1): (0.0002692684204277505, 3.539788355410888e-06, 18, 0.5, 0.1),
    (19, 2): (3.25301517026644e-05, 0.007328859252981211, 21, 0.1, 0.0),
}
DOMAINNET_BATCHES = {None: 32, (1, 0): 28, (2, 1): 15, (19, 2): 17}
SMALL_DATASETS = ("RotatedMNIST", "ColoredMNIST", "Debug28")
SMALL = {
    None: (1e-3, 0.0, 64, 0.0, 0.0),
    (1, 0): (0.00011906162909279594, 0.0, 372, 0.5, 0.1),
    (2, 1): (0.0025521952552627065, 0.0, 61, 0.5, 0.1),
    (19, 2): (0.00015242216222304298, 0.0, 89, 0.1, 0.0),
}


@pytest.mark.parametrize("seeds", PHOTOGRAPHS)
@pytest.mark.parametrize(
    "dataset",
    ["VLCS", "PACS", "OfficeHome", "TerraIncognita", "DomainNet", "Debug224", *SMALL_DATASETS],
)
def test_values_of_erm_are_domainbeds(dataset, seeds):
    if seeds is None:
        hparams = hparams_registry.default_hparams("ERM", dataset)
    else:
        hparams = hparams_registry.random_hparams("ERM", dataset, seed_hash(*seeds))
    names = "lr", "weight_decay", "batch_size", "resnet_dropout", "vit_dropout"
    expected = (SMALL if dataset in SMALL_DATASETS else PHOTOGRAPHS)[seeds]
    if dataset == "DomainNet":
        expected = (*expected[:2], DOMAINNET_BATCHES[seeds], *expected[3:])
    assert tuple(hparams[name] for name in names) == expected
    fixed = {"class_balanced": False, "nonlinear_classifier": False, "data_augmentation": True}
    assert {name: hparams[name] for name in fixed} == fixed


def test_random_values_of_ours_stay_what_they_were():
    drawn = hparams_registry.random_hparams("BOnly", "PACS", seed_hash(1, 0))
    assert (drawn["lr"], drawn["rank"], drawn["batch_size"]) == (0.0008547298386413518, 8, 39)


@pytest.mark.parametrize("hparams_seed", range(3))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradient_correction_is_off_unless_asked_for_and_needs_a_frozen_factor(algorithm, hparams_seed):
    hparams = resolve(algorithm, "PACS", hparams_seed)
    if algorithm in ("BOnly", "AOnly"):
        assert hparams["gradient_correction"] is False
        name = f"{algorithm}@gradient_correction=true"
        assert resolve(name, "PACS", hparams_seed) == {**hparams, "gradient_correction": True}
    else:
        assert "gradient_correction" not in hparams


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_value_is_plain_python_and_valid(algorithm, dataset):
    for hparams_seed in range(4):
        hparams = resolve(algorithm, dataset, hparams_seed)
        assert json.loads(json.dumps(hparams)) == hparams
        hparams_registry.check(hparams)


def test_a_name_fixes_hyperparameters():
    hparams = resolve("BOnly@rank=16,lr=0.01,targets=q+v", "PACS")
    assert (hparams["rank"], hparams["lr"], hparams["targets"]) == (16, 0.01, "q,v")
    assert resolve("BOnly@rank=16", "PACS", hparams_seed=3)["rank"] == 16


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("BOnyl", "unknown algorithm 'BOnyl': did you mean 'BOnly'"),
        ("BOnly@rnk=16", "unknown hyperparameter.*'rnk': did you mean 'rank'"),
        ("BOnly@16", "'16' is not hyperparameter=value"),
        ("BOnly@rank=many", "rank in the name .* should be of type int, not 'many'"),
        (
            "LP@r=8",
            "'r' belongs to BA, LoRAPro, BOnly, AOnly, [0-9]+ methods of Peft: leave",
        ),
        (
            "BA@gradient_correction=true",
            "unknown hyperparameter in the name .*: 'gradient_correction' belongs to BOnly, AO",
        ),
        ("BOnly@gradient_correction=1", "gradient_correction in the name .* should be of type bool, not 1"),
    ],
)
def test_a_wrong_name_gets_a_sentence(name, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        resolve(name, "PACS")


@pytest.mark.parametrize("text", ["{rank: 16}", "[1]", "16", "{"])
def test_malformed_hparams_get_a_sentence(text):
    with pytest.raises(BenchmarkError, match="--hparams is not"):
        hparams_registry.parse_hparams(text)


@pytest.mark.parametrize(
    ("name", "value"), [("image_size", 0), ("batch_size", 0), ("batch_size", 2.5), ("lr", 0), ("weight_decay", -1)]
)
def test_values_out_of_range_get_a_sentence(name, value):
    hparams = {**resolve("LP", "PACS"), name: value}
    with pytest.raises(BenchmarkError, match=f"{name} {value} should be"):
        hparams_registry.check(hparams)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("BOnly+Mixup@mixup_alpha=0.0", "mixup_alpha 0.0 should be above 0"),
        ("BOnly+MixStyle@mixstyle_blocks=0", "mixstyle_blocks 0 should be a number of blocks from 1 on, or null"),
        ("BOnly+MixStyle@mixstyle_blocks=two", "mixstyle_blocks two should be a number of blocks"),
        ("BOnly+RSC@rsc_f_drop_factor=1.5", "rsc_f_drop_factor 1.5 should be from 0 to 1"),
        ("LP+SAM@sam_rho=-0.1", "sam_rho -0.1 should be 0 or more"),
    ],
)
def test_an_objectives_values_out_of_range_get_a_sentence(name, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        hparams_registry.check(resolve(name, "PACS"))


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("schedule=cosin", "schedule cosin should be constant, cosine or linear"),
        ("warmup=1.0", "warmup 1.0 should be 0 or more, and below 1"),
        ("warmup=-0.1", "warmup -0.1 should be 0 or more"),
        ("clip_grad=0", "clip_grad 0 should be a number above 0, or null"),
        ("clip_grad=much", "clip_grad much should be a number above 0"),
        ("clip_grad=true", "clip_grad True should be a number above 0"),
        ("label_smoothing=1", "label_smoothing 1 should be 0 or more, and below 1"),
        ("accumulate=0", "accumulate 0 should be a whole number from 1 on"),
        ("accumulate=1.5", "accumulate 1.5 should be a whole number"),
        ("adapter_seed=-1", "adapter_seed -1 should be a whole number from 0 to"),
        ("adapter_seed=0.5", "adapter_seed 0.5 should be a whole number"),
        (f"adapter_seed={2**63}", "should be a whole number from 0 to 2\\^63 - 1, or null"),
    ],
)
def test_values_of_options_of_training_out_of_range_get_a_sentence(setting, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        hparams_registry.check(resolve(f"BOnly@{setting}", "PACS"))


def test_options_of_training_within_their_range_are_valid():
    for setting in ("schedule=linear,warmup=0.5", "clip_grad=1", "clip_grad=null", "accumulate=8", "adapter_seed=0"):
        hparams_registry.check(resolve(f"BOnly@{setting}", "PACS", hparams_seed=1))


def test_one_hparams_serves_algorithms_that_differ():
    others = hparams_registry.names()
    for algorithm, rank in (("LP", None), ("BA", 4)):
        hparams = resolve(algorithm, "PACS")
        hparams_registry.apply(hparams, {"rank": 4, "lr": 0.5}, "--hparams", others)
        assert (hparams.get("rank"), hparams["lr"]) == (rank, 0.5)
    with pytest.raises(BenchmarkError, match="unknown hyperparameter in --hparams: 'rnak': did you mean 'rank'"):
        hparams_registry.apply(resolve("LP", "PACS"), {"rnak": 4}, "--hparams", others)


def test_an_unknown_precision_gets_the_nearest():
    with pytest.raises(BenchmarkError, match="unknown precision 'fp32': did you mean 'float32'"):
        hparams_registry.check({**resolve("LP", "PACS"), "precision": "fp32"})


def test_what_overrides_what():
    def rank_and_rate(name, hparams=None, **options):
        final = resolve(name, "PACS", 1, hparams=hparams, **options)
        return final["rank"], final["lr"], final["backbone"], final["precision"]

    drawn = rank_and_rate("BOnly")
    assert rank_and_rate("BOnly", backbone="test_vit", precision="bf16") == (*drawn[:2], "test_vit", "bf16")
    given = '{"r": 3, "learning_rate": 0.5, "backbone": "vit_tiny_patch16_224"}'
    options = {"backbone": "test_vit", "precision": None}
    assert rank_and_rate("BOnly", given, **options) == (3, 0.5, "vit_tiny_patch16_224", drawn[3])
    assert rank_and_rate("BOnly@rank=5", given, **options) == (5, 0.5, "vit_tiny_patch16_224", drawn[3])


@pytest.mark.parametrize(
    ("hparams", "expected"),
    [
        ('{"target_modules": ["q", "fc1"]}', {"targets": "q,fc1"}),
        ('{"target_modules": "all-linear", "lora_dropout": 0.5}', {"targets": "all", "adapter_dropout": 0.5}),
        ('{"lora_alpha": 4, "wd": 0.5, "bs": 2}', {"alpha": 4, "weight_decay": 0.5, "batch_size": 2}),
    ],
)
def test_pefts_names_have_one_spelling(hparams, expected):
    assert resolve("BA", "PACS", hparams=hparams) == {**resolve("BA", "PACS"), **expected}


def test_a_hyperparameter_is_given_by_one_name():
    with pytest.raises(BenchmarkError, match="--hparams gives lr twice, as learning_rate and as lr"):
        resolve("BA", "PACS", hparams='{"learning_rate": 0.1, "lr": 0.2}')


def test_a_head_starts_somewhere():
    settings = resolve("BOnly@head_start=probe", "PACS")
    hparams_registry.check(settings)
    hparams_registry.check(
        {name: value for name, value in settings.items() if name != "head_start"}
    )  # of an earlier version
    with pytest.raises(BenchmarkError, match="head_start kaiming should be random, zero or probe"):
        hparams_registry.check({**settings, "head_start": "kaiming"})
    assert label_of("BOnly@head_start=probe") == "LoRA-FA, probe head"
