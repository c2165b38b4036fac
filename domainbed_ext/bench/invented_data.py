"""An image data set with the folders of PACS and invented images: for rates, where no real images are at hand."""

from pathlib import Path

import numpy as np
from PIL import Image

from domainbed_ext.datasets.folders import PACS

CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
SIDE = 227  # of PACS's images
_BLOBS = 16  # pixels of the small image that is enlarged: a photograph's size as a JPEG, about, unlike that of noise


def invent_data(folder: Path, per_class: int, side: int = SIDE) -> Path:
    """Writes JPEG files of smooth random colours with a little noise, the same in every call.

    Args:
        folder: Folder for the data set; it is created if it does not exist.
        per_class: Number of images of each class in each domain.
        side: Height and width of an image in pixels.

    Returns:
        The `--data_dir` of the images.
    """
    draw = np.random.default_rng(0)
    for domain in PACS.DOMAINS:
        for label, name in enumerate(CLASSES):
            place = folder / PACS.FOLDER / domain / name
            place.mkdir(parents=True, exist_ok=True)
            for number in range(per_class):
                blobs = draw.integers(0, 256, (_BLOBS, _BLOBS, 3), dtype=np.uint8)
                blobs[..., label % 3] //= 2  # so that there is something to learn
                image = Image.fromarray(blobs).resize((side, side), Image.Resampling.BICUBIC)
                pixels = np.asarray(image, np.int16) + draw.integers(-8, 9, (side, side, 3), dtype=np.int16)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{number:03d}.jpg", quality=90)
    return folder
