"""The command line of `domainbed_ext.bench`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from domainbed_ext.bench import accuracy, card, card_parts, gpu, questions, runs, side_by_side, stages, steps, sweeps
from domainbed_ext.launchers import LAUNCHERS
from domainbed_ext.system import option_values
from domainbed_ext.system.command_line import START_AGAIN, CommandLine, as_command

PARTS = {
    **{"stages": stages, "steps": steps, "run": runs, "accuracy": accuracy},
    **{"gpu": gpu, "side_by_side": side_by_side, "sweep": sweeps, "questions": questions, "card": card},
}

EXAMPLES = """examples:
  python -m domainbed_ext.bench stages --data_dir D            # images per second, from the file to the optimizer
  python -m domainbed_ext.bench steps                          # training steps and evaluation against PEFT and timm
  python -m domainbed_ext.bench run --data_dir D               # a whole run, compared with the plain implementation
  python -m domainbed_ext.bench run --data_dir D --checkout C  # and with upstream DomainBed
  python -m domainbed_ext.bench run --data_dir D --checkout C --ways upstream defaults --rounds 1
  python -m domainbed_ext.bench accuracy --data_dir D          # whether the fast versions reach the same accuracy
  python -m domainbed_ext.bench gpu --data_dir D               # ViT-Ti, ViT-S, ViT-B and a whole run on a GPU
  python -m domainbed_ext.bench side_by_side --data_dir D --at_once 1 2 4  # how many parallel runs saturate a device
  python -m domainbed_ext.bench sweep --command_launcher local --runs 200
  python -m domainbed_ext.bench questions --ask backend compile  # which defaults are fastest on this GPU
  python -m domainbed_ext.bench card --data_dir D              # tests and all measurements of a GPU, in nine minutes
