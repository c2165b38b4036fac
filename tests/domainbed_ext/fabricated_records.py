"""Records of runs that were never run."""

import itertools
import json
import random

SIZES = {"PACS": (2048, 2344, 1670, 3929), "VLCS": (1415, 2656, 3282, 3376)}
NAMES = {"PACS": ["A", "C", "P", "S"], "VLCS": ["C", "L", "S", "V"]}
# Accuracy in % on the four environments, train accuracy, and trainable parameters of ViT-B/16.
METHODS = {
    "BA@rank=8": ((81.4, 94.9, 95.4, 49.9), 99.6, 300_295),
    "BOnly@rank=8": ((81.2, 92.5, 96.1, 40.4), 96.3, 152_839),
    "BOnly@rank=16": ((84.4, 93.5, 97.1, 39.9), 97.3, 300_295),
    "AOnly@rank=8": ((77.1, 92.0, 92.1, 29.7), 96.8, 152_839),
    "AOnly@rank=16": ((81.4, 93.9, 95.6, 35.0), 97.3, 300_295),
    "LP": ((67.7, 81.6, 88.8, 28.7), 84.8, 5_383),
    "FullFT": ((75.5, 98.2, 89.5, 59.6), 99.9, 85_804_039),
}


def single_source_run(
    algorithm,
    trial=0,
    dataset="PACS",
    source=1,
    accuracies=(0.6, 0.8, 0.7, 0.5),
    train=0.9,
    parameters=1000,
    steps=(0, 100, 200, 299),
    **hparams,
):
    """The records of one run, its accuracies growing towards those given, which it has at its last step."""
    name = f"{dataset}-{algorithm}-{source}-{trial}".replace("@", "-").replace("=", "")
    sizes = {
        f"env{env}_{split}": size - size // 5 if split == "in" else size // 5
        for env, size in enumerate(SIZES[dataset])
        for split in ("in", "out")
    }
    records = []
    for step in steps:
        share = 0.4 + 0.6 * ((step + 1) / (steps[-1] + 1)) ** 0.4
        record = {
            "args": {
                "dataset": dataset,
                "algorithm": algorithm,
                "protocol": "single_source",
                "test_envs": [env for env in range(4) if env != source],
                "trial_seed": trial,
                "hparams_seed": 0,
                "seed": 1234 + trial,
                "holdout_fraction": 0.2,
                "steps": steps[-1] + 1,
            },
            "hparams": {"backbone": "vit_base_patch16_224.augreg_in21k", "lr": 0.001, **hparams},
            "environments": NAMES[dataset],
            "data_digest": ["0" * 16] * len(NAMES[dataset]),
            "split_sizes": sizes,
            "trainable_parameters": parameters,
            "total_parameters": 86_000_000,
            "precision": "bfloat16",
            "versions": {"python": "3.11.2", "torch": "2.9.0"},
            "machine": {"cpu": "A processor", "cores": 2, "gpu": None},
            "loss": 2 * (1.05 - share),
            "step": step,
            "run": name,
        }
        for env, accuracy in enumerate(accuracies):
            record[f"env{env}_in_acc"] = share * (train if env == source else accuracy)
            record[f"env{env}_out_acc"] = share * accuracy
        records.append(record)
    return records


def left_out_run(algorithm, trial, test_env, out_of_domain, in_domain=0.8, train=0.9, steps=(0, 10), **hparams):
    """The records of a run that leaves one domain of PACS out, with the accuracies given at its last step."""
    records = single_source_run(algorithm, trial, steps=steps, **hparams)
    for record in records:
        share = 0.5 + 0.5 * record["step"] / steps[-1]
        record["args"] |= {"protocol": "leave_one_out", "test_envs": [test_env]}
        record["run"] = f"{algorithm}-{test_env}-{trial}"
        for env in range(4):
            record[f"env{env}_in_acc"] = share * (out_of_domain if env == test_env else train)
            record[f"env{env}_out_acc"] = share * (out_of_domain if env == test_env else in_domain)
    return records


def left_out(algorithms, trials=2, seed=0, noise=0.05, **hparams):
    """Runs of each algorithm on each domain of PACS, with random accuracies."""
    draw = random.Random(seed)
    return [
        record
        for algorithm in algorithms
        for trial in range(trials)
        for env in range(4)
        for record in left_out_run(
            algorithm,
            trial,
            env,
            0.6 + draw.gauss(0, noise),
            0.8 + draw.gauss(0, noise / 4),
            parameters=1000 + trial,
            **hparams,
        )
    ]


def paper_like(trials=3, datasets=("PACS",), methods=METHODS, noise=0.01, seed=0):
    """Single-source runs of the seven methods with roughly the paper's accuracies on PACS."""
    draw = random.Random(seed)
    records = []
    for dataset in datasets:
        for algorithm, (accuracies, train, parameters) in methods.items():
            for trial in range(trials):
                rank = {"rank": int(algorithm.partition("=")[2]), "targets": "q,v"} if "@" in algorithm else {}
                records += single_source_run(
                    algorithm,
                    trial,
                    dataset,
                    accuracies=[min(1, accuracy / 100 + draw.gauss(0, noise)) for accuracy in accuracies],
                    train=min(1, train / 100 + draw.gauss(0, noise / 4)),
                    parameters=parameters,
                    **rank,
                )
    return records


def write_runs(folder, records):
    """Puts records where `load_records` reads them; those of one run follow each other."""
    for name, of_run in itertools.groupby(records, key=lambda record: record["run"]):
        run = folder / name
        run.mkdir(parents=True, exist_ok=True)
        with (run / "results.jsonl").open("w", encoding="utf-8") as file:
            for record in of_run:
                kept = {key: value for key, value in record.items() if key != "run"}
                file.write(json.dumps(kept, sort_keys=True) + "\n")
        (run / "done").write_text("done")
    return folder
