"""Uploads the trained adapter of a run to the Hugging Face hub, with a model card filled from the run's record.

python -m domainbed_ext.push --run runs/one --repo you/sketches
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs import saved
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.runs.predictions import Part, Predictions, load_predictions
from domainbed_ext.system import garbage, option_values
from domainbed_ext.system.command_line import START_AGAIN, CommandLine, as_command
from domainbed_ext.system.exit_codes import ExitCode
from vitlorafa import AdapterError

if TYPE_CHECKING:
    from vitlorafa import ModelCard

EXAMPLES = """\
examples:
  python -m domainbed_ext.push --run runs/pacs/0657090f9a83ff76efe083a104fde93a --repo you/sketches --dry_run
  python -m domainbed_ext.push --run runs/pacs/0657090f9a83ff76efe083a104fde93a --repo you/sketches --licence mit

The card has the data set, the domain that was held out, the accuracy on each domain with a 95 % interval over its
images, the hyperparameters and the versions. The adapter and its head are uploaded, and nothing else.
"""
_HPARAMS = ("lr", "weight_decay", "batch_size", "image_size", "adapter_dropout", "average", "head_start")


def make_card(record: dict[str, Any], predictions: Predictions, licence: str | None = None) -> "ModelCard":
    """The model card of a run.

    Args:
        record: Record of the step whose weights are uploaded.
        predictions: Predictions of the run after that step.
        licence: Identifier of the licence on the hub.
    """
    from vitlorafa import ModelCard

    args, hparams = record["args"], record["hparams"]
    held_out = [list(predictions.parts)[env] for env in args["test_envs"]]
    metrics: dict[str, Sequence[float]] = {}
    for name, part in predictions.parts.items():
        # As in the tables: a test domain's `in` split, and the images that training domains held out.
        split, what = ("in", "held-out domain") if name in held_out else ("out", "training domain, held-out images")
        metrics[f"accuracy on {name} ({what}), %"] = _estimate(part, split)
    details = {
        "algorithm": args["algorithm"],
        "steps": record["step"] + 1,
        **{name: hparams[name] for name in _HPARAMS if hparams.get(name) is not None},
        "seed": args["seed"],
    }
    versions = {name: version for name, version in record["versions"].items() if isinstance(version, str)}
    return ModelCard(
        dataset=args["dataset"],
        held_out=", ".join(held_out),
        metrics=metrics,
        licence=licence,
        details=details,
        versions=versions,
        description="Intervals are over the images of one run (Wilson), not over trials.",
    )


def _estimate(part: Part, split: str) -> tuple[float, float, float]:
    """Accuracy in percent, with the ends of Wilson's 95 % interval."""
    from scipy.stats import binomtest

    right = part.is_right[part.of_split(split)].nan_to_num(0)  # type: ignore[arg-type]
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    low, value, high = (round(100 * each, 1) for each in (interval.low, float(right.mean()), interval.high))
    return value, low, high


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(
        prog="python -m domainbed_ext.push",
        description="Uploads the trained adapter of a run to the Hugging Face hub, with a filled model card.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--run", type=option_values.tensors_path, required=True, metavar="DIR", help="folder of a finished run"
    )
    parser.add_argument(
        "--repo",
        required=True,
        metavar="NAME",
        help="repository on the hub, created if it is missing: you/name",
    )
    parser.add_argument("--licence", metavar="ID", help="licence of the adapter as the hub names it, e.g. mit (none)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry_run", action="store_true", help="print the model card, and send nothing")
    saved.add_options(parser)
    return parser


@as_command(START_AGAIN)
def main(argv: Sequence[str] | None = None) -> int:
    """The command: `python -m domainbed_ext.push`."""
    args = make_parser().parse_args(argv)
    with garbage.loading():
        from domainbed_ext.runs.classifier import load_classifier
        from vitlorafa import adapter_layers, push_to_hub, save_with_card

    run = RunFolder(args.run)
    predictions = load_predictions(run)
    classifier = load_classifier(run, moved=saved.Moved.of(args))
    model, name = classifier.algorithm.backbone, classifier.record["args"]["algorithm"]
    if not list(adapter_layers(model)):
        raise BenchmarkError(f"{name} trains no adapter: choose a run of BA, BOnly or AOnly")
    card = make_card(classifier.record, predictions, args.licence)
    saved_as: dict[str, Any] = {"card": card, "head": True, "class_names": classifier.classes}
    try:
        if args.dry_run:
            with tempfile.TemporaryDirectory() as folder:
                save_with_card(model, folder, args.repo, **saved_as)
                print(Path(folder, "README.md").read_text(encoding="utf-8"))
        else:
            private = args.private or None  # None leaves it to the account's settings
            print(push_to_hub(model, args.repo, private=private, **saved_as))
    except AdapterError as error:
        raise BenchmarkError(str(error)) from error
    return ExitCode.DONE


if __name__ == "__main__":
    main()