"""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(
        prog="python -m domainbed_ext.bench",
        description="Measures how fast the benchmark itself is. What is compared is timed in interleaved rounds.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    place = CommandLine(add_help=False)
    place.add_argument(
        "--output_dir",
        type=option_values.path,
        default="results/bench",
        metavar="DIR",
        help="folder for the tables (default: %(default)s)",
    )
    data = CommandLine(add_help=False)
    data.add_argument(
        "--dataset", default="PACS", metavar="NAME", help="data set of image folders (default: %(default)s)"
    )
    data.add_argument(
        "--data_dir", type=option_values.path, required=True, metavar="DIR", help="folder that contains the data set"
    )
    data.add_argument("--backbone", default="vit_tiny_patch16_224", metavar="NAME", help="default: %(default)s")
    data.add_argument(
        "--weights",
        type=option_values.tensors_path,
        default="pretrained",
        metavar="FILE",
        help="weights of the backbone, as in a run (default: %(default)s)",
    )
    data.add_argument("--cache_dir", type=option_values.tensors_path, metavar="DIR", help="image cache, as in a run")

    commands = parser.add_subparsers(dest="what", required=True, metavar="|".join(PARTS))
    some = commands.add_parser("stages", parents=[place, data], help="images per second of each stage, on one core")
    some.add_argument(
        "--hparams",
        default=json.dumps({"batch_size": 8, "targets": "all"}),
        metavar="JSON",
        help="default: %(default)s",
    )
    some.add_argument(
        "--images",
        type=option_values.whole(1),
        default=128,
        metavar="N",
        help="images per round (default: %(default)s)",
    )
    some.add_argument("--rounds", type=option_values.whole(1), default=9, metavar="N", help="default: %(default)s")

    against = commands.add_parser(
        "steps", parents=[place], help="training steps and evaluation, compared with PEFT and timm's own model"
    )
    against.add_argument(
        "--backbones",
        nargs="+",
        default=["vit_tiny_patch16_224", "vit_small_patch16_224"],
        metavar="NAME",
        help="timm models (default: ViT-Ti/16 and ViT-S/16)",
    )
    against.add_argument(
        "--batch_size",
        type=option_values.whole(1),
        default=24,
        metavar="N",
        help="images per training step (default: %(default)s)",
    )
    against.add_argument(
        "--image_size", type=option_values.whole(1), default=224, metavar="PIXELS", help="default: %(default)s"
    )
    against.add_argument("--rank", type=option_values.whole(1), default=8, metavar="R", help="default: %(default)s")
    against.add_argument("--targets", default="all", metavar="NAMES", help="adapted projections (default: %(default)s)")
    against.add_argument("--threads", type=option_values.whole(1), default=1, metavar="N", help="default: %(default)s")
    against.add_argument(
        "--peers",
        nargs="+",
        choices=steps.PEERS,
        default=list(steps.PEERS),
        metavar="PRECISION",
        help="precisions of PEFT's and timm's models: bf16, under autocast, and float32 (default: both); a processor "
        "without bf16 instructions emulates them, which takes many times as long",
    )
    against.add_argument("--rounds", type=option_values.whole(1), default=9, metavar="N", help="default: %(default)s")

    run = commands.add_parser(
        "run", parents=[place, data], help="a whole run, compared with the plain implementation and upstream DomainBed"
    )
    run.add_argument("--checkout", type=option_values.path, metavar="DIR", help="checkout of upstream DomainBed")
    run.add_argument(
        "--ways",
        nargs="+",
        metavar="NAME",
        help="what is measured: "
        + "; ".join(f"{name}: {label}" if label != name else name for name, label in runs.WAYS.items())
        + " (default: all, upstream only with --checkout)",
    )
    run.add_argument("--algorithm", default="FullFT", metavar="NAME", help="default: %(default)s")
    run.add_argument("--hparams", default=json.dumps({"batch_size": 16}), metavar="JSON", help="default: %(default)s")
    run.add_argument("--steps", type=option_values.whole(1), default=41, metavar="N", help="default: %(default)s")
    run.add_argument(
        "--checkpoint_freq", type=option_values.whole(0), default=20, metavar="N", help="default: %(default)s"
    )
    run.add_argument(
        "--per_class",
        type=option_values.whole(0),
        default=30,
        metavar="N",
        help="images per class and domain; 0: all (default: %(default)s)",
    )
    run.add_argument("--rounds", type=option_values.whole(1), default=3, metavar="N", help="default: %(default)s")

    same = commands.add_parser(
        "accuracy",
        parents=[place, data],
        help="whether the fast implementations reach the same accuracy as the exact one",
    )
    same.add_argument(
        "--compare",
        nargs="+",
        choices=accuracy.COMPARISONS,
        default=accuracy.COMPARISONS,
        metavar="NAME",
        help="all: everything that differs from the plain implementation in float32; images: only the images, in bf16; "
        "resized: training on resized images (default: all three)",
    )
    same.add_argument("--algorithm", default="BOnly", metavar="NAME", help="default: %(default)s")
    same.add_argument(
        "--hparams",
        default=json.dumps({"batch_size": 8, "targets": "all"}),
        metavar="JSON",
        help="default: %(default)s",
    )
    same.add_argument(
        "--test_env",
        type=option_values.whole(0),
        default=0,
        metavar="N",
        help="test environment (default: %(default)s)",
    )
    same.add_argument("--steps", type=option_values.whole(1), default=60, metavar="N", help="default: %(default)s")
    same.add_argument("--trials", type=option_values.whole(1), default=3, metavar="N", help="default: %(default)s")
    same.add_argument(
        "--first_trial",
        type=option_values.whole(0),
        default=0,
        metavar="N",
        help="number of the first trial (default: %(default)s)",
    )
    same.add_argument(
        "--per_class",
        type=option_values.whole(0),
        default=100,
        metavar="N",
        help="images per class and domain; 0: all (default: %(default)s)",
    )

    models = CommandLine(add_help=False)
    models.add_argument(
        "--backbones", nargs="+", default=gpu.BACKBONES, metavar="NAME", help="timm models (default: ViT-Ti, -S and -B)"
    )

    cuda = commands.add_parser("gpu", parents=[place, models], help="ViT-Ti, ViT-S and ViT-B on a GPU, and a whole run")
    cuda.add_argument("--on_cpu", action="store_true", help="measure on the CPU where there is no GPU")
    cuda.add_argument(
        "--methods", nargs="+", default=gpu.METHODS, metavar="NAME", help=f"default: {' '.join(gpu.METHODS)}"
    )
    cuda.add_argument(
        "--batch_sizes",
        type=option_values.whole(1),
        nargs="+",
        default=[32, 96],
        metavar="N",
        help="images per training step (default: 32 96)",
    )
    cuda.add_argument(
        "--images",
        type=option_values.whole(1),
        default=256,
        metavar="N",
        help="images per evaluation batch (default: %(default)s)",
    )
    cuda.add_argument(
        "--image_size", type=option_values.whole(1), default=224, metavar="PIXELS", help="default: %(default)s"
    )
    cuda.add_argument("--rounds", type=option_values.whole(1), default=20, metavar="N", help="default: %(default)s")
    cuda.add_argument(
        "--data_dir",
        type=option_values.path,
        metavar="DIR",
        help="folder that contains PACS; if given, a run on it is timed too",
    )
    cuda.add_argument("--cache_dir", type=option_values.tensors_path, metavar="DIR", help="image cache, as in a run")
    cuda.add_argument(
        "--steps",
        type=option_values.whole(1),
        default=5000,
        metavar="N",
        help="steps of the run (default: %(default)s)",
    )
    cuda.add_argument(
        "--backbone", default="vit_base_patch16_224", metavar="NAME", help="backbone of the run (default: ViT-B/16)"
    )
    cuda.add_argument("--hparams", default="{}", metavar="JSON", help="hyperparameters of the run")
    cuda.set_defaults(dataset="PACS", algorithm="BOnly", weights="none")

    several = commands.add_parser(
        "side_by_side", parents=[place, data], help="parallel runs, compared with a single one"
    )
    several.add_argument(
        "--at_once", type=option_values.whole(1), nargs="+", default=[1, 2], metavar="N", help="default: %(default)s"
    )
    several.add_argument("--algorithm", default="BOnly", metavar="NAME", help="default: %(default)s")
    several.add_argument(
        "--hparams",
        default=json.dumps({"batch_size": 8, "targets": "all"}),
        metavar="JSON",
        help="default: %(default)s",
    )
    several.add_argument("--steps", type=option_values.whole(1), default=40, metavar="N", help="default: %(default)s")
    several.add_argument("--rounds", type=option_values.whole(1), default=3, metavar="N", help="default: %(default)s")
    several.add_argument(
        "--no_warm_up", action="store_true", help="leave out the first round, which fills the image cache"
    )

    sweep = commands.add_parser("sweep", parents=[place], help="overhead of a sweep of many short runs")
    sweep.add_argument(
        "--runs",
        type=option_values.whole(1),
        default=200,
        metavar="N",
        help="number of runs, a multiple of 20 (default: %(default)s)",
    )
    sweep.add_argument(
        "--steps",
        type=option_values.whole(1),
        default=120,
        metavar="N",
        help="steps of each run (default: %(default)s)",
    )
    sweep.add_argument(
        "--command_launcher", default="local", metavar="NAME", help=f"{', '.join(LAUNCHERS)} (default: %(default)s)"
    )
    sweep.add_argument(
        "--launcher_options", default="{}", metavar="JSON", help="options of the launcher (default: %(default)s)"
    )
    sweep.add_argument(
        "--jobs",
        type=option_values.whole(0),
        default=0,
        metavar="N",
        help="runs at the same time (default: one per core)",
    )

    asked = commands.add_parser("questions", parents=[place, models], help="which defaults are fastest on this GPU")
    asked.add_argument(
        "--ask",
        nargs="+",
        choices=questions.QUESTIONS,
        default=list(questions.QUESTIONS),
        metavar="NAME",
        help=f"{', '.join(questions.QUESTIONS)} (default: all)",
    )
    asked.add_argument(
        "--batch_size",
        type=option_values.whole(1),
        default=32,
        metavar="N",
        help="images a step (default: %(default)s)",
    )
    asked.add_argument(
        "--image_size", type=option_values.whole(1), default=224, metavar="PIXELS", help="default: %(default)s"
    )
    asked.add_argument("--rounds", type=option_values.whole(1), default=5, metavar="N", help="default: %(default)s")

    every = commands.add_parser("card", parents=[place], help="tests and all measurements of a GPU, part by part")
    every.add_argument("--rehearse", action="store_true", help="try all parts on the CPU, at tiny sizes")
    every.add_argument(
        "--parts",
        nargs="+",
        choices=card_parts.PARTS,
        default=list(card_parts.PARTS),
        metavar="NAME",
        help="default: all of them",
    )
    every.add_argument(
        "--data_dir",
        type=option_values.path,
        metavar="DIR",
        help="folder that contains PACS (default: invented images, whose accuracies mean nothing)",
    )
    every.add_argument(
        "--minutes",
        type=option_values.number(0),
        default=8.8,
        metavar="N",
        help="limit of all parts together (default: %(default)s)",
    )
    return parser


@as_command(START_AGAIN)
def main(argv: Sequence[str] | None = None) -> None:
    """The command: `python -m domainbed_ext.bench`."""
    args = make_parser().parse_args(argv)
    PARTS[args.what].measure(args, Path(args.output_dir))


if __name__ == "__main__":
    main()
