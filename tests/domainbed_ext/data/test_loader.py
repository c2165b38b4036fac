import numpy as np
import pytest
import torch

from domainbed_ext.data.augmentation import AUGMENTATIONS
from domainbed_ext.data.loader import Evaluated, EvaluationBatches, Minibatches, stream
from domainbed_ext.data.splits import Split
from domainbed_ext.datasets.base import Environment
from domainbed_ext.datasets.folders import PACS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models.inputs import Inputs
from domainbed_ext.runs.features import Features
from domainbed_ext.runs.images import Augmented, Uncached

SIZE = (24, 24)


@pytest.fixture
def splits(pacs_like):
    return [Split(environment, range(4, 20)) for environment in PACS(pacs_like, [3], {}).datasets[:3]]


def source(split, augmentation="none"):
    return Augmented(Uncached(split.environment), AUGMENTATIONS[augmentation], SIZE)


def minibatches(splits, seed=0, **options):
    sources = [source(split, "domainbed") for split in splits]
    return Minibatches(splits, sources, batch_size=5, seed=seed, **options)


def training_stream(batches, steps, workers):
    return stream(batches, steps, workers, lambda batch: batch)


def evaluation(parts, batch_size, workers=0):
    batches = EvaluationBatches(parts, batch_size)
    return list(stream(batches, range(len(batches)), workers, lambda batch: batch))


def equal(first, second):
    return all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def test_one_minibatch_an_environment(splits):
    batch = next(training_stream(minibatches(splits), range(1), workers=0))
    assert [(x.shape, y.shape) for x, y in batch] == [((5, 3, 24, 24), (5,))] * 3
    assert batch[0][0].dtype == torch.uint8 and batch[0][1].dtype == torch.int64


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
    batches = evaluation([Evaluated(splits[0], source(splits[0]))], 7)
    assert [len(x) for x, *_ in batches] == [7, 7, 2]
    assert torch.cat([y for _, y, _ in batches]).tolist() == [splits[0].environment.targets[i] for i in range(4, 20)]
    again = evaluation([Evaluated(splits[0], source(splits[0]))], 7, workers=2)
    assert all(torch.equal(a, b) for x, y in zip(batches, again, strict=True) for a, b in zip(x, y, strict=True))


def test_splits_are_evaluated_as_one_row_of_batches(splits):
    parts = [Evaluated(split, source(split)) for split in (splits[0], Split(splits[1].environment, [3]), splits[2])]
    batches = evaluation(parts, 10)
    assert [len(x) for x, *_ in batches] == [10, 10, 10, 3]
    numbers = torch.cat([numbers for *_, numbers in batches]).tolist()
    assert numbers == [0] * 16 + [1] + [2] * 16
    apart = [x for part in parts for x, *_ in evaluation([part], 100)]
    assert torch.equal(torch.cat([x for x, *_ in batches]), torch.cat(apart))
    assert evaluation([], 10) == []


def test_images_are_resized_without_their_aspect_and_normalised(splits):
    inputs = Inputs((24, 12), mean=(0.5,) * 3, std=(0.25,) * 3)
    pixels = Augmented(Uncached(splits[0].environment), AUGMENTATIONS["none"], inputs.size).batch([0], None)
    x = inputs.ready(pixels)
    assert x.shape[1:] == inputs.shape == (3, 24, 12)
    reference = torch.from_numpy(np.array(splits[0].environment[0][0].resize((12, 24), 2))).permute(2, 0, 1) / 255
    torch.testing.assert_close(x[0], (reference - 0.5) / 0.25, atol=1e-6, rtol=0)
    assert inputs.ready(x) is x  # what are no bytes any more stays as it is


def test_features_stand_for_images_by_index():
    features = torch.arange(12.0).view(4, 3)
    assert torch.equal(Features(features).batch([2, 0, 2], None), features[[2, 0, 2]])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_gets_a_sentence_from_a_worker_too(pacs_like, workers):
    path = pacs_like / "PACS" / "photo" / "dog" / "pic_000.png"
    path.write_text("hello")
    split = Split(PACS(pacs_like, [3], {}).datasets[2], range(4))
    with pytest.raises(
        BenchmarkError, match="^not a readable image: .*pic_000.png; replace or delete such files .*no kind.*.$"
    ):
        evaluation([Evaluated(split, source(split))], 2, workers)


def drawn(minibatches, steps):
    """The labels of consecutive draws of the first environment; its features tell the images apart."""
    return [float(x) for step in range(steps) for x in minibatches[step][0][0].flatten()]


class Labelled(Environment):
    """Labels alone; images are their own index."""

    name = "labelled"

    def __init__(self, targets):
        self.targets = targets


@pytest.fixture
def numbered():
    """Ten images, three of them of a rarer class."""
    return Split(Labelled([0] * 7 + [1] * 3), list(range(10)))


def epochs(split, balanced=False, seed=0, batch_size=4):
    numbers = Features(torch.arange(10.0)[:, None])
    return Minibatches([split], [numbers], batch_size, seed, balanced, "epochs")


def test_epochs_take_every_image_once_before_any_again(numbered):
    images = drawn(epochs(numbered), 15)  # six epochs: a batch may span two
    rounds = [images[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(each) == list(range(10)) for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
    assert images != drawn(epochs(numbered, seed=1), 15)


def test_a_step_of_an_epoch_needs_no_history(numbered):
    assert drawn(epochs(numbered), 9)[32:] == epochs(numbered)[8][0][0].flatten().tolist()


def test_balanced_epochs_give_classes_turns_and_each_class_epochs(numbered):
    images = drawn(epochs(numbered, balanced=True), 21)  # 42 turns of each class
    rare = [image for image in images if image >= 7]
    assert len(rare) == 42
    assert all(sorted(rare[start : start + 3]) == [7, 8, 9] for start in range(0, 42, 3))
    common = [image for image in images if image < 7]
    assert all(sorted(common[start : start + 7]) == list(range(7)) for start in range(0, 42, 7))


def test_epochs_do_not_depend_on_workers(splits):
    batches = minibatches(splits, seed=3, sampling="epochs")
    alone = list(training_stream(batches, range(4), workers=0))
    shared = list(training_stream(batches, range(4), workers=2))
    assert all(equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_augmented_evaluation_depends_on_its_seed_alone(splits):
    def images(workers, seed):
        return torch.cat(
            [x for x, *_ in evaluation([Evaluated(splits[0], source(splits[0], "domainbed"), seed)], 7, workers)]
        )

    alone = images(0, 5)
    torch.rand(3)
    assert torch.equal(alone, images(2, 5))
    assert not torch.equal(alone, images(0, 6))
