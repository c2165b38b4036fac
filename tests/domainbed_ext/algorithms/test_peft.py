"""`Peft@method=NAME`: every method of PEFT trains, is saved in PEFT's format, and resumes to the same numbers."""

import dataclasses
import json
import math
import pickle
from importlib.util import find_spec

import pytest
import torch
from safetensors import safe_open

from domainbed_ext import evaluate, hparams_registry, train
from domainbed_ext.algorithms.names import canonical_name, describe, get_algorithm_class, parse_name
from domainbed_ext.algorithms.peft_methods import OWN, VARIANTS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models import backbones
from domainbed_ext.objectives.l2sp import squared_distance
from domainbed_ext.report.methods import label_of, row_label_of
from domainbed_ext.runs import checkpoint
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.system import interrupts

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="needs PEFT")
STEPS = 8


def make(name="lora", extra="", objective="", **options):
    """The algorithm of a method of PEFT, on the small backbone in float32."""
    full = f"Peft{objective}@method={name}{extra}"
    given = {"backbone": "vit_pico_patch8_32", "weights": "none", "precision": "float32", **options}
    torch.manual_seed(0)
    return get_algorithm_class(full)((3, 32, 32), 5, 2, hparams_registry.resolve(full, "DigitsShift", **given))


def minibatches(steps=STEPS):
    """Two environments of three random images each."""
    draw = torch.Generator().manual_seed(7)
    return [
        [(torch.randn(3, 3, 32, 32, generator=draw), torch.randint(5, (3,), generator=draw)) for _ in range(2)]
        for _ in range(steps)
    ]


def begin(algorithm):
    torch.manual_seed(1)
    algorithm.begin(STEPS, lambda count: iter(minibatches(count)))
    return algorithm


def train_on(algorithm, batches, first=0):
    for step, batch in enumerate(batches, first):
        torch.manual_seed(step)
        algorithm.update(batch)
    return algorithm


def logits(algorithm):
    with torch.inference_mode():
        return algorithm.eval().predict(minibatches(1)[0][0][0])


def frozen_weights(algorithm):
    return {
        name: parameter.detach().clone()
        for name, parameter in algorithm.backbone.named_parameters()
        if not parameter.requires_grad
    }


