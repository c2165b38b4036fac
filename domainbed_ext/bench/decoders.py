"""Other decoders of JPEG files, which users bring for speed: torchvision's, and those of packages that are installed.

Pillow-SIMD is not among them, because it takes the place of Pillow: where it is installed, the rows of PIL are its.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, read_file

Decoder = Callable[[str], Tensor]
"""Function from the path of an image file to its pixels, [3, height, width] in 8 bits."""


def decode_by_torchvision(path: str) -> Tensor:
    """Decodes by `torchvision.io`, which has a libjpeg-turbo of its own."""
    return decode_image(read_file(path), mode=ImageReadMode.RGB)


def find_decoders() -> tuple[dict[str, Decoder], list[str]]:
    """The decoders that are installed.

    Returns:
        Decoders by name, and the names of packages that are not installed.
    """
    found: dict[str, Decoder] = {"torchvision.io": decode_by_torchvision}
    missing = []
    for package, (module, decode) in _OPTIONAL.items():
        if find_spec(module):
            found[package] = decode
        else:
            missing.append(package)
    return found, missing


def _decode_by_opencv(path: str) -> Tensor:
    cv2 = import_module("cv2")
    return torch.from_numpy(cv2.cvtColor(cv2.imread(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)).permute(2, 0, 1)


def _decode_by_simplejpeg(path: str) -> Tensor:
    pixels = import_module("simplejpeg").decode_jpeg(Path(path).read_bytes(), "RGB")
    return torch.from_numpy(pixels).permute(2, 0, 1)


_OPTIONAL: dict[str, tuple[str, Decoder]] = {  # by name on PyPI: name of the module, decoder
    "opencv-python-headless": ("cv2", _decode_by_opencv),
    "simplejpeg": ("simplejpeg", _decode_by_simplejpeg),
}
