"""Classifies image files with the trained model of a run: labels and probabilities, as CSV or JSON.

python -m domainbed_ext.predict --run runs/one photos/ drawing.png --out predictions.csv
"""

import argparse
import csv
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from domainbed_ext.datasets.listing import list_images_below
from domainbed_ext.errors import BenchmarkError, warn_once
from domainbed_ext.runs import saved
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.system import garbage, option_values, strict_json
from domainbed_ext.system.command_line import START_AGAIN, CommandLine, as_command
from domainbed_ext.system.exit_codes import ExitCode
from domainbed_ext.system.files import replace_atomically
from domainbed_ext.system.progress import bar

if TYPE_CHECKING:
    from domainbed_ext.runs.classifier import Classifier

EXAMPLES = """\
examples:
  python -m domainbed_ext.predict --run runs/pacs/0657090f9a83ff76efe083a104fde93a photos/ drawing.png
  python -m domainbed_ext.predict --run runs/pacs/0657090f9a83ff76efe083a104fde93a photos/ --out photos.json

A row has the file, its label, the probability of that label, and the probability of every class. Images are resized
and normalised as those that the run was evaluated on. Files that cannot be read are left out and named, and the exit
code is 1 then.
"""


@dataclass(frozen=True)
class Prediction:
    """What a model predicts for an image.

    Attributes:
        file: Path of the image.
        label: Name of the predicted class; None if the model's outputs are not finite.
        probabilities: Probability of each class; NaN where outputs are not finite.
    """

    file: str
    label: str | None
    probabilities: tuple[float, ...]

    @property
    def probability(self) -> float:
        """The probability of the label."""
        return max(self.probabilities)


def predict(
    classifier: "Classifier",
    files: Sequence[str],
    batch_size: int | None = None,
    workers: int = 0,
    unreadable: dict[str, str] | None = None,
) -> Iterator[Prediction]:
    """Classifies image files.

    Args:
        classifier: Model of a run.
        files: Paths of the images.
        batch_size: Number of images at a time; None for the number that is fastest.
        workers: Number of processes that read images; 0 reads them in this one.
        unreadable: Dict that takes the reason for each file that cannot be read, which is left out.

    Yields:
        A prediction for each file, in their order.
    """
    from domainbed_ext.data.loader import stream
    from domainbed_ext.runs.image_batches import FileBatches

    left_out = {} if unreadable is None else unreadable
    batches = FileBatches(files, batch_size or classifier.batch_size, classifier.inputs.size)
    with bar("predicting", len(files), "images") as shown:
        device = classifier.algorithm.device
        for batch in stream(batches, range(len(batches)), workers, lambda batch: batch, device):
            left_out |= batch.reasons
            if batch.files:
                logits = classifier.logits(batch.images)
                is_finite = logits.isfinite().all(1).tolist()
                rows = logits.double().softmax(1).tolist(), logits.argmax(1).tolist()
                for file, finite, probabilities, label in zip(batch.files, is_finite, *rows, strict=True):
                    yield Prediction(file, classifier.classes[label] if finite else None, tuple(probabilities))
            shown.advance(len(batch.files) + len(batch.reasons))


