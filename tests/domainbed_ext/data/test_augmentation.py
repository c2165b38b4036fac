import itertools
import warnings

import numpy as np
import pytest
import torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy.stats import chisquare, ks_2samp
from torchvision import transforms as v1
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from domainbed_ext.data import augmentation
from domainbed_ext.data.augmentation import AUGMENTATIONS, Colours

OPERATIONS = ("brightness", "contrast", "saturation", "hue")
AMOUNTS = {**dict.fromkeys(OPERATIONS[:3], (0.7, 0.9, 1.0, 1.1, 1.3)), "hue": (-0.3, -0.2, -0.05, 0.0, 0.01, 0.13, 0.3)}
ROUNDED = 0.501  # levels, from a float64 value to the nearest integer by way of float32
SIZE = (24, 20)
N = 2000  # images on each side where distributions are compared


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def photograph():
    from sklearn.datasets import load_sample_image

    return np.asarray(Image.fromarray(load_sample_image("china.jpg")).resize((40, 32), Image.Resampling.BOX))


@pytest.fixture(scope="module")
def noise():
    """Every kind of pixel: any colour, greys, saturated ones, and ties between two channels."""
    pixels = rng().integers(0, 256, (40, 30, 3), dtype=np.uint8)
    pixels[:8] = pixels[:8, :, :1]
    pixels[8:16, :, 1] = pixels[8:16, :, 0]
    pixels[16:20] = 255 * (pixels[16:20] > 127)
    return pixels


def grey(levels):
    return levels @ [0.299, 0.587, 0.114]


def turned(levels, turn):
    hsv = rgb_to_hsv(levels / 255)
    hsv[..., 0] = (hsv[..., 0] + turn) % 1
    return 255 * hsv_to_rgb(hsv)


DEFINITIONS = {  # of float64 levels [height, width, 3]
    "brightness": lambda levels, factor: np.clip(factor * levels, 0, 255),
    "contrast": lambda x, factor: np.clip(grey(x).mean() + factor * (x - grey(x).mean()), 0, 255),
    "saturation": lambda x, factor: np.clip(grey(x)[..., None] + factor * (x - grey(x)[..., None]), 0, 255),
    "hue": turned,
}


def coloured(pixels, operations):
    """The image [height, width, 3] after the named operations, by `Colours`."""
    planes = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
    colours = Colours(planes)
    for name, *amount in operations:
        getattr(colours, name)(*amount)
    out = torch.empty_like(planes)
    colours.write(out)
    return out.permute(1, 2, 0)


def by_pil(image, name, *amount):
    return tv.to_grayscale(image, 3) if name == "greyscale" else getattr(tv, f"adjust_{name}")(image, *amount)


def deviation(a, b):
    return np.abs(np.asarray(a, float) - np.asarray(b, float)).max()


# Largest deviations in levels, of PIL from the definition and of ours from PIL. PIL cuts fractions off, takes grey and
# its mean in integers; hue has 256 steps, of up to 6 levels, and both the pixel's and the turn's are cut to one.
@pytest.mark.parametrize(
    "name, of_pil, from_pil", [("brightness", 1, 1), ("contrast", 1.2, 1), ("saturation", 1.2, 1), ("hue", 14, 14)]
)
def test_a_colour_operation_is_its_definition_rounded_and_pils_up_to_pils_rounding(noise, name, of_pil, from_pil):
    for amount in AMOUNTS[name]:
        ours, exact = coloured(noise, [(name, amount)]), DEFINITIONS[name](noise.astype(float), amount)
        theirs = by_pil(Image.fromarray(noise), name, amount)
        assert deviation(ours, exact) < ROUNDED
        assert deviation(theirs, exact) <= of_pil
        assert deviation(ours, theirs) <= from_pil
    assert deviation(coloured(noise, [("greyscale",)]), by_pil(Image.fromarray(noise), "greyscale")) <= 1


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_operations_in_any_order_clip_each_time_and_round_at_the_end(photograph, order):
    for draw in rng().uniform(-0.3, 0.3, (4, 4)):
        steps = [(OPERATIONS[place], draw[place] + (place < 3)) for place in order]
        exact = photograph.astype(float)
        for name, amount in steps:
            exact = DEFINITIONS[name](exact, amount)
        assert deviation(coloured(photograph, steps), exact) < ROUNDED
        assert deviation(coloured(photograph, [*steps, ("greyscale",)]), grey(exact)[..., None]) < ROUNDED


