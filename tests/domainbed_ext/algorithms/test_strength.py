"""At strength a, an algorithm predicts with start + a·(trained − start)."""

import pytest
import torch
from torch import nn

import vitlorafa
from domainbed_ext.algorithms.full import FullFT
from domainbed_ext.algorithms.names import get_algorithm_class
from domainbed_ext.algorithms.peft_adaptations import weight_and_bias
from domainbed_ext.algorithms.registry import METHODS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.hparams_registry import resolve

SHAPE = (3, 32, 32)
OWN = [name for name in METHODS.registered() if name != "Peft"]
VARIANTS = list(METHODS["Peft"].variants)


def make(name, kind=None, **hparams):
    torch.manual_seed(0)
    settings = {"lr": 0.01, "weights": "none", "precision": "float32", "head_start": "probe", **hparams}
    algorithm = (kind or get_algorithm_class(name))(SHAPE, 10, 3, {**resolve(name, "DigitsShift"), **settings})
    algorithm.keep_start()
    return algorithm


def probe(algorithm):
    """A head at which an algorithm starts, and the logits of that on the pretrained backbone."""
    draw = torch.Generator().manual_seed(1)
    width = algorithm.backbone.num_features
    return {"weight": torch.randn(10, width, generator=draw), "bias": torch.randn(10, generator=draw)}


def batches():
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(4, *SHAPE, generator=draw), torch.arange(4)) for _ in range(3)]


IMAGES = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(2))


def predict(algorithm, strength=None):
    if strength is not None:
        algorithm.set_strength(strength)
    with torch.inference_mode():
        return algorithm.eval().predict(IMAGES)


def train(algorithm, steps=2):
    for _ in range(steps):
        algorithm.update(batches())
    return algorithm


def start_at_probe(algorithm):
    algorithm.start_head(probe(algorithm))
    algorithm.keep_start()
    return algorithm


@pytest.mark.parametrize("name", OWN)
def test_strength_0_is_the_probe_and_strength_1_what_was_trained(name):
    algorithm = start_at_probe(make(name))
    reference = start_at_probe(make("LP"))  # on the same backbone: the same seed
    train(algorithm)
    trained = predict(algorithm)
    assert torch.equal(predict(algorithm, 0), predict(reference))
    half = predict(algorithm, 0.5)
    assert torch.equal(predict(algorithm, 0), predict(reference))
    assert torch.equal(predict(algorithm, 1), trained)
    assert not torch.equal(half, trained) and not torch.equal(half, predict(reference))


def test_full_fine_tuning_at_half_strength_has_weights_halfway():
    algorithm = start_at_probe(make("FullFT"))
    before = {name: p.detach().clone() for name, p in algorithm.backbone.named_parameters()}
    after = {name: p.detach().clone() for name, p in train(algorithm).backbone.named_parameters()}
    algorithm.set_strength(0.25)
    for name, parameter in algorithm.backbone.named_parameters():
        torch.testing.assert_close(parameter, before[name] + 0.25 * (after[name] - before[name]), rtol=1e-6, atol=1e-7)


def test_an_adapter_at_half_strength_is_half_the_update_merged():
    algorithm = train(start_at_probe(make("BOnly")))
    head = {
        name: (algorithm.start[f"head.{name}"] + p.detach()) / 2
        for name, p in algorithm.backbone.head.named_parameters()
    }
    halves = {name: layer.delta_weight().detach() / 2 for name, layer in vitlorafa.adapter_layers(algorithm.backbone)}
    half = predict(algorithm, 0.5)
    algorithm.set_strength(1)
    plain = vitlorafa.remove(algorithm.backbone)
    with torch.no_grad():
        plain.head.load_state_dict(head)
        for name, update in halves.items():
            plain.get_submodule(name).weight += update
    torch.testing.assert_close(predict(algorithm), half, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["BA", "FullFT"])
def test_a_head_that_does_not_start_at_the_probe_stays_as_trained(name):
    algorithm, reference = train(make(name, head_start="random")), make("LP", head_start="random")
    reference.start_head(dict(algorithm.backbone.head.named_parameters()))
    assert torch.equal(predict(algorithm, 0), predict(reference))
    assert not any(key.startswith("head.") for key in algorithm.start)


def test_a_head_can_start_at_zero():
    assert not predict(make("BOnly", head_start="zero")).any()
    assert predict(make("BOnly", head_start="random")).any()


