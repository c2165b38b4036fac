"""Small pictures of a data set's images, for pages."""

import base64
import io
from collections.abc import Mapping
from functools import cache
from typing import Any

from PIL import Image

from domainbed_ext.datasets.base import Environment, MultipleDomainDataset
from domainbed_ext.datasets.digest import digest
from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.errors import BenchmarkError

SIDE = 72  # pixels
_QUALITY = 70  # of JPEG


class Thumbnails:
    """Pictures of the images that runs were evaluated on, from where the runs found them."""

    def __init__(self) -> None:
        self._opened: dict[tuple[str, str | None], MultipleDomainDataset | None] = {}
        self._index = cache(_index)

    def make(self, record: Mapping[str, Any], env: int, name: str) -> str | None:
        """Makes the picture of an image.

        Args:
            record: Record of a run that was evaluated on it.
            env: Index of its environment.
            name: Name of the image, see `Environment.image_names`.

        Returns:
            Data URI; None if the data set is not there, is another by now, or has no such image.
        """
        dataset = self._open(record)
        if dataset is None or (index := self._index(dataset[env]).get(name)) is None:
            return None
        try:
            image = dataset[env].load(index)
        except BenchmarkError:
            return None
        image.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR)
        image.save(file := io.BytesIO(), "JPEG", quality=_QUALITY)
        return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"

    def _open(self, record: Mapping[str, Any]) -> MultipleDomainDataset | None:
        """The data set of a run, if it is there and the same as then."""
        args = record["args"]
        key = args["dataset"], args.get("data_dir")
        if key not in self._opened:
            self._opened[key] = None
            if args["dataset"] in DATASETS:
                try:
                    dataset = DATASETS[args["dataset"]](args.get("data_dir"), [0], dict(record.get("hparams") or {}))
                except BenchmarkError:
                    return None
                self._opened[key] = dataset if digest(dataset) == record.get("data_digest") else None
        return self._opened[key]


def _index(environment: Environment) -> dict[str, int]:
    """The index of each image of an environment by its name."""
    return {name: number for number, name in enumerate(environment.image_names())}