@pytest.mark.parametrize("size", [(32, 40), (20, 24), (70, 64), (1, 1), (33, 8)])
def test_none_is_torchvisions_resize_bit_by_bit(photograph, noise, size):
    images = [photograph, noise, noise[:1, :1], photograph[::2, 3:], np.tile(noise, (5, 4, 1))]
    batch = AUGMENTATIONS["none"](images, size, None)
    assert batch.dtype == torch.uint8 and batch.is_contiguous()
    for ours, image in zip(batch, images, strict=True):
        assert torch.equal(ours, tv.pil_to_tensor(v2.Resize(size)(Image.fromarray(image))))


@pytest.fixture
def recorded(monkeypatch):
    """What is done to each image of what is augmented, as (name, amount)."""
    images = []

    def begin(self, pixels):
        images.append([])
        Colours.__init__(self, pixels)

    def noting(name):
        def operation(self, *amount):
            images[-1].append((name, *amount))
            getattr(Colours, name)(self, *amount)

        return operation

    methods = {"__init__": begin, **{name: noting(name) for name in (*OPERATIONS, "greyscale")}}
    monkeypatch.setattr(augmentation, "Colours", type("Recorder", (Colours,), methods))
    return images


def boxes(draws, images):
    return augmentation.crop_boxes(draws[:, :22], np.array([image.shape[:2] for image in images]))


@pytest.mark.parametrize("size", [(32, 40), (24, 20), (64, 50)])
def test_crops_are_torchvisions_within_a_level(photograph, noise, size):
    images = [photograph, noise] * 10
    ours = AUGMENTATIONS["crop"](images, size, rng())
    for cropped, image, box in zip(ours, images, boxes(rng().random((20, 22)), images).tolist(), strict=True):
        theirs = tv.resized_crop(Image.fromarray(image), *box, size)
        assert deviation(cropped.permute(1, 2, 0), theirs) <= 1


def test_the_chain_is_torchvisions_for_the_same_numbers(photograph, recorded):
    images = [photograph] * 60
    ours = AUGMENTATIONS["domainbed"](images, SIZE, rng())
    mirrored = 0
    for image, box, steps in zip(ours, boxes(rng().random((60, 32)), images).tolist(), recorded, strict=True):
        theirs = tv.resized_crop(Image.fromarray(photograph), *box, SIZE)
        for step in steps:
            theirs = by_pil(theirs, *step)
        errors = [deviation(image.permute(1, 2, 0), x) for x in (theirs, tv.hflip(theirs))]
        assert min(errors) < 12 < max(errors)
        mirrored += errors[1] < errors[0]
    assert 15 < mirrored < 45


