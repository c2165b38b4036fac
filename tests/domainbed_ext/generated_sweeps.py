"""Finished sweeps of any size that were never run: `python -m tests.domainbed_ext.generated_sweeps FOLDER --help`.

Runs, steps and folders are those of DomainBed's default sweep, and each record is as long as one that `train` writes.
Accuracies are whole numbers of images, so that some tie, and a few are NaN.
"""

import argparse
import hashlib
import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from domainbed_ext.protocols import left_out_environments
from domainbed_ext.report.environments import UPSTREAM_LABELS
from tests.domainbed_ext.fabricated_records import write_runs

STEPS = (*range(0, 5000, 300), 4999)
DATASETS = ("VLCS", "PACS", "OfficeHome", "TerraIncognita", "DomainNet", "RotatedMNIST", "ColoredMNIST")
TRAINABLE = {"BA": 75_018, "BOnly": 38_154, "AOnly": 38_154, "LP": 1_290, "FullFT": 821_642}
FACTS = {
    "machine": {"cores": 2, "cpu": "A processor", "gpu": None, "system": "Linux x86_64"},
    "mem_gb": 0.0,
    "precision": "bf16",
    "total_parameters": 895_370,
    "versions": {
        **{"domainbed_ext": "0.1.0", "numpy": "2.4.6", "python": "3.11.7", "safetensors": "0.8.0", "timm": "1.0.31"},
        **{"torch": "2.14.1+cu130", "torchvision": "0.29.1+cu130"},
    },
}


def sweep_records(
    datasets: Sequence[str] = ("PACS",),
    algorithms: Sequence[str] = tuple(TRAINABLE),
    n_hparams: int = 20,
    n_trials: int = 3,
    protocol: str = "leave_one_out",
    pairs: bool = False,
    steps: Sequence[int] = STEPS,
    nan: float = 0.001,
) -> Iterator[dict]:
    """The records of a sweep, one run after the other; with `pairs`, of two test environments too.

    `nan` is the share of accuracies that are NaN. A single-source run is trained on each environment in turn.
    """
    for trial in range(n_trials):
        for dataset in datasets:
            count = len(UPSTREAM_LABELS[dataset])
            for algorithm in algorithms:
                for test_envs in left_out_environments(count, single=not pairs):
                    if protocol == "single_source":
                        test_envs = [env for env in range(count) if env not in test_envs]
                    for seed in range(n_hparams):
                        yield from run_records(dataset, algorithm, test_envs, trial, seed, protocol, steps, nan)


def run_records(
    dataset: str,
    algorithm: str,
    test_envs: list[int],
    trial: int,
    hparams_seed: int,
    protocol: str = "leave_one_out",
    steps: Sequence[int] = STEPS,
    nan: float = 0.0,
) -> Iterator[dict]:
    """The records of one run, which are the same whenever they are asked for."""
    args = {
        **{"algorithm": algorithm, "backbone": None, "checkpoint_freq": None, "data_dir": "data", "dataset": dataset},
        **{"evaluate": "all", "holdout_fraction": 0.2, "hparams": None, "hparams_seed": hparams_seed},
        **{"input_stats": "backbone", "precision": None, "protocol": protocol, "sampling": "replacement"},
        **{"save_model_every_checkpoint": False, "skip_model_save": False, "source_envs": None, "steps": steps[-1] + 1},
        **{"task": "domain_generalization", "test_envs": test_envs, "test_on": "in", "threads": 1},
        **{"train_eval_share": 1.0, "trial_seed": trial, "uda_holdout_fraction": 0.0, "validation_images": "plain"},
        **{"verify_images": False, "weights": None, "workers": 0},
    }
    run = hashlib.md5(json.dumps(args, sort_keys=True).encode()).hexdigest()
    draw = random.Random(run)
    args |= {"output_dir": f"runs/{run}", "seed": draw.randrange(2**31)}
    names = UPSTREAM_LABELS[dataset]
    sizes = {f"env{env}_{split}": 400 if split == "in" else 100 for env in range(len(names)) for split in ("in", "out")}
    hparams = {
        **{"adapter_dropout": 0.0, "alpha": None, "backbone": "vit_pico_patch8_32", "batch_size": 16},
        **{"class_balanced": False, "compute": "folded", "data_augmentation": True, "gradient_correction": False},
        **{"image_size": None, "lr": 10 ** draw.uniform(-4, -2), "precision": "auto", "rank": 8, "targets": "all"},
        **{"weight_decay": 10 ** draw.uniform(-6, -2), "weights": "pretrained"},
    }
    skill = {env: draw.uniform(0.4, 0.8) - 0.2 * (env in test_envs) for env in range(len(names))}
    for step in steps:
        share = 1 - 0.7 * math.exp(-3 * step / (steps[-1] + 1))
        accuracies = {
            f"env{env}_{split}_acc": round(size * min(1, share * skill[env] + draw.gauss(0, 0.03))) / size
            for env in skill
            for split, size in (("in", 400), ("out", 100))
        }
        yield {
            **{name: math.nan if draw.random() < nan else value for name, value in accuracies.items()},
            **FACTS,
            "args": args,
            "data_digest": ["0" * 16] * len(names),
            "environments": names,
            "epoch": step / 90,
            "hparams": hparams,
            "loss": 2.5 * (1.05 - share),
            "run": run,
            "split_sizes": sizes,
            "step": step,
            "step_time": draw.uniform(0.2, 0.3),
            "trainable_parameters": TRAINABLE[algorithm],
        }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs' folders go")
    parser.add_argument("--datasets", nargs="+", default=["PACS"], choices=DATASETS, metavar="NAME")
    parser.add_argument("--n_hparams", type=int, default=20)
    parser.add_argument("--n_trials", type=int, default=3)
    parser.add_argument("--protocol", default="leave_one_out", choices=["leave_one_out", "single_source"])
    parser.add_argument("--pairs", action="store_true", help="runs with two test environments too")
    parser.add_argument("--nan", type=float, default=0.001, help="share of accuracies that are NaN")
    args = vars(parser.parse_args())
    write_runs(args.pop("folder"), sweep_records(**args))


if __name__ == "__main__":
    main()
