import numpy as np
import pytest
import torch

from domainbed_ext import train
from domainbed_ext.datasets import DATASETS
from domainbed_ext.runs import setup as run_setup


@pytest.mark.parametrize(("name", "side"), [("Debug28", 28), ("Debug224", 224)])
def test_three_environments_of_sixteen_as_domainbed_draws_them(name, side):
    dataset = DATASETS[name](None, [0], {})
    assert dataset.environments == ("0", "1", "2") and dataset.num_classes == 2
    assert dataset.input_shape == (3, side, side)
    torch.manual_seed(0)
    for environment in dataset.datasets:
        values, labels = torch.randn(16, 3, side, side), torch.randint(0, 2, (16,))
        assert list(environment.targets) == labels.tolist()
        image, label = environment[7]
        assert (image.mode, image.size, label) == ("RGB", (side, side), int(labels[7]))
        pixels = (np.asarray(image).transpose(2, 0, 1) - 127.5) / 42.5
        np.testing.assert_allclose(pixels, values[7].clamp(-3, 3), atol=0.02)


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    first = DATASETS["Debug28"](None, [0], {})
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    again = DATASETS["Debug28"](None, [0], {})
    assert np.array_equal(first[2].images, again[2].images)


@pytest.mark.parametrize("name", ["Debug28", "Debug224"])
def test_the_default_batch_fits(make_args, name):
    assert (
        run_setup.set_up(make_args(dataset=name, backbone="vit_tiny_patch16_224", weights="none")).dataset.num_classes
        == 2
    )


def test_a_run(make_args):
    args = make_args(dataset="Debug28", steps=2)
    assert train.run(args, lambda share: None) == 0