@needs_peft
@pytest.mark.parametrize("name", VARIANTS)
def test_a_method_trains_resumes_and_is_saved_in_pefts_format(name, tmp_path, monkeypatch):
    from peft import PeftModel

    def refuse(*args, **kwargs):
        raise AssertionError("pickle")

    for module, function in ((torch, "load"), (torch, "save"), (pickle, "load")):
        monkeypatch.setattr(module, function, refuse)
    before = logits(make(name))
    whole = train_on(begin(make(name)), minibatches())
    assert not torch.allclose(logits(whole), before, atol=1e-3)

    stopped = train_on(begin(make(name)), minibatches()[: STEPS // 2])
    checkpoint.save(tmp_path, STEPS // 2, stopped.training_state())
    state, _ = checkpoint.load(tmp_path)
    resumed = make(name)
    resumed.load_training_state(state)
    train_on(resumed, minibatches()[STEPS // 2 :], STEPS // 2)
    assert torch.equal(logits(resumed), logits(whole))

    whole.save(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    loaded = make(name)
    loaded.load(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(whole))

    torch.manual_seed(0)
    plain = backbones.create("vit_pico_patch8_32", "none", 5)
    elsewhere = PeftModel.from_pretrained(plain, str(tmp_path / "saved")).eval()
    images = minibatches(1)[0][0][0]
    torch.testing.assert_close(elsewhere(images), logits(whole), atol=1e-4, rtol=1e-4)
    merged = elsewhere.merge_and_unload()
    assert type(merged) is type(plain) and not any("lora" in module for module, _ in merged.named_modules())
    torch.testing.assert_close(merged(images), logits(whole), atol=1e-3, rtol=1e-3)


@needs_peft
def test_what_is_declared_is_what_peft_has():
    from vitlorafa.peft_methods import PEFT_METHODS, Sizes, peft_config

    assert set(VARIANTS) == set(PEFT_METHODS)
    differing = {}
    for name, method in VARIANTS.items():
        assert (method.label, method.paper) == (PEFT_METHODS[name].label, PEFT_METHODS[name].paper)
        config = peft_config(name, Sizes(), ["fc1"])
        nested = [vars(each) for each in vars(config).values() if dataclasses.is_dataclass(each)]
        fields = {field: value for each in (*nested, vars(type(config)), vars(config)) for field, value in each.items()}
        for field in OWN[name]:
            default = method.hyperparameters[field].default
            if default is not None and fields.get(field, "missing") != default:
                differing[name, field] = default
    # Neither is a field of PEFT's config.
    assert set(differing) == {("lora_plus", "loraplus_lr_ratio"), ("lora_ga", "gradient_steps")}


def test_names_and_labels():
    assert canonical_name("peft@method=dora,r=4") == "Peft@method=dora,rank=4"
    assert canonical_name("Peft@r=4") == "Peft@method=lora,rank=4"
    assert canonical_name("Peft@lr=0.1,method=ia3,objective=erm") == "Peft@method=ia3,lr=0.1"
    assert parse_name("Peft@method=adalora,init_r=12") == ("Peft@method=adalora", {"init_r": 12})
    assert describe("Peft@method=dora,rank=4").label == "DoRA (PEFT)"
    assert describe("Peft@rank=4,method=dora").paper == "https://arxiv.org/abs/2402.09353"
    assert label_of("Peft@method=dora,rank=4") == "DoRA (PEFT), rank 4"
    assert row_label_of("Peft@method=lora_plus") == "Peft@method=lora_plus (LoRA+, PEFT)"


def test_each_method_has_its_own_hyperparameters():
    resolved = hparams_registry.resolve("Peft@method=vera", "PACS")
    assert resolved["method"] == "vera" and resolved["rank"] == 256 and "alpha" not in resolved
    shared = '{"rank": 4, "init_r": 9}'  # serves a whole sweep
    assert hparams_registry.resolve("Peft@method=ia3", "PACS", hparams=shared).keys().isdisjoint({"rank", "init_r"})
    assert hparams_registry.resolve("Peft@method=adalora", "PACS", hparams=shared)["init_r"] == 9


@pytest.mark.parametrize(
    ("algorithm", "hparams", "words"),
    [
        ("Peft@method=doar", None, ["method of Peft", "'doar'", "did you mean 'dora'"]),
        ("Peft@method=dora,method=ia3", None, ["gives method twice"]),
        ("Peft@method=dora,init_r=12", None, ["'init_r' belongs to Peft@method=adalora: leave it out"]),
        ("Peft@method=ia3,rank=12", None, ["'rank' belongs to BA, ", " methods of Peft: leave it out"]),
        ("Peft@method=adalora,beta1=high", None, ["beta1", "should be of type float, not 'high'"]),
        ("Peft@method=lora", '{"method": "dora"}', ["method 'dora'", "Peft@method=dora"]),
        ("Peft@method=lora", '{"peft_config": 3}', ["peft_config in --hparams should be of type dict, not 3"]),
        ("BOnly@method=dora", None, ["'method' belongs to", "methods of Peft"]),
    ],
)
def test_mistakes_in_names_and_hyperparameters_are_found_without_peft(algorithm, hparams, words):
    with pytest.raises(BenchmarkError) as error:
        hparams_registry.resolve(algorithm, "DigitsShift", hparams=hparams)
    assert [word for word in words if word not in str(error.value)] == []


@needs_peft
@pytest.mark.parametrize(
    ("name", "extra", "hparams", "words"),
    [
        ("dora", ",rank=0", None, ["Peft@method=dora on vit_pico_patch8_32", "PEFT refuses DoRA (PEFT)"]),
        ("lora", ",targets=qv", None, ["target", "'qv'"]),
        ("c3a", ",block_size=48", None, ["PEFT refuses C3A (PEFT)", "48"]),
        ("vblora", ",topk=500", None, ["PEFT refuses VB-LoRA (PEFT) here: selected index k out of range"]),
        ("lora_ga", ",direction=ArB2", None, ["unknown direction 'ArB2'", "did you mean 'ArB2r'"]),
        ("lora_ga", ",scale=stabel", None, ["unknown scale 'stabel'", "did you mean 'stable'"]),
        ("boft", ",boft_n_butterfly_factor=2", None, ["boft_n_butterfly_factor 2 only with its CUDA extension"]),
        ("adalora", ",init_r=8", None, ["init_r 8 has to be above the rank 8"]),
        ("adalora", ",tinit=99999", None, ["PEFT refuses AdaLoRA (PEFT)"]),
        ("lora", "", '{"peft_config": {"use_dra": true}}', ["field of PEFT's LoraConfig", "'use_dora'"]),
        ("lora", "", '{"peft_config": {"target_modules": ["head"]}}', ["target_modules in peft_config", "targets"]),
    ],
)
def test_what_peft_refuses_is_one_sentence(name, extra, hparams, words):
    with pytest.raises(BenchmarkError) as error:
        make(name, extra, hparams=hparams)
    assert [word for word in words if word not in str(error.value)] == [] and "\n" not in str(error.value)


def test_without_peft_the_line_that_installs_it_is_said(monkeypatch):
    from vitlorafa import peft_methods

    monkeypatch.setattr(peft_methods, "find_spec", lambda name: None)
    with pytest.raises(BenchmarkError, match=r"PEFT is not installed: pip install 'vitlorafa\[peft\]'"):
        make()


@needs_peft
def test_an_older_peft_is_named(monkeypatch):
    import peft

    monkeypatch.delattr(peft, "MissConfig")
    with pytest.raises(BenchmarkError, match=r"Peft@method=miss on vit_pico_patch8_32: PEFT .* does not have MiSS"):
        make("miss")


@needs_peft
def test_a_field_of_pefts_config_by_itself():
    config = make("lora", hparams='{"peft_config": {"use_rslora": true, "rank_pattern": {"fc1": 2}}}').adaptation.config
    assert config.use_rslora and config.rank_pattern == {"fc1": 2}


@needs_peft
def test_v_is_the_whole_qkv_and_the_head_trains():
    algorithm = make("ia3", ",targets=v")
    trained = {name for name, parameter in algorithm.backbone.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-2] for name in trained if "ia3" in name} == {"ia3_l"}
    assert {name.rpartition(".ia3")[0] for name in trained if "ia3" in name} == {
        f"blocks.{block}.attn.qkv" for block in range(4)
    }
    assert {name for name in trained if "ia3" not in name} == {
        f"head.modules_to_save.default.{part}" for part in ("weight", "bias")
    }


@needs_peft
def test_adalora_prunes_to_its_rank_and_saves_only_what_is_left(tmp_path):
    algorithm = train_on(begin(make("adalora", ",rank=2")), minibatches())
    config, layers = algorithm.adaptation.config, list(algorithm.adaptation.adapted())
    assert (config.total_step, config.init_r, config.tfinal) == (STEPS, 3, 2)
    left = {name: int((layer.lora_E["default"] != 0).sum()) for name, layer in layers}
    assert sum(left.values()) == 2 * len(layers) and set(left.values()) != {2}
    algorithm.save(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  (not a dict)
    assert {name: shapes[f"base_model.model.{name}.lora_A"][0] for name in left} == left
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert {name.removesuffix(".lora_E"): sum(kept) for name, kept in pattern.items()} == left


@needs_peft
def test_adaloras_penalty_is_what_peft_adds_to_a_loss():
    algorithm = make("adalora")
    tuner = algorithm.adaptation.model.base_model
    factors = [p for name, p in tuner.model.named_parameters() if ".lora_A" in name or ".lora_B" in name]
    products = [p @ p.T if p.shape[0] < p.shape[1] else p.T @ p for p in factors]
    expected = 0.5 * torch.stack([(each - torch.eye(len(each))).norm() for each in products]).mean()
    torch.testing.assert_close(algorithm.penalty(), expected)
    algorithm.penalty().backward()
    assert all(factor.grad is not None and factor.grad.abs().sum() > 0 for factor in factors)


@needs_peft
def test_lora_plus_has_two_learning_rates():
    algorithm = make("lora_plus", ",lr=0.01,loraplus_lr_ratio=4,weight_decay=0.1")
    names = {parameter: name for name, parameter in algorithm.named_parameters()}
    rates = {}
    for group in algorithm.optimizer.param_groups:
        for parameter in group["params"]:
            rates[names[parameter]] = group["lr"]
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {0.01}
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {0.04}
    assert set(rates) == {name for name, parameter in algorithm.named_parameters() if parameter.requires_grad}


@needs_peft
def test_lora_fa_moves_b_and_the_head_alone():
    algorithm = make("lora_fa")
    before = frozen_weights(algorithm)
    moving = {name: p.detach().clone() for name, p in algorithm.backbone.named_parameters() if p.requires_grad}
    train_on(algorithm, minibatches())
    assert any("lora_A" in name for name in before) and not any("lora_A" in name for name in moving)
    now = dict(algorithm.backbone.named_parameters())
    assert all(torch.equal(now[name], weight) for name, weight in before.items())
    assert not any(torch.equal(now[name], weight) for name, weight in moving.items())


@needs_peft
def test_lora_ga_starts_as_peft_starts_it(monkeypatch):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    def exact(matrix, q, niter):  # PEFT's draws at random
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :q], values[:q], right[:q].T

    monkeypatch.setattr(torch, "svd_lowrank", exact)
    ours = make("lora_ga", ",rank=4,gradient_steps=2")
    before = logits(ours)
    begin(ours)
    torch.testing.assert_close(logits(ours), before, atol=1e-4, rtol=1e-4)

    torch.manual_seed(0)
    model = backbones.create("vit_pico_patch8_32", "none", 5)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=ours.adaptation.layers,
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )

    def train_step():
        for batch in minibatches()[:2]:
            images, labels = (torch.cat(part) for part in zip(*batch, strict=True))
            torch.nn.functional.cross_entropy(model(images), labels).backward()

    preprocess_loraga(model, config, train_step)
    get_peft_model(model, config)
    for name, layer in ours.adaptation.adapted():
        theirs = model.get_submodule(name)
        for part in ("lora_A.default.weight", "lora_B.default.weight", "base_layer.weight"):
            torch.testing.assert_close(layer.get_parameter(part), theirs.get_parameter(part), atol=1e-4, rtol=1e-3)


@needs_peft
def test_pissa_needs_no_other_weights_than_the_pretrained_ones(tmp_path):
    """Its file is an ordinary LoRA, also for `load_adapter`, and an SVD of other rounding does not change it."""
    from vitlorafa import load_adapter

    algorithm = train_on(make("pissa"), minibatches())
    algorithm.save(tmp_path)
    torch.manual_seed(0)
    plain = load_adapter(backbones.create("vit_pico_patch8_32", "none", 5), tmp_path).eval()
    images = minibatches(1)[0][0][0]
    torch.testing.assert_close(plain(images), logits(algorithm), atol=1e-4, rtol=1e-4)

    other = make("pissa")
    start = {name: (A * 0.5, B) for name, (A, B) in other.adaptation.start.items()}
    other.adaptation.load_state_dict({"start": start})  # as if another machine had decomposed W
    assert not torch.allclose(logits(other), logits(algorithm), atol=1e-2)
    other.load(tmp_path)
    torch.testing.assert_close(logits(other), logits(algorithm), atol=1e-4, rtol=1e-4)


@needs_peft
@pytest.mark.parametrize("name", ["lora", "ia3", "boft"])
def test_weights_and_biases_are_those_of_the_linear_layer(name):
    algorithm = make(name, hparams='{"peft_config": {"bias": "all"}}' if name != "ia3" else None)
    with torch.no_grad():
        for parameter in algorithm.backbone.parameters():
            parameter.add_(0.01)
    algorithm.eval()
    weights = algorithm.weights()
    for layer, module in algorithm.adaptation.adapted():
        rows = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(0))
        expected = torch.nn.functional.linear(rows, weights[f"{layer}.weight"], weights[f"{layer}.bias"])
        torch.testing.assert_close(module(rows), expected, atol=1e-4, rtol=1e-4)


@needs_peft
def test_l2sp_counts_a_moved_bias_once():
    algorithm = make("lora", hparams='{"peft_config": {"bias": "all"}}')
    start = {name: weight.detach().clone() for name, weight in algorithm.weights().items()}
    (_, layer), *_ = algorithm.adaptation.adapted()
    with torch.no_grad():
        layer.get_base_layer().bias[0] += 0.5
    assert squared_distance(algorithm.weights(), start).item() == pytest.approx(0.25, rel=1e-4)


@needs_peft
@pytest.mark.parametrize("name", ["adalora", "lora_ga"])
def test_l2sp_on_methods_that_change_the_frozen_weights(name):
    algorithm = make(name, objective="+L2SP")
    begin(algorithm)
    values = [algorithm.update(batch) for batch in minibatches(3)]
    assert all(math.isfinite(each["loss"]) for each in values) and values[-1]["penalty"] > 0


@needs_peft
def test_boft_prints_nothing(capfd, caplog, recwarn):
    train_on(begin(make("boft")), minibatches(1))
    assert [str(each.message) for each in recwarn if "peft" in each.filename] == [] and caplog.text == ""
    assert capfd.readouterr() == ("", "")


@needs_peft
def test_the_trial_of_a_layer_leaves_random_numbers_as_they_are(monkeypatch):
    made = logits(make("lora", ",adapter_dropout=0.5"))
    monkeypatch.setattr("vitlorafa.peft_methods._try_layers", lambda layers: None)
    assert torch.equal(logits(make("lora", ",adapter_dropout=0.5")), made)


@needs_peft
def test_shared_projections_are_in_a_checkpoint_once():
    state = make("vera").training_state()["tensors"]
    assert len([name for name in state if ".vera_A." in name]) == 1


@needs_peft
def test_a_file_of_another_method_is_refused(tmp_path):
    make("lora").save(tmp_path)
    with pytest.raises(BenchmarkError, match=r"adapter_model.safetensors does not fit this Peft"):
        make("lora", ",rank=4").load(tmp_path)


@needs_peft
@pytest.mark.parametrize("name", ["adalora", "lora_ga"])
def test_a_run_in_bf16_resumes_to_the_same_records_and_is_reproduced(name, make_args, monkeypatch, tmp_path):
    options = {"algorithm": f"Peft@method={name},rank=2,targets=proj", "precision": "bf16", "steps": 6}
    whole = make_args(**options, output_dir=str(tmp_path / "whole"))
    assert train.run(whole) == 0
    cut = make_args(**options, output_dir=str(tmp_path / "cut"))

    def stop_halfway(share):
        if share >= 0.5:
            raise interrupts.Interrupted("test")

    assert train.run(cut, stop_halfway) == interrupts_code()
    assert train.run(cut) == 0
    records = [RunFolder(args.output_dir).records()[-1] for args in (whole, cut)]
    first, second = ({k: v for k, v in r.items() if k.endswith("_acc") or k == "loss"} for r in records)
    assert first == second
    for args in (whole, cut):
        _, reproduced = evaluate.evaluate(RunFolder(args.output_dir))
        assert [each for each in reproduced if not each.same] == []


def interrupts_code():
    from domainbed_ext.system.exit_codes import ExitCode

    return ExitCode.INTERRUPTED
