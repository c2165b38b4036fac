"""Second moments of a layer's inputs, streamed over the images of a run."""

import numpy as np
import pytest
import torch
from torch import nn

from domainbed_ext.analyse.moments import Moments, input_moments
from domainbed_ext.runs.feed import Feed
from domainbed_ext.runs.setup import set_up


def test_moments_are_the_mean_over_all_vectors_that_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    batches = [torch.randn(2, 3, 5), torch.randn(4, 3, 5), torch.randn(1, 1, 5)]
    with Moments(model, ["0", "2"]) as moments:
        for batch in batches:
            model(batch)
    model(100 * batches[0])  # no longer counts
    vectors = np.concatenate([batch.reshape(-1, 5).double().numpy() for batch in batches])
    assert moments.of("0") == pytest.approx(vectors.T @ vectors / len(vectors), abs=1e-6)
    with torch.no_grad():
        hidden = np.concatenate([model[:2](batch).reshape(-1, 4).double().numpy() for batch in batches])
    assert moments.of("2") == pytest.approx(hidden.T @ hidden / len(hidden), abs=1e-6)


@pytest.fixture
def feed(make_args):
    setup = set_up(make_args(algorithm="FullFT", test_envs=[1]))
    return Feed(setup, setup.make_algorithm())


@pytest.mark.parametrize("counts", [(7, 7, 6), (1, 1, 0)])
def test_images_are_the_first_of_all_training_environments_and_plain(feed, counts):
    setup = feed.setup
    plain = np.stack(
        [
            feed.images.evaluation[env][key]
            for env, count in zip(setup.train_envs, counts, strict=True)
            for key in setup.splits[f"env{env}_in"].keys[:count]
        ]
    )
    images = torch.cat(list(feed.training_images(sum(counts))))
    assert torch.equal(images, setup.inputs.ready(torch.from_numpy(plain).permute(0, 3, 1, 2)))


def test_of_fewer_images_all_are_taken(feed, monkeypatch):
    monkeypatch.setattr(Feed, "_ready", lambda feed, images, labels: (images[:, 0, 0, 0], labels))
    sizes = [len(feed.setup.splits[f"env{env}_in"]) for env in feed.setup.train_envs]
    assert sum(map(len, feed.training_images(10**6))) == sum(sizes)


def test_moments_of_a_run_are_those_of_its_images(feed):
    name = "blocks.0.attn.qkv"
    moments = input_moments(feed.algorithm, feed, [name], 10).of(name)
    backbone, images = feed.algorithm.backbone, torch.cat(list(feed.training_images(10)))
    with torch.no_grad():
        tokens = backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(images)))
        inputs = backbone.blocks[0].norm1(tokens).flatten(0, 1).double().numpy()
    # The run may compute in bf16.
    assert moments == pytest.approx(inputs.T @ inputs / len(inputs), abs=0.02 * np.abs(moments).max())
