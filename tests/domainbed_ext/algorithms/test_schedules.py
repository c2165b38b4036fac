"""Learning rates over a run: their factors, and that each parameter group keeps its own rate."""

import random

import pytest
import torch

from domainbed_ext.algorithms.full import FullFT
from domainbed_ext.algorithms.names import get_algorithm_class
from domainbed_ext.algorithms.schedules import SCHEDULES, Schedule
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.hparams_registry import resolve
from domainbed_ext.report.methods import label_of
from tests.domainbed_ext.objectives.small_algorithms import CLASSES, DOMAINS, SHAPE, batches, make


def factors(name, warmup, steps):
    schedule = Schedule(name, warmup, steps)
    return [schedule.factor(step) for step in range(steps)]


def test_the_rate_is_constant_without_a_schedule():
    assert Schedule.of({}, 7).is_constant and Schedule.of(resolve("FullFT", "PACS"), 7).is_constant
    assert factors("constant", 0.0, 7) == [1.0] * 7
    assert not Schedule("constant", 0.1, 7).is_constant and not Schedule("cosine", 0.0, 7).is_constant


def test_cosine_and_linear_are_torchs():
    parameter = torch.nn.Parameter(torch.zeros(1))
    for name, kind in (
        ("cosine", lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)),
        ("linear", lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 30)),
    ):
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        scheduler, theirs = kind(optimizer), []
        for _ in range(30):
            theirs.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert factors(name, 0.0, 30) == pytest.approx(theirs)


def test_the_rate_rises_in_the_warm_up_and_falls_after_it():
    assert factors("linear", 0.3, 10) == pytest.approx(
        [1 / 4, 2 / 4, 3 / 4, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]
    )
    assert factors("constant", 0.25, 4) == [0.5, 1.0, 1.0, 1.0]
    draw = random.Random(0)
    for _ in range(200):
        name, warmup, steps = draw.choice(list(SCHEDULES)), draw.choice([0.0, draw.random()]), draw.randint(1, 50)
        rates, rising = factors(name, warmup, steps), round(warmup * steps)
        assert all(0 < rate <= 1 for rate in rates)
        assert rates[:rising] == sorted(set(rates[:rising])) and rates[rising:] == sorted(rates[rising:], reverse=True)
        assert rising == steps or rates[rising] == 1


@pytest.mark.parametrize("name", ["FullFT", "ERM", "BA@lr_B_ratio=4", "BOnly+MIRO", "LoRAPro", "LP+SAM"])
def test_every_group_keeps_its_own_rate_and_a_step_of_half_of_it_is_half_as_long(name):
    algorithm, half = make(name), make(name)
    own = [group["lr"] for group in algorithm.optimizer.param_groups]
    for factor in (0.25, 0.5):  # not a half of a quarter
        half.scale_rates(factor)
        assert [group["lr"] for group in half.optimizer.param_groups] == pytest.approx([factor * lr for lr in own])
    assert half.learning_rate == algorithm.learning_rate / 2 == half.hparams["lr"] / 2
    starts = {key: p.detach().clone() for key, p in algorithm.named_parameters() if p.requires_grad}
    for each in (algorithm, half):
        torch.manual_seed(1)
        each.update(batches())
    for key, start in starts.items():
        moved, halved = (each.get_parameter(key).detach() - start for each in (algorithm, half))
        torch.testing.assert_close(halved, moved / 2, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["Peft@method=lora_fa", "Peft@method=lora_plus"])
def test_optimizers_of_peft_follow_it_too(name):
    pytest.importorskip("peft")
    algorithm = make(name)
    own = [group["lr"] for group in algorithm.optimizer.param_groups]
    before = {key: p.detach().clone() for key, p in algorithm.named_parameters() if p.requires_grad}
    algorithm.scale_rates(0.0)
    algorithm.update(batches())
    assert all(torch.equal(p, before[key]) for key, p in algorithm.named_parameters() if p.requires_grad)
    algorithm.load_training_state(algorithm.training_state())
    algorithm.scale_rates(1.0)
    assert [group["lr"] for group in algorithm.optimizer.param_groups] == own


def test_a_method_with_a_schedule_of_its_own_or_no_optimizer_is_refused():
    class Own(FullFT):
        def __init__(self, *args):
            super().__init__(*args)
            self.schedule = torch.optim.lr_scheduler.ConstantLR(self.optimizer)

    settings = {**resolve("FullFT", "DigitsShift"), "weights": "none"}
    algorithm = Own(SHAPE, CLASSES, DOMAINS, settings)
    with pytest.raises(BenchmarkError, match="Own has a schedule of its own: leave schedule and warmup out"):
        algorithm.scale_rates(0.5)
    algorithm = get_algorithm_class("LP")(SHAPE, CLASSES, DOMAINS, settings)
    algorithm.optimizer = None
    assert algorithm.learning_rate is None
    with pytest.raises(BenchmarkError, match="LP has no optimizer as an attribute: leave schedule and warmup out"):
        algorithm.scale_rates(0.5)


def test_labels_say_it():
    name = "FullFT@schedule=cosine,warmup=0.1,clip_grad=1.0,label_smoothing=0.1,accumulate=4"
    assert label_of(name) == (
        "full fine-tuning, cosine schedule, warm-up 0.1, gradients clipped at 1.0, label smoothing 0.1, "
        "4 minibatches a step"
    )
    assert label_of("BOnly@adapter_seed=0") == "LoRA-FA, adapter seed 0"
