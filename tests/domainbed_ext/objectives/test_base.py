"""What an objective sees of a step, and what of it is kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from domainbed_ext.algorithms.forward import Forward
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.objectives import Batch, Objective, register_objective
from domainbed_ext.runs import checkpoint
from tests.domainbed_ext.objectives.small_algorithms import CLASSES, DOMAINS, SHAPE, batches, make

pytestmark = pytest.mark.usefixtures("registries")


class Shifted(Objective):
    """Keeps a trained layer, a random buffer and a counter, and steps twice a step."""

    reads_features = True

    def __init__(self, num_classes, num_domains, hparams):
        super().__init__(num_classes, num_domains, hparams)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("noise", torch.rand(num_classes))
        self.seen = []

    def prepare(self, backbone):
        self.encoder = nn.Linear(backbone.num_features, num_outputs := 2)
        self.seen.append(("prepare", num_outputs, [name for name, _ in backbone.named_parameters() if "lora" in name]))

    def attach(self, backbone, model):
        self.seen.append(("attach", [name for name, _ in backbone.named_parameters() if "lora" in name]))

    def optimizer_options(self):
        return {"lr": 0.5}

    def before_step(self, optimizer):
        self.count += 1

    def loss(self, batch, model):
        features, logits = model.outputs(batch.images)
        self.batch, self.features, self.logits = batch, features, logits
        extra = (self.encoder(features) ** 2).mean()
        return {"loss": F.cross_entropy(logits, batch.labels) + extra, "extra": extra}

    def gradients(self, compute, parameters):
        compute()
        self.parameters_seen = len(list(parameters))
        return compute()


@pytest.fixture(autouse=True)
def shifted(registries):
    register_objective("Shifted")(Shifted)


def test_a_batch_knows_its_domains():
    minibatches = [(torch.full((size, 2), size), torch.arange(size)) for size in (2, 1, 3)]
    batch = Batch.of(minibatches, torch.device("cpu"))
    assert batch.sizes == (2, 1, 3) and batch.domains.tolist() == [0, 0, 1, 2, 2, 2]
    assert [part.tolist() for part in batch.split(batch.labels)] == [[0, 1], [0], [0, 1, 2]]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("method", ["BOnly", "FullFT", "LP"])
def test_features_are_the_input_of_the_classifier_in_float32(method, precision):
    algorithm = make(f"{method}+Shifted", precision=precision).eval()
    images, model = torch.randn(3, *SHAPE), Forward(algorithm)
    with torch.no_grad():
        features, logits = model.outputs(images)
        with model.autocast():
            expected = algorithm.backbone.forward_head(algorithm.backbone.forward_features(images), pre_logits=True)
        again = model.classify(features)
    assert features.dtype == logits.dtype == again.dtype == torch.float32
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if precision == "float32" else {"atol": 0.1, "rtol": 0.1}
    torch.testing.assert_close(features, expected.float(), **tolerance)
    torch.testing.assert_close(logits, algorithm.predict(images), **tolerance)
    torch.testing.assert_close(again, logits, **tolerance)
    assert not algorithm.backbone.get_classifier()._forward_pre_hooks  # nothing is left behind


def test_a_step_goes_through_the_objective():
    algorithm = make("BOnly+Shifted")
    values = algorithm.update(batches())
    loss = algorithm.objective
    assert values.keys() == {"loss", "extra"} and values["loss"] > values["extra"] > 0
    assert torch.equal(loss.batch.images, torch.cat([x for x, _ in batches()])) and loss.batch.sizes == (4,) * DOMAINS
    assert loss.logits.shape == (12, CLASSES) and loss.count == 1
    (_, _, before), (_, after) = loss.seen
    assert not before and after  # prepare sees the pretrained backbone, attach the adapted one
    trained = [p for p in algorithm.backbone.parameters() if p.requires_grad]
    assert loss.parameters_seen == len(trained)
    assert [(len(group["params"]), group["lr"]) for group in algorithm.optimizer.param_groups] == [
        (len(trained), algorithm.hparams["lr"]),
        (2, 0.5),
    ]


def test_an_objective_changes_neither_the_start_of_a_method_nor_what_follows():
    plain, composed = make("BOnly"), make("BOnly+Shifted")
    draw = torch.rand(1)  # after BOnly+Shifted
    make("BOnly")
    assert torch.equal(draw, torch.rand(1))
    assert all(torch.equal(p, composed.get_parameter(name)) for name, p in plain.named_parameters())


def test_checkpoints_have_the_state_of_an_objective_and_saved_models_have_not(tmp_path):
    algorithm = make("BOnly+Shifted")
    for seed in range(2):
        algorithm.update(batches(seed))
    checkpoint.save(tmp_path, 2, algorithm.training_state())
    algorithm.save(tmp_path / "model")
    assert [name for name in algorithm.trained() if "objective" in name] == []
    assert not any(name.startswith("objective") for name in algorithm.prediction_state()["tensors"])

    resumed = make("BOnly+Shifted")
    resumed.load_training_state(checkpoint.load(tmp_path)[0])
    assert resumed.objective.count == 2 and torch.equal(resumed.objective.noise, algorithm.objective.noise)
    assert resumed.update(batches(2)) == algorithm.update(batches(2))
    assert torch.equal(resumed.objective.encoder.weight, algorithm.objective.encoder.weight)

    saved = make("BOnly")  # the model needs no objective
    saved.load(tmp_path / "model")
    expected = make("BOnly+Shifted")
    expected.load(tmp_path / "model")
    images = torch.randn(2, *SHAPE)
    assert torch.equal(saved.eval().predict(images), expected.eval().predict(images))


def test_what_cannot_be_is_refused():
    class Shaping(Objective):
        shapes_features = True

    register_objective("Shaping")(Shaping)
    make("BOnly+Shaping")
    with pytest.raises(BenchmarkError, match=r"LP\+Shaping: Shaping shapes features, which LP does not train"):
        make("LP+Shaping")
    with pytest.raises(BenchmarkError, match=r"FullFT\+Shifted on deit_tiny_dist.*this backbone has 2"):
        make("FullFT+Shifted", backbone="deit_tiny_distilled_patch16_224", image_size=32)
