"""RotatedMNIST and ColoredMNIST on small IDX files, against DomainBed's construction said again in a few lines."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import InterpolationMode, rotate, to_pil_image, to_tensor

from domainbed_ext import train
from domainbed_ext.datasets.mnist import ColoredMNIST, RotatedMNIST
from domainbed_ext.errors import BenchmarkError

SIZES = {"train": 180, "t10k": 61}


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder, packed=False):
    """Random digits as IDX files; returns all images and all digits."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(1)
    images, digits = [], []
    for part, size in SIZES.items():
        images.append(draw.integers(0, 256, (size, 28, 28), dtype=np.uint8))
        digits.append((np.arange(size) % 10).astype(np.uint8))
        for kind, array in (("images-idx3", images[-1]), ("labels-idx1", digits[-1])):
            content = idx(array)
            name = f"{part}-{kind}-ubyte" + packed * ".gz"
            (folder / name).write_bytes(gzip.compress(content) if packed else content)
    return torch.tensor(np.concatenate(images)), torch.tensor(np.concatenate(digits)).long()


@pytest.fixture
def mnist(tmp_path):
    return tmp_path, *write_mnist(tmp_path / "MNIST" / "raw")


def test_rotated_mnist_is_domainbeds(mnist):
    root, images, digits = mnist
    dataset = RotatedMNIST(root, [0], {})
    assert dataset.environments == ("0", "15", "30", "45", "60", "75")
    assert (dataset.input_shape, dataset.num_classes, len(dataset)) == ((1, 28, 28), 10, 6)
    assert (dataset.N_STEPS, dataset.CHECKPOINT_FREQ, dataset.AUGMENTATION) == (5001, 100, "none")
    torch.manual_seed(0)
    order = torch.randperm(len(images))
    images, digits = images[order], digits[order]
    for i, environment in enumerate(dataset.datasets):
        assert list(environment.targets) == digits[i::6].tolist()
        for n in (0, 9):
            turned = rotate(to_pil_image(images[i::6][n]), 15 * i, InterpolationMode.BILINEAR, fill=(0,))
            ours, label = environment[n]
            assert ours.mode == "RGB" and label == digits[i::6][n]
            assert torch.equal(to_tensor(ours), to_tensor(turned).expand(3, -1, -1))


def test_colored_mnist_is_domainbeds(mnist):
    root, images, digits = mnist
    dataset = ColoredMNIST(root, [0], {})
    assert dataset.environments == ("+90%", "+80%", "-90%")
    assert (dataset.input_shape, dataset.num_classes, len(dataset)) == ((2, 28, 28), 2, 3)
    torch.manual_seed(0)
    order = torch.randperm(len(images))
    images, digits = images[order], digits[order]
    for i, share in enumerate((0.1, 0.2, 0.9)):
        x, y = images[i::3], (digits[i::3] < 5).float()
        y = (y - (torch.rand(len(y)) < 0.25).float()).abs()
        colours = (y - (torch.rand(len(y)) < share).float()).abs().long()
        assert list(dataset[i].targets) == y.long().tolist()
        for n in range(len(x)):
            expected = torch.zeros(3, 28, 28)
            expected[colours[n]] = x[n] / 255
            assert torch.equal(to_tensor(dataset[i][n][0]), expected)


def test_every_digit_is_in_one_environment_and_the_global_generator_is_left_alone(mnist):
    root, images, _ = mnist
    state = torch.get_rng_state()
    dataset = RotatedMNIST(root, [0], {})
    assert torch.equal(state, torch.get_rng_state())
    dealt = {image.tobytes() for environment in dataset.datasets for image in environment.images}
    assert dealt == {image.numpy().tobytes() for image in images}
    assert len(dealt) == sum(map(len, dataset.datasets)) == 241


def test_the_images_are_not_augmented_and_a_run_ends(mnist, make_args):
    args = make_args(dataset="ColoredMNIST", data_dir=str(mnist[0]), steps=2)
    assert train.run(args, lambda share: None) == 0


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def text(path):
    path.write_text("<html>not found</html>")


@pytest.mark.parametrize("spoil", [cut, text], ids=["cut", "text"])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_broken_files_get_a_sentence(mnist, spoil, name):
    path = mnist[0] / "MNIST" / "raw" / name
    spoil(path) if name.startswith("train") or spoil is text else path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(BenchmarkError, match=f"{name.split('-')[0]}-.*is broken: delete both and get them by"):
        RotatedMNIST(mnist[0], [0], {})


def test_missing_files_get_a_sentence(mnist, tmp_path):
    (mnist[0] / "MNIST" / "raw" / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(
        BenchmarkError, match="no t10k-images-idx3-ubyte in .*: get them by: python -m domainbed_ext.pre"
    ):
        ColoredMNIST(tmp_path, [0], {})
    with pytest.raises(BenchmarkError, match="add --data_dir"):
        ColoredMNIST(None, [0], {})


def test_the_angle_turns_the_way_domainbeds_does(mnist):
    environment = RotatedMNIST(mnist[0], [0], {})[5]
    assert isinstance(environment.load(0), Image.Image) and environment.name == "75"
