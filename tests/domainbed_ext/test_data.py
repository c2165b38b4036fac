import numpy as np
import pytest
import torch

from domainbed_ext.data import Inputs, Minibatches, Split, evaluation_stream, training_stream, transform
from domainbed_ext.datasets.folders import PACS
from domainbed_ext.errors import BenchmarkError

INPUTS = Inputs((24, 24))


@pytest.fixture
def splits(pacs_like):
    return [Split(environment, range(4, 20)) for environment in PACS(pacs_like, [3], {}).datasets[:3]]


def minibatches(splits, seed=0, **options):
    return Minibatches(splits, transform(INPUTS, "domainbed"), batch_size=5, seed=seed, **options)


def equal(first, second):
    return all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def test_one_minibatch_an_environment(splits):
    batch = next(training_stream(minibatches(splits), range(1), workers=0))
    assert [(x.shape, y.shape) for x, y in batch] == [((5, 3, 24, 24), (5,))] * 3
    assert batch[0][0].dtype == torch.float32 and batch[0][1].dtype == torch.int64


def test_batches_do_not_depend_on_workers_or_history(splits):
    alone = list(training_stream(minibatches(splits), range(6), workers=0))
    shared = list(training_stream(minibatches(splits), range(6), workers=2))
    assert all(equal(a, b) for a, b in zip(alone, shared, strict=True))
    torch.rand(3)  # what others draw does not matter
    resumed = list(training_stream(minibatches(splits), range(4, 6), workers=0))
    assert all(equal(a, b) for a, b in zip(alone[4:], resumed, strict=True))


def test_steps_environments_and_seeds_differ(splits):
    batches = minibatches(splits)
    assert not equal(batches[0], batches[1])
    assert not equal(batches[0], minibatches(splits, seed=1)[0])
    assert not torch.equal(batches[0][0][0], batches[0][1][0])


def test_drawing_leaves_the_global_generator_alone(splits):
    before = torch.get_rng_state()
    minibatches(splits)[0]
    assert torch.equal(before, torch.get_rng_state())


def test_samples_come_from_the_split_with_replacement(splits):
    narrow = [Split(splits[0].environment, [0, 10])]
    labels = torch.cat([minibatches(narrow)[step][0][1] for step in range(20)])
    assert set(labels.tolist()) == {0, 1}


def test_balanced_draws_every_class_equally(splits):
    rare = [Split(splits[0].environment, [0, *range(10, 20)])]  # one dog, ten houses
    labels = torch.cat([minibatches(rare, balanced=True)[step][0][1] for step in range(60)])
    assert 0.4 < labels.float().mean() < 0.6


def test_evaluation_sees_every_image_once_in_order(splits):
    batches = list(evaluation_stream(splits[0], transform(INPUTS), batch_size=7, workers=0))
    assert [len(x) for x, _ in batches] == [7, 7, 2]
    assert torch.cat([y for _, y in batches]).tolist() == [splits[0].environment.targets[i] for i in range(4, 20)]
    again = list(evaluation_stream(splits[0], transform(INPUTS), batch_size=7, workers=2))
    assert equal(batches, again)


def test_images_are_resized_without_their_aspect_and_normalised(splits):
    image, _ = splits[0].environment[0]
    inputs = Inputs((24, 12), mean=(0.5,) * 3, std=(0.25,) * 3)
    x = transform(inputs)(image)
    assert x.shape == inputs.shape == (3, 24, 12)
    reference = torch.from_numpy(np.array(image.resize((12, 24), 2))).permute(2, 0, 1) / 255
    torch.testing.assert_close(x, (reference - 0.5) / 0.25, atol=1e-6, rtol=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_gets_a_sentence_from_a_worker_too(pacs_like, workers):
    path = pacs_like / "PACS" / "photo" / "dog" / "pic_000.png"
    path.write_text("hello")
    split = Split(PACS(pacs_like, [3], {}).datasets[2], range(4))
    with pytest.raises(BenchmarkError, match="^not a readable image: .*pic_000.png; replace or delete such files$"):
        list(evaluation_stream(split, transform(INPUTS), 2, workers))