# Wide, tall, square; where some tries fit; and where none ever does.
@pytest.mark.parametrize("height, width", [(40, 60), (60, 40), (50, 50), (30, 52), (10, 100), (101, 10), (1, 1)])
def test_crops_are_distributed_as_torchvisions(height, width):
    n = 1500
    ours = boxes(rng().random((n, 22)), [np.empty((height, width, 3))] * n)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image = torch.empty(3, height, width)
        theirs = [v1.RandomResizedCrop.get_params(image, [0.7, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    both = [np.column_stack((x, x[:, 2] * x[:, 3], x[:, 3] / x[:, 2])) for x in (ours, np.array(theirs))]
    assert min(ks_2samp(a, b).pvalue for a, b in zip(both[0].T, both[1].T, strict=True)) > 0.001
    if not 1 / 2 < width / height < 2:
        assert deviation(*both) == 0  # the central crop


@pytest.mark.parametrize("name, value", [("AREA", (0.6, 1.0)), ("ASPECT", (0.8, 1.25))])
def test_other_crops_would_be_noticed(monkeypatch, name, value):
    monkeypatch.setattr(augmentation, name, value)
    with pytest.raises(AssertionError):
        test_crops_are_distributed_as_torchvisions(40, 60)


def statistics(batch):
    """What tells distributions of images apart, [n, statistics], of levels [n, 3, height, width]."""
    x = batch.numpy().astype(np.float32)
    chroma = np.ptp(x, axis=1)
    half = x.shape[-1] // 2
    asymmetry = x[..., :half].mean(axis=(1, 2, 3)) - x[..., half:].mean(axis=(1, 2, 3))
    detail = np.abs(np.diff(x, axis=-1)).mean(axis=(1, 2, 3))
    means = x.mean(axis=(2, 3))
    is_grey = chroma.max(axis=(1, 2)) < 2
    columns = (means - np.roll(means, 1, axis=1), x.std(axis=(1, 2, 3)), chroma.mean(axis=(1, 2)), is_grey)
    return np.column_stack((means, *columns, asymmetry, detail))


@pytest.fixture(scope="module")
def theirs(photograph):
    crop, mirror = v2.RandomResizedCrop(SIZE, scale=(0.7, 1.0)), v2.RandomHorizontalFlip()
    # Levels as floats, for on PIL images the jitter cuts fractions off: about 1.4 levels in all, which would show.
    jitter, grey = v2.ColorJitter(0.3, 0.3, 0.3, 0.3), v2.RandomGrayscale(p=0.1)
    chain = v2.Compose([crop, mirror, v2.ToDtype(torch.float32, scale=True), jitter, grey])
    image = tv.pil_to_tensor(Image.fromarray(photograph))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return statistics(torch.stack([chain(image) for _ in range(N)]).mul_(255).round_())


def likeness(photograph, theirs):
    """The least of the statistics' p values for ours and theirs being of one distribution."""
    ours = statistics(AUGMENTATIONS["domainbed"]([photograph] * N, SIZE, rng()))
    return min(ks_2samp(a, b).pvalue for a, b in zip(ours.T, theirs.T, strict=True))


def test_images_are_distributed_as_torchvisions(photograph, theirs):
    assert likeness(photograph, theirs) > 0.01


@pytest.mark.parametrize(
    "name, value",
    [
        ("MIRRORED", 0.4),
        ("GREY", 0.2),
        ("JITTER", 0.25),
        ("AREA", (0.5, 1.0)),
        ("Colours", type("WeakerHue", (Colours,), {"hue": lambda self, turn: Colours.hue(self, 0.75 * turn)})),
        ("Colours", type("Unclipped", (Colours,), {"_clip": lambda self, factor: None})),
    ],
)
def test_another_distribution_would_be_noticed(photograph, theirs, monkeypatch, name, value):
    monkeypatch.setattr(augmentation, name, value)
    assert likeness(photograph, theirs) < 1e-5


def test_orders_and_amounts_are_drawn_evenly_and_one_in_ten_is_grey(recorded):
    n = 3600
    AUGMENTATIONS["domainbed"]([np.full((1, 1, 3), 100, np.uint8)] * n, (1, 1), rng())
    orders = [tuple(name for name, *_ in steps[:4]) for steps in recorded]
    counts = [orders.count(order) for order in itertools.permutations(OPERATIONS)]
    assert sum(counts) == n and chisquare(counts).pvalue > 0.001
    evenly = np.linspace(-0.3, 0.3, n)
    for name in OPERATIONS:
        drawn = np.array([dict(steps[:4])[name] for steps in recorded]) - (name != "hue")
        assert ks_2samp(drawn, evenly).pvalue > 0.001
        assert np.abs(drawn).max() <= 0.3
    assert abs(sum(len(steps) == 5 for steps in recorded) / n - 0.1) < 0.02


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_sample_depends_on_seed_and_place_alone(photograph, noise, name):
    augment = AUGMENTATIONS[name]
    batch = augment([photograph, noise, photograph], SIZE, rng())
    other = augment([noise[:9, :3], noise, noise[:2], photograph], SIZE, rng())
    assert torch.equal(batch[1], other[1])
    assert torch.equal(batch, augment([photograph, noise, photograph], SIZE, rng()))
    if name != "none":
        assert not torch.equal(batch[0], batch[2])
        assert not torch.equal(batch, augment([photograph, noise, photograph], SIZE, rng(1)))


def test_the_number_of_threads_changes_nothing():
    images = [rng(seed).integers(0, 256, (200, 230, 3), dtype=np.uint8) for seed in range(6)]
    threads, batches = torch.get_num_threads(), []
    try:
        for count in (1, 5):
            torch.set_num_threads(count)
            batches.append(AUGMENTATIONS["domainbed"](images, (223, 211), rng()))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*batches)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_read_only_memory_is_read_without_a_word(noise, tmp_path, name):
    noise.tofile(tmp_path / "pixels")
    mapped = np.memmap(tmp_path / "pixels", np.uint8, "r", shape=noise.shape)
    torch.set_warn_always(True)  # else torch warns once a process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            batch = AUGMENTATIONS[name]([mapped, mapped[3:, 5:]], noise.shape[:2], rng())
    finally:
        torch.set_warn_always(False)
    assert torch.equal(batch, AUGMENTATIONS[name]([noise, noise[3:, 5:]], noise.shape[:2], rng()))
    assert np.array_equal(mapped, noise)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (5, 31)])
def test_tiny_images_and_any_size(noise, name, size):
    images = [noise[:1, :1], noise[:8, :8], noise[:1, :30], noise[:40, :1]]
    batch = AUGMENTATIONS[name](images, size, rng())
    assert batch.shape == (4, 3, *size) and batch.dtype == torch.uint8 and batch.is_contiguous()
    if name == "crop":
        assert (batch[0] == torch.from_numpy(noise[0, 0].copy())[:, None, None]).all()
    assert AUGMENTATIONS[name]([], size, rng()).shape == (0, 3, *size)