def find_files(paths: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Finds the images that paths name.

    Args:
        paths: Paths of files, and of folders, whose images at any depth are meant.

    Returns:
        Paths of files, each once, and the reason for each path that there is nothing at.

    Raises:
        BenchmarkError: There is no image.
    """
    files: list[str] = []
    missing: dict[str, str] = {}
    for path in paths:
        if os.path.isdir(path):
            images, unused = list_images_below(path)
            files += images
            if unused:
                warn_once(
                    f"{len(unused)} image(s) of other endings in {path} are left out, e.g. {unused[0]}: name them"
                )
        elif os.path.exists(path):
            files.append(path)
        else:
            missing[path] = "no such file or folder"
    if not files:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in missing.items())
        raise BenchmarkError(
            f"no image in {', '.join(paths)}{f' ({reasons})' if reasons else ''}: give image files or folders"
        )
    return list(dict.fromkeys(files)), missing


def write_csv(predictions: Iterable[Prediction], classes: Sequence[str], file: TextIO) -> None:
    """Writes a header and a row for each prediction, as they come.

    Args:
        predictions: Predictions.
        classes: Names of the classes.
        file: File that is written to.
    """
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["file", "label", "probability", *(f"p({name})" for name in classes)])
    for each in predictions:
        values = (each.probability, *each.probabilities)
        writer.writerow(
            [each.file, each.label or "", *("" if math.isnan(value) else f"{value:.6g}" for value in values)]
        )


def write_json(predictions: Iterable[Prediction], classes: Sequence[str], file: TextIO) -> None:
    """Writes a list with an object for each prediction, as they come.

    Args:
        predictions: Predictions.
        classes: Names of the classes.
        file: File that is written to.
    """
    file.write("[")
    separator = "\n"
    for each in predictions:
        probabilities = dict(zip(classes, each.probabilities, strict=True))
        row = {"file": each.file, "label": each.label, "probability": each.probability, "probabilities": probabilities}
        file.write(f"{separator}{strict_json.dumps(row)}")
        separator = ",\n"
    file.write("\n]\n")


FORMATS: dict[str, Callable[[Iterable[Prediction], Sequence[str], TextIO], None]] = {
    "csv": write_csv,
    "json": write_json,
}


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(
        prog="python -m domainbed_ext.predict",
        description="Classifies image files with the trained model of a run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--run",
        type=option_values.tensors_path,
        required=True,
        metavar="DIR",
        help="folder of a finished run, or of a soup",
    )
    parser.add_argument(
        "images",
        type=option_values.path,
        nargs="+",
        metavar="IMAGE",
        help="image files, and folders of them at any depth",
    )
    parser.add_argument("--out", type=option_values.path, metavar="FILE", help="file of the result (standard output)")
    parser.add_argument(
        "--format", choices=FORMATS, help="format of the result (default: that of the ending of --out, else csv)"
    )
    parser.add_argument(
        "--step",
        default=saved.BEST,
        metavar="STEP",
        help="step whose model is used: best (by training-domain validation), last or a number (%(default)s)",
    )
    parser.add_argument(
        "--batch_size", type=option_values.whole(1), metavar="N", help="images at a time (default: what is fastest)"
    )
    parser.add_argument(
        "--workers",
        type=option_values.whole(0),
        default=0,
        metavar="N",
        help="processes that read images (%(default)s: the command itself reads them)",
    )
    parser.add_argument(
        "--threads", type=option_values.whole(1), metavar="N", help="CPU threads (default: those of the run)"
    )
    saved.add_options(parser)
    return parser


@as_command(START_AGAIN)
def main(argv: Sequence[str] | None = None) -> int:
    """The command: `python -m domainbed_ext.predict`."""
    args = make_parser().parse_args(argv)
    form = _choose_format(args.format, args.out)
    files, missing = find_files(args.images)
    with garbage.loading():
        from domainbed_ext.runs.classifier import load_classifier
    classifier = load_classifier(RunFolder(args.run), args.step, saved.Moved.of(args), args.threads)
    unreadable: dict[str, str] = {}
    predictions = predict(classifier, files, args.batch_size, args.workers, unreadable)
    if args.out:
        _write(Path(args.out), lambda file: FORMATS[form](predictions, classifier.classes, file))
        done = len(files) - len(unreadable)
        print(f"{done} prediction{'s' * (done != 1)}: see {args.out}")
    else:
        FORMATS[form](predictions, classifier.classes, sys.stdout)
    if left_out := missing | unreadable:
        count = len(files) + len(missing)
        reasons = "; ".join(f"{path} ({reason})" for path, reason in left_out.items())
        print(f"error: {len(left_out)} of {count} images cannot be read and are left out: {reasons}", file=sys.stderr)
    return ExitCode.FAILED if left_out else ExitCode.DONE


def _choose_format(chosen: str | None, out: str | None) -> str:
    ending = Path(out or "").suffix.lower().removeprefix(".")
    if chosen or not out:
        return chosen or "csv"
    if ending not in FORMATS:
        raise BenchmarkError(
            f"--out {out} does not end in {' or '.join(f'.{name}' for name in FORMATS)}: give it such a name, or add "
            "--format"
        )
    return ending


def _write(path: Path, write: Callable[[TextIO], None]) -> None:
    """Writes a file so that a reader sees it as it was or complete."""

    def write_to(partial: Path) -> None:
        with partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            write(file)

    try:
        replace_atomically(path, write_to)
    except OSError as error:
        raise BenchmarkError(f"cannot write {path} ({error.strerror or error}): give another --out") from error


if __name__ == "__main__":
    main()
