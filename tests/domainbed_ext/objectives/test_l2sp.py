import pytest
import torch
import torch.nn.functional as F

from domainbed_ext.algorithms.names import canonical_name, describe
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.objectives.l2sp import squared_distance
from tests.domainbed_ext.objectives.small_algorithms import batches, make
from vitlorafa import adapter_layers

METHODS = [
    "FullFT",
    "BA",
    "BOnly",
    "AOnly",
    "BitFit",
    "BA@init_A=pissa,init_B=pissa",
]


def composed(method, **hparams):
    base, at, rest = method.partition("@")
    return make(f"{base}+L2SP{at}{rest}", **hparams)


def effective_weights(algorithm):
    """All weights of the backbone without its head in float64, with the updates of adapters."""
    layers = dict(adapter_layers(algorithm.backbone))
    weights = {
        name: p.detach().double()
        for name, p in algorithm.backbone.named_parameters()
        if not name.startswith("head.") and "lora_" not in name
    }
    for name, layer in layers.items():
        weights[f"{name}.base.weight"] = layer.base.weight.double() + layer.delta_weight().detach().double()
    return weights


def test_a_distance_is_the_sum_of_squared_differences():
    draw = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(3, 4, generator=draw).double() for name in "ab"}
    start = {"a": torch.randn(3, 4, generator=draw).double()}
    expected = sum((x - y) ** 2 for x, y in zip(weights["a"].flatten(), start["a"].flatten(), strict=True))
    expected = expected + sum(x**2 for x in weights["b"].flatten())
    torch.testing.assert_close(squared_distance(weights, start), expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_penalty_is_the_distance_of_the_weights_that_the_model_computes_with(method):
    algorithm = composed(method, l2sp_alpha=0.7, l2sp_beta=0.3, lr=1e-2)
    start = effective_weights(algorithm)
    first = algorithm.update(batches())
    head = [p.detach().double() for p in make(method).backbone.head.parameters()]
    assert first["penalty"] == pytest.approx(0.15 * sum((p**2).sum().item() for p in head), rel=1e-5)  # no distance yet
    for step in range(2):
        algorithm.update(batches(step))
    now = effective_weights(algorithm)
    distance = sum(((now[name] - start[name]) ** 2).sum().item() for name in now)
    norm = sum((p.detach().double() ** 2).sum().item() for p in algorithm.backbone.head.parameters())
    images, labels = (torch.cat(each) for each in zip(*batches(3), strict=True))
    with torch.no_grad():
        nll = F.cross_entropy(algorithm.train().logits(images), labels).item()
    values = algorithm.update(batches(3))
    assert distance > 1e-3
    assert values["penalty"] == pytest.approx(0.35 * distance + 0.15 * norm, rel=1e-4)
    assert values["loss"] == pytest.approx(nll + values["penalty"], rel=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "lora_ga", "velora", "ia3"])
def test_the_distance_of_pefts_layers_is_that_of_what_they_compute(method, precision):
    pytest.importorskip("peft", "0.21")
    algorithm = make(f"Peft+L2SP@method={method}", l2sp_alpha=2.0, l2sp_beta=2.0, lr=1e-2, precision=precision)
    start = [layer.get_base_layer().weight.double() for _, layer in algorithm.adaptation.adapted()]
    algorithm.begin(3, lambda count: (batches(i) for i in range(count)))
    for step in range(2):
        algorithm.update(batches(step))
    expected = 0.0
    for (_, layer), W in zip(algorithm.adaptation.adapted(), start, strict=True):
        now = layer.get_base_layer().weight.double()
        if method == "ia3":
            scale = layer.ia3_l["default"].double()  # [d_out, 1], or [1, d_in] of fc2
            now = now * scale
        else:
            now = now + layer.scaling["default"] * (
                layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
            )
        expected += ((now - W) ** 2).sum().item()
    assert expected > 1e-3
    for parameter in algorithm.backbone.get_classifier().parameters():
        expected += (parameter.double() ** 2).sum().item() if parameter.requires_grad else 0
    values = algorithm.update(batches(2))
    assert values["penalty"] == pytest.approx(expected, rel=1e-2 if precision == "bf16" else 1e-4)


def test_weights_are_pulled_to_their_start():
    far, near = (make("FullFT+L2SP", l2sp_alpha=alpha, lr=1e-2) for alpha in (0.0, 100.0))
    start = effective_weights(far)
    for step in range(4):
        far.update(batches(step))
        near.update(batches(step))
    distances = [
        sum(((now - start[name]) ** 2).sum() for name, now in effective_weights(algorithm).items())
        for algorithm in (far, near)
    ]
    assert distances[1] < 0.5 * distances[0]


def test_a_resumed_run_knows_the_start():
    algorithm, resumed = make("FullFT+L2SP"), make("FullFT+L2SP")
    algorithm.update(batches())
    resumed.load_training_state(algorithm.training_state())
    assert resumed.update(batches(1)) == algorithm.update(batches(1))


def test_the_name_alone_is_full_fine_tuning():
    assert canonical_name("L2SP@lr=0.1") == canonical_name("l2-sp@lr=0.1") == "FullFT+L2SP@lr=0.1"
    assert describe("FullFT+L2SP").label == "full fine-tuning + L2-SP"
    with pytest.raises(BenchmarkError, match="'SAM' is an objective: write it after a method"):
        canonical_name("SAM")
    with pytest.raises(BenchmarkError, match="'L2SP' is an objective: write it after a method"):
        canonical_name("L2SP+CORAL" if "CORAL" in describe("BOnly+CORAL").name else "L2SP+SAM")


def test_a_linear_probe_has_no_distance():
    with pytest.raises(BenchmarkError, match=r"LP\+L2SP: L2SP shapes features, which LP does not train"):
        make("LP+L2SP")