def test_statistics_of_batch_normalisation_are_those_of_the_start_at_0():
    algorithm, reference = make("FullFT", backbone="test_resnet"), make("LP", backbone="test_resnet")
    for each in (algorithm, reference):
        start_at_probe(each)
    train(algorithm)
    state = {name: buffer.clone() for name, buffer in algorithm.named_buffers()}
    trained = predict(algorithm)
    assert torch.equal(predict(algorithm, 0), predict(reference))
    assert predict(algorithm, 0.5).isfinite().all()
    assert torch.equal(predict(algorithm, 1), trained)
    assert all(torch.equal(buffer, state[name]) for name, buffer in algorithm.named_buffers())


class Beside(FullFT):
    """Trains a layer of its own beside the backbone."""

    def prepare(self, backbone, hparams):
        self.scales = nn.Linear(10, 10)

    def logits(self, images):
        return self.scales(self.backbone(images))

    predict = logits


def test_a_method_of_ones_own_is_interpolated_as_full_fine_tuning():
    algorithm = make("FullFT", Beside, head_start="random")
    before = algorithm.scales.weight.detach().clone()
    after = train(algorithm).scales.weight.detach().clone()
    algorithm.set_strength(0.5)
    torch.testing.assert_close(algorithm.scales.weight, (before + after) / 2)
    assert "algorithm:scales.weight" in algorithm.start and "algorithm:objective" not in str(algorithm.start.keys())


def test_training_alone_keeps_no_copy_of_the_start():
    algorithm = get_algorithm_class("FullFT")(SHAPE, 10, 3, resolve("FullFT", "DigitsShift") | {"weights": "none"})
    assert train(algorithm, 1).start is None
    with pytest.raises(BenchmarkError, match=r"needs the weights of strength 0: call keep_start\(\) before they train"):
        algorithm.set_strength(0.5)


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan"), True, "half"])
def test_what_is_no_strength_gets_a_sentence(strength):
    with pytest.raises(BenchmarkError, match=r"^strength .* should be from 0 \(where training started\) to 1"):
        make("BOnly").set_strength(strength)


@pytest.mark.parametrize("name", ["FullFT", "BOnly"])
def test_only_trained_weights_are_saved_and_replaced(name, tmp_path):
    algorithm = start_at_probe(make(name))
    algorithm.save(tmp_path)
    state = algorithm.training_state()
    algorithm.set_strength(0.5)
    for use in (
        lambda: algorithm.save(tmp_path),
        lambda: algorithm.load(tmp_path),
        lambda: algorithm.training_state(),
        lambda: algorithm.load_training_state(state),
    ):
        with pytest.raises(BenchmarkError, match=r"is for trained weights, not for strength 0.5: set strength 1"):
            use()
    algorithm.set_strength(1)
    algorithm.load(tmp_path)


@pytest.mark.parametrize("backbone", ["deit_tiny_distilled_patch16_224", "volo_d1_224"])
def test_a_probe_is_one_linear_layer(backbone):
    with pytest.raises(BenchmarkError, match=f"head_start=probe on {backbone}: a probe is one linear .* has 2 heads"):
        make("BitFit", backbone=backbone, image_size=32)


@pytest.mark.parametrize("method", [pytest.param(each, marks=pytest.mark.slow) for each in VARIANTS])
def test_whatever_peft_makes_of_a_weight_is_interpolated(method):
    pytest.importorskip("peft")
    algorithm, reference = (start_at_probe(make(name)) for name in (f"Peft@method={method}", "LP"))
    start = {name: weight.detach().clone() for name, weight in reference.backbone.named_parameters()}
    algorithm.begin(2, lambda count: [batches()] * count)
    train(algorithm)
    trained, weights = (
        predict(algorithm),
        {name: weight_and_bias(layer)[0] for name, layer in algorithm.adaptation.adapted()},
    )
    assert any(not torch.equal(weight, start[f"{name}.weight"]) for name, weight in weights.items())
    torch.testing.assert_close(predict(algorithm, 0), predict(reference), rtol=1e-4, atol=1e-5)
    algorithm.set_strength(0.5)
    for name, layer in algorithm.adaptation.adapted():
        torch.testing.assert_close(
            weight_and_bias(layer)[0], (start[f"{name}.weight"] + weights[name]) / 2, rtol=1e-4, atol=1e-5
        )
    assert torch.equal(predict(algorithm, 1), trained)
