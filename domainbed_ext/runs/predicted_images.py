"""Which images runs classified correctly, from the predictions that they keep: what intervals of differences draw."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

from domainbed_ext.errors import BenchmarkError, warn_once
from domainbed_ext.model_selection import SPLITS, Record
from domainbed_ext.report.inference.bootstrap import Images
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.runs.predictions import Predictions, load_predictions, load_step
from domainbed_ext.system.progress import bar

Use = Literal["auto", "required", "none"]
"""Whether predictions are used: where runs keep them, always (those without are an error), or not at all."""


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--images`.

    Args:
        parser: Parser of a command that computes differences.
    """
    parser.add_argument(
        "--images",
        choices=get_args(Use),
        default="auto",
        help="whether intervals of differences are over images too, for which runs keep predictions: where both "
        "methods have them (auto), always (required: runs without are an error), or never (none) (%(default)s)",
    )


class PredictedImages:
    """The images behind the accuracies of records, for those that were loaded.

    Args:
        input_dir: Folder that holds the runs' folders.
        use: Which predictions are used.
    """

    def __init__(self, input_dir: Path | str, use: Use = "auto") -> None:
        self._root = Path(input_dir)
        self._use = use
        self._images: dict[tuple[str, int], dict[str, Images] | None] = {}
        self._names: dict[tuple[str, ...], tuple[str, ...]] = {}  # which runs repeat, and are kept once

    def __call__(self, record: Record) -> dict[str, Images] | None:
        """The images of a record's accuracies, by their names such as "env0_in_acc"; None if they were not loaded.

        Args:
            record: Record of a run.
        """
        return self._images.get(_key(record))

    def load(self, records: Iterable[Record]) -> None:
        """Reads predictions of records; derived runs have none.

        Args:
            records: Records of any number of runs.

        Raises:
            BenchmarkError: Predictions are required, and a run keeps none of a record's step.
        """
        wanted = {_key(record): record for record in records if "derived" not in record}
        if self._use == "none":
            return
        with bar("predictions", len(wanted), "runs") as progress:
            for key, record in wanted.items():
                self._images[key] = self._read(record)
                progress.advance(1)

    def _read(self, record: Record) -> dict[str, Images] | None:
        run, step = RunFolder(self._root / record["run"]), record["step"]
        try:
            predictions = load_step(run, step)
        except BenchmarkError as error:
            if self._use == "required":
                raise
            warn_once(f"{error}; until then, intervals of its differences are over trials alone")
            return None
        if predictions is not None:
            return self._images_of(predictions)
        if self._use == "required":
            load_predictions(run)  # an error if there are none
            raise BenchmarkError(
                f"{run.path} keeps predictions of its selected and its last step, but the tables select step {step}: "
                "choose another --selection, or --images auto"
            )
        return None

    def _images_of(self, predictions: Predictions) -> dict[str, Images]:
        images: dict[str, Images] = {}
        for env, part in enumerate(predictions.parts.values()):
            is_right = (part.is_right == 1).numpy()
            for split in SPLITS:
                chosen: Any = part.of_split(split).numpy()
                if chosen.any():
                    names = tuple(name for name, each in zip(part.names, chosen, strict=True) if each)
                    images[f"env{env}_{split}_acc"] = Images(self._names.setdefault(names, names), is_right[chosen])
        return images


def _key(record: Record) -> tuple[str, int]:
    return record["run"], record["step"]
